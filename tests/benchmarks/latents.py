"""Training on cached encodings: its overhead, its speed-up over encoding in the loop, and its memory.

    python tests/benchmarks/latents.py            # about seven minutes on two CPU cores, and 12 GB of memory
    python tests/benchmarks/latents.py --short

The networks have the layers of Stable Diffusion 1.5: at an eighth of its width, for images of 128 instead of 512 pixels
a side, where fixed costs weigh most; and, for the gain over encoding in the loop, at its own size for LoRA and at half
of its width with all weights trained, whose moments and average would take 17 GB. The narrower the networks, the
smaller the gain: what the UNet's many small layers cost beside their arithmetic grows.
"""

import json
import os
from functools import partial
from pathlib import Path
from typing import NamedTuple

from environment import FOLDER, ROOT, machine, parser

import torch
from bare import beside_the_trainer, in_turns, milliseconds, ratio
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from table import head, row
from transformers import CLIPTextConfig, CLIPTextModel

from finetune.config.inputs import LoRAConfig
from finetune.config.schema import Config
from finetune.models.lora import add_adapters, draw_adapters
from harness.configs import tiny_config, write_config, write_pictures
from harness.pipelines import LENGTH, pipeline
from harness.processes import start_several

SIZE, BATCH = 128, 16  # pixels a side and images of an update


class Networks(NamedTuple):
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel


def proportional(divisor: int, size: int, tokens: int, width: int) -> Networks:
    """Stable Diffusion 1.5 at a part of its width, for grey images of so many pixels a side.

    Args:
        tokens: that its text encoder reads, whose embeddings are `width` wide.
    """
    torch.manual_seed(0)
    return Networks(
        AutoencoderKL(
            in_channels=1,
            out_channels=1,
            block_out_channels=[width // divisor for width in (128, 256, 512, 512)],
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            layers_per_block=2,
            latent_channels=4,
            norm_num_groups=8,
        ),
        UNet2DConditionModel(
            sample_size=size // 8,
            block_out_channels=[width // divisor for width in (320, 640, 1280, 1280)],
            cross_attention_dim=width,
            attention_head_dim=8,
            norm_num_groups=8,
        ),
        CLIPTextModel(
            CLIPTextConfig(
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=12,
                num_attention_heads=8,
                max_position_embeddings=tokens,
            )
        ),
    )


class BareLatents:
    """Updates on one encoded batch in memory, with the optimizer and the average of diffusers' scripts."""

    def __init__(self, networks: Networks, size: int, batch: int, lora: bool = False):
        self.vae, self.unet, self.text_encoder = networks
        self.vae.requires_grad_(False).eval()
        self.text_encoder.requires_grad_(False).eval()
        if lora:
            add_adapters(self.unet, LoRAConfig(rank=16))
            draw_adapters(self.unet, 0)
        self.trained = [weight for weight in self.unet.train().parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, fused=True)
        self.ema = EMAModel(self.trained, foreach=True)
        tokens, side = self.text_encoder.config.max_position_embeddings, self.unet.config.sample_size
        self.images, self.captions = torch.rand(batch, 1, size, size), torch.randint(0, 1000, (batch, tokens))
        self.noisy, self.noise = torch.randn(2, batch, 4, side, side)
        self.text, self.timesteps = self.text_encoder(self.captions)[0], torch.randint(0, 100, (batch,))

    def update(self) -> None:
        prediction = self.unet(self.noisy, self.timesteps, self.text).sample
        torch.nn.functional.mse_loss(prediction, self.noise).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.trained)

    def encode_and_update(self) -> None:
        """As diffusers' scripts do: each image and each caption in each update."""
        with torch.no_grad():
            self.vae.encode(self.images).latent_dist.sample()
            self.text_encoder(self.captions)
        self.update()


def save_with(networks: Networks, folder: Path) -> Path:
    """A tiny pipeline with this VAE and this UNet for its own."""
    made = pipeline()
    made.register_modules(vae=networks.vae, unet=networks.unet)
    made.save_pretrained(folder)
    return folder


def config_of(name: str, folder: Path, size: int, **changes) -> Config:
    pictures = Path(FOLDER.name, "pictures")
    if not pictures.exists():
        write_pictures(pictures, 64, (size, size), "text")
    options = {
        "model": {"pretrained": str(folder)},
        "data__num_workers": 1,
        "training": {"micro_batch_size": BATCH, "gradient_accumulation_steps": 1, "max_train_steps": 1000},
        "logging__tracker": "tensorboard",
    }
    return Config.model_validate(tiny_config(pictures, Path(FOLDER.name, name), **options | changes))


WATCH = """
import json, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import torch
from pathlib import Path
import train
from finetune.config.load import load_config
from finetune.data import encoded_batches, encodings
from finetune.models.encoders import PipelineEncoders
from finetune.run.run import Run
from finetune.training.host_memory import forget_peak, peak_memory

if {random}:  # neither encoders nor encodings: latents and texts from a generator
    def content(batches, slots):
        return {{"latents": torch.randn(len(slots), *batches.shape(slots[0].image))}}

    def conditions(batches, slots, dropped):
        return {{name: torch.randn(len(slots), *shape) for name, shape in batches.texts.store.fields.items()}}

    encoded_batches.EncodedBatches.content, encoded_batches.EncodedBatches.conditions = content, conditions
    encodings.RequiredEncodings.make = lambda self, accelerator, images=None: self._encodings()
    encodings.Embeddings._entry = lambda self, text: {{n: torch.zeros(s) for n, s in self.store.fields.items()}}
    PipelineEncoders.check = lambda self: None
    train.check_prediction_type = lambda *arguments: None
evaluate, calls = Run.evaluate, []

def watched(run):
    evaluate(run)
    calls.append(1)
    if len(calls) == 2:
        forget_peak()

Run.evaluate = watched
finish = Run.finish
Run.finish = lambda run, flops: Path({out!r}).write_text(json.dumps(peak_memory())) and 0
train.main(load_config({config!r}))
"""


def peak(name: str, folder: Path, size: int, short: bool, random: bool) -> float:
    """MB at the peak of the updates of a run in an interpreter of its own; in a fork in the short form."""
    config = config_of(name, folder, size, logging__tracker=None, data__num_workers=0)
    values = config.model_dump(mode="json", exclude_defaults=True)
    values["training"]["max_train_steps"] = 4 if short else 10
    file = write_config(Path(FOLDER.name, f"{name}.yaml"), values)
    out = Path(FOLDER.name, f"{name}.json")
    script = Path(FOLDER.name, f"watch_{name}.py")  # its folder comes first on the path: not random.py
    script.write_text(WATCH.format(root=str(ROOT), random=random, out=str(out), config=str(file)))
    (process,) = start_several(1, folder=Path(FOLDER.name), script=str(script), fresh=not short)
    done = process.wait(600)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(out.read_text()) / 1e6


def main() -> None:
    short = parser(__doc__).parse_args().short
    torch.set_num_threads(1)
    print(machine())
    width = pipeline().unet.config.cross_attention_dim
    size = 64 if short else SIZE
    networks = partial(proportional, 8, size, LENGTH, width)
    folder, bare = save_with(networks(), Path(FOLDER.name, "pipeline")), BareLatents(networks(), size, BATCH)
    head("update of train.py over the bare loop's")
    pairs = beside_the_trainer(config_of("overhead", folder, size), bare.update, 1 if short else 20)
    row(
        f"{BATCH} latents of {bare.noisy.shape[-1]} x {bare.noisy.shape[-1]}", milliseconds(pairs), ratio(pairs), "1.03"
    )
    head("peak memory of updates")
    measure = partial(peak, folder=folder, size=size, short=short)
    encoded, random = measure("encoded", random=False), measure("random", random=True)
    row("encoded images over random latents", f"{encoded:.0f} : {random:.0f} MB", encoded / random, "1.02")
    head("encoding in the loop over encoded once, all cores")
    if not short:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    for what, divisor in (("LoRA", 1), ("all weights", 2)):
        compared = networks() if short else proportional(divisor, 512, 77, 768 // divisor)
        loop = BareLatents(compared, size if short else 512, 1, lora=what == "LoRA")
        pairs = in_turns(loop.encode_and_update, loop.update, 1 if short else 8)
        row(f"images/s gained, {what}", milliseconds(pairs), ratio(pairs), "at least 1.5")


if __name__ == "__main__":
    with FOLDER:
        main()
