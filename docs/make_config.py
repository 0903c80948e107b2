"""Writes docs/config.md, the reference of all config keys, from the schema.

python docs/make_config.py
"""

import ast
import inspect
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import yaml  # noqa: E402
from diffusers import DDPMScheduler, UNet2DModel  # noqa: E402

from finetune.config.load import expected, section_of  # noqa: E402
from finetune.config.schema import Config  # noqa: E402
from finetune.config.section import Section  # noqa: E402

SMALL = """\
output_dir: runs/first
model:
  pretrained: google/ddpm-celebahq-256 # or a folder
data:
  source: path/to/pictures
training:
  global_batch_size: 64
  micro_batch_size: auto
  num_epochs: 10
"""
USUAL = """\
output_dir: runs/second
seed: 1
model:
  pretrained: google/ddpm-celebahq-256
data:
  source: path/to/pictures
  crop: random
  random_flip: true
  on_bad_image: skip
training:
  global_batch_size: 64
  micro_batch_size: 8 # on one GPU 8 accumulation steps, on two GPUs 4
  max_train_steps: 5000
optimizer:
  learning_rate: 5e-5 # the default, 1e-5, changes a pretrained model slowly
lr_scheduler:
  name: cosine
  warmup_steps: 200
ema:
  decay: 0.999 # an average over about the last 1,000 updates
validation:
  every_steps: 250
samples:
  every_steps: 500
  count: 16
"""
SMALL_UNET = """\
model:
  unet:
    sample_size: 16
    in_channels: 1
    out_channels: 1
    block_out_channels: [32, 48, 48]
    down_block_types: [DownBlock2D, DownBlock2D, DownBlock2D]
    up_block_types: [UpBlock2D, UpBlock2D, UpBlock2D]
    layers_per_block: 1
    norm_num_groups: 8
"""
USUAL_UNET = """\
model:
  unet:
    sample_size: 64
    block_out_channels: [64, 128, 256, 256]
    down_block_types: [DownBlock2D, DownBlock2D, AttnDownBlock2D, AttnDownBlock2D]
    up_block_types: [AttnUpBlock2D, AttnUpBlock2D, UpBlock2D, UpBlock2D]
    layers_per_block: 2
"""
UNET_KEYS = {
    "sample_size": "Pixels a side that the network is made for; `data.resolution` overrides it",
    "in_channels": "Channels of the images: 1 (grey), 3 (RGB) or 4 (RGBA)",
    "out_channels": "As `in_channels`",
    "block_out_channels": "Channels of each level, from full resolution down; each further level halves the resolution",
    "down_block_types": "One block a level: DownBlock2D, or AttnDownBlock2D with self-attention",
    "up_block_types": "The same from the lowest level up: UpBlock2D or AttnUpBlock2D",
    "layers_per_block": "Residual layers in each block",
    "norm_num_groups": "Groups of the group normalisation; has to divide each of `block_out_channels`",
    "attention_head_dim": "Channels of an attention head; has to divide the channels of each block with attention",
    "dropout": "Probability; above 0, results depend on the batch layout, and the plan warns",
}
NOISE_SCHEDULER_KEYS = {
    "num_train_timesteps": "Noise levels, T",
    "beta_schedule": "linear, scaled_linear, squaredcos_cap_v2 or sigmoid",
    "prediction_type": "What the network predicts: epsilon, sample or v_prediction; fixed by a pretrained model",
}
TEXT = """\
<!-- Made by docs/make_config.py from finetune/config/. -->

# Config reference

A run is described by one YAML file. `key.path=value` on the command line overrides any key:

    accelerate launch train.py --config mine.yaml optimizer.learning_rate=2e-5 training.max_train_steps=200

Steps are optimizer updates everywhere, never micro-batches. Every mistake is reported in one line: key, value found,
value expected. Processes, mixed precision and compilation are options of the launch, not of this file; see the README.

The shortest config:

```yaml
{small}```

A usual one:

```yaml
{usual}```

`global_batch_size = micro_batch_size x gradient_accumulation_steps x processes`: give any two of the three keys, or
`global_batch_size` with `micro_batch_size: auto`. Batches far above the gradient noise scale, which TensorBoard shows
and the end of a run prints, bring little.

{sections}
## A network from scratch

`model.unet` takes the settings of diffusers'
[UNet2DModel](https://huggingface.co/docs/diffusers/api/models/unet2d), `model.noise_scheduler` those of its
[DDPMScheduler](https://huggingface.co/docs/diffusers/api/schedulers/ddpm). These are the ones that one must know:

| key of `model.unet` | default | meaning |
|---|---|---|
{unet_keys}

| key of `model.noise_scheduler` | default | meaning |
|---|---|---|
{noise_scheduler_keys}

The defaults (`unet: {{}}`) make a network of {default_millions:.0f} M parameters. Its weights, gradients, AdamW moments
and moving average take {default_gigabytes:.1f} GB, before any activations.

A small network ({small_millions:.2f} M parameters), which learns digits of 16 pixels in minutes on a laptop:

```yaml
{small_unet}```

A usual one ({usual_millions:.0f} M parameters), for pictures of 64 pixels on a GPU:

```yaml
{usual_unet}```
"""


def meanings() -> dict[str, dict[str, str]]:
    """Class -> key -> the string below it, which Python does not keep."""
    found: dict[str, dict[str, str]] = {}
    files = sorted((ROOT / "finetune/config").glob("*.py"))
    for node in (node for file in files for node in ast.parse(file.read_text()).body):
        if isinstance(node, ast.ClassDef):
            for key, text in zip(node.body, node.body[1:], strict=False):
                if isinstance(key, ast.AnnAssign) and isinstance(text, ast.Expr):
                    # A table's row is one line; what code indents is not part of the text.
                    found.setdefault(node.name, {})[key.target.id] = " ".join(text.value.value.split())
    return found


def value(default: object) -> str:
    """A default as YAML writes it."""
    if isinstance(default, float) and 0 < default < 1e-3:
        mantissa, exponent = f"{default:e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    default = list(default) if isinstance(default, tuple) else default
    return yaml.safe_dump(default, default_flow_style=True, width=1000).removesuffix("\n...\n").strip()


def section(name: str, model: type[Section], texts: dict[str, dict[str, str]]) -> str:
    """A table of the keys of a section; of those of the config itself that are no sections, for `name` empty."""
    rows = ["| key | takes | default | meaning |", "|---|---|---|---|", *key_rows(name, model, texts)]
    return "\n".join(rows)


def key_rows(name: str, model: type[Section], texts: dict[str, dict[str, str]]) -> list[str]:
    """A row a key; those of a section that may be null follow the key that holds it."""
    lines = []
    for key, field in model.model_fields.items():
        if isinstance(field.annotation, type(Section)):
            continue
        default = "required" if field.is_required() else f"`{value(field.default)}`"
        lines.append(f"| `{name}{key}` | {expected(field)} | {default} | {texts[model.__name__][key]} |")
        if inner := section_of(field.annotation):
            lines += key_rows(f"{name}{key}.", inner, texts)
    return lines


def millions(unet: dict) -> float:
    with torch.device("meta"):
        return sum(weight.numel() for weight in UNet2DModel(**unet).parameters()) / 1e6


def component_keys(component: type, keys: dict[str, str]) -> str:
    defaults = inspect.signature(component.__init__).parameters
    return "\n".join(f"| `{key}` | `{value(defaults[key].default)}` | {text} |" for key, text in keys.items())


def reference() -> str:
    texts = meanings()
    parts = [f"## Run\n\n{section('', Config, texts)}\n"]
    for name, field in Config.model_fields.items():
        if isinstance(field.annotation, type(Section)):
            table = section(f"{name}.", field.annotation, texts)
            parts.append(f"## {name}\n\n{texts['Config'][name]}\n\n{table}\n")
    small, usual = (yaml.safe_load(text)["model"]["unet"] for text in (SMALL_UNET, USUAL_UNET))
    return TEXT.format(
        small=SMALL,
        usual=USUAL,
        sections="\n".join(parts),
        unet_keys=component_keys(UNet2DModel, UNET_KEYS),
        noise_scheduler_keys=component_keys(DDPMScheduler, NOISE_SCHEDULER_KEYS),
        default_millions=millions({}),
        default_gigabytes=millions({}) * 5 * 4 / 1000,  # five float32 tensors of each
        small_unet=SMALL_UNET,
        small_millions=millions(small),
        usual_unet=USUAL_UNET,
        usual_millions=millions(usual),
    )


if __name__ == "__main__":
    (ROOT / "docs/config.md").write_text(reference(), encoding="utf-8")
