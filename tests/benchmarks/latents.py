"""What training on encodings costs beside the bare compute, gains over encoding in the loop, and takes of memory.

    python tests/benchmarks/latents.py            # about two minutes on two CPU cores
    python tests/benchmarks/latents.py --short

VAE and UNet have the layers of Stable Diffusion 1.5 at an eighth of its width, and images of 128 instead of 512 pixels
a side: the proportions of their arithmetic are the same.
"""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

from environment import FOLDER, ROOT, machine, parser

import torch
from bare import beside_the_trainer, in_turns, milliseconds, ratio
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from table import head, row

from finetune.config.inputs import LoRAConfig
from finetune.config.schema import Config
from finetune.models.lora import add_adapters, draw_adapters
from harness.configs import tiny_config, write_config, write_pictures
from harness.pipelines import LENGTH, pipeline

WIDTHS, SIZE = (40, 80, 160, 160), 128
BATCH = 16


def save_proportional(folder: Path, short: bool) -> Path:
    """A pipeline with the proportions of Stable Diffusion 1.5, or a tiny one."""
    made = pipeline()
    if not short:
        torch.manual_seed(0)
        made.register_modules(
            vae=AutoencoderKL(
                in_channels=1,
                out_channels=1,
                block_out_channels=[width // 8 for width in (128, 256, 512, 512)],
                down_block_types=["DownEncoderBlock2D"] * 4,
                up_block_types=["UpDecoderBlock2D"] * 4,
                layers_per_block=2,
                latent_channels=4,
                norm_num_groups=8,
            ),
            unet=UNet2DConditionModel(
                sample_size=SIZE // 8,
                block_out_channels=WIDTHS,
                cross_attention_dim=8,
                attention_head_dim=8,
                norm_num_groups=8,
            ),
        )
    made.save_pretrained(folder)
    return folder


class BareLatents:
    """Updates on one encoded batch in memory, with the optimizer and the average of train.py."""

    def __init__(self, folder: Path, lora: bool = False):
        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet").train()
        if lora:
            add_adapters(self.unet, LoRAConfig(rank=4))
            draw_adapters(self.unet, 0)
        trained = [weight for weight in self.unet.parameters() if weight.requires_grad]
        self.vae = AutoencoderKL.from_pretrained(folder / "vae").requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
        self.trained, self.ema = trained, EMAModel(trained, foreach=True)
        side = self.unet.config.sample_size
        pixels = side * 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.images = torch.rand(BATCH, 1, pixels, pixels)
        self.noisy, self.noise = torch.randn(2, BATCH, 4, side, side)
        self.text, self.timesteps = torch.randn(BATCH, LENGTH, 8), torch.randint(0, 100, (BATCH,))

    def update(self) -> None:
        prediction = self.unet(self.noisy, self.timesteps, self.text).sample
        torch.nn.functional.mse_loss(prediction, self.noise).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.trained)

    @torch.no_grad()
    def encode(self) -> None:
        self.vae.encode(self.images).latent_dist.sample()

    def encode_and_update(self) -> None:
        self.encode()
        self.update()


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

    def conditions(batches, slots):
        return {{name: torch.randn(len(slots), *shape) for name, shape in batches.embeddings.fields.items()}}

    encoded_batches.EncodedBatches.content, encoded_batches.EncodedBatches.conditions = content, conditions
    encodings.Encodings.make = lambda self, accelerator, images=None: None
    encodings.Prompts.__getitem__ = lambda self, text: {{n: torch.zeros(s) for n, s in self.embeddings.fields.items()}}
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


def peak(name: str, folder: Path, size: int, updates: int, random: bool) -> float:
    """MB at the peak of the updates of a run in a process of its own."""
    config = config_of(name, folder, size, logging__tracker=None, data__num_workers=0)
    values = config.model_dump(mode="json", exclude_defaults=True)
    values["training"]["max_train_steps"] = updates
    file = write_config(Path(FOLDER.name, f"{name}.yaml"), values)
    out = Path(FOLDER.name, f"{name}.json")
    code = WATCH.format(root=str(ROOT), random=random, out=str(out), config=str(file))
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(out.read_text()) / 1e6


def main() -> None:
    short = parser(__doc__).parse_args().short
    torch.set_num_threads(1)
    print(machine())
    folder, size = save_proportional(Path(FOLDER.name, "pipeline"), short), 8 if short else SIZE
    bare = BareLatents(folder)
    head("update of train.py over the bare loop's")
    pairs = beside_the_trainer(config_of("overhead", folder, size), bare.update, 1 if short else 20)
    row(
        f"{BATCH} latents of {bare.noisy.shape[-1]} x {bare.noisy.shape[-1]}", milliseconds(pairs), ratio(pairs), "1.03"
    )
    head("encoding in the loop over encoded once")
    for what, loop in (("LoRA", BareLatents(folder, lora=True)), ("all weights", bare)):
        pairs = in_turns(loop.encode_and_update, loop.update, 1 if short else 10)
        row(f"images/s gained, {what}", milliseconds(pairs), ratio(pairs), "at least 1.5")
    head("peak memory of updates")
    measure = partial(peak, folder=folder, size=size, updates=4 if short else 10)
    encoded, random = measure("encoded", random=False), measure("random", random=True)
    row("encoded images over random latents", f"{encoded:.0f} : {random:.0f} MB", encoded / random, "1.02")


if __name__ == "__main__":
    with FOLDER:
        main()
