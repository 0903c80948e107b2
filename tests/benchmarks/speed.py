"""What the trainer costs beside the bare compute of the network, and which kernels are worth having.

python tests/benchmarks/speed.py            # under three minutes on two CPU cores
python tests/benchmarks/speed.py --short    # a few updates: does it run
python tests/benchmarks/speed.py --compile  # torch.compile alone: it takes about two minutes to compile
"""

import argparse
import copy
from functools import partial
from pathlib import Path
from statistics import median

import torch
from bare import (
    FOLDER,
    ROOT,
    BareLoop,
    beside_the_trainer,
    head,
    in_turns,
    ratio,
    row,
    run_config,
    seconds,
    unet_config,
)
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel

from finetune.compute import has_bf16
from finetune.config import load_config
from finetune.model import load_model
from tiny import history, launch, write_config


def milliseconds(pairs: list[tuple[float, float]]) -> str:
    """The medians of both."""
    return " : ".join(f"{1000 * median(times):.0f}" for times in zip(*pairs, strict=True)) + " ms"


def overhead(updates: int) -> None:
    head("update of train.main over the bare loop's")
    unet = unet_config()
    micro = {"training__micro_batch_size": 16, "training__gradient_accumulation_steps": 1}
    config = run_config("overhead", unet, 64, training__num_epochs=1000, data__num_workers=1, **micro)
    pairs = beside_the_trainer(config, BareLoop(UNet2DModel(**unet), 16).update, updates)
    row("UNet of 1.1 M at 32 px, 16 images", milliseconds(pairs), ratio(pairs), "1.03")
    digits = [f"model.pretrained={ROOT / 'configs/digits-base'}", f"output_dir={FOLDER.name}/digits"]
    config = load_config(ROOT / "configs/digits.yaml", [*digits, "data.validation_fraction=0", "samples.count=0"])
    bare = BareLoop(load_model(config.model, None, 0)[0], 16, 4)
    pairs = beside_the_trainer(config, bare.update, updates)
    row("configs/digits.yaml, 4 x 16 images", milliseconds(pairs), ratio(pairs), "1.10")


def passes(unet: UNet2DModel, images: torch.Tensor, bf16: bool = False) -> None:
    """Forward and backward."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = unet(images, torch.zeros(len(images))).sample.float().square().mean()
    loss.backward()


def kernels(rounds: int) -> None:
    head("plain over the other")
    unet = UNet2DModel(**unet_config((64, 128, 176)))
    images = torch.randn(4, 3, 32, 32)
    plain, bf16 = partial(passes, unet, images), partial(passes, unet, images, bf16=True)
    has = has_bf16(images.device)
    row("bf16, UNet of 6.5 M, 4 images", "by the launch" + ("" if has else "; no unit for it in this CPU"),
        ratio(in_turns(plain, bf16, max(rounds // 3, 1))), "1.3")  # fmt: skip
    last = copy.deepcopy(unet).to(memory_format=torch.channels_last)
    channels_last = partial(passes, last, images.to(memory_format=torch.channels_last))
    row("channels-last, float32", "off", ratio(in_turns(plain, channels_last, rounds)))
    optimizers = [torch.optim.AdamW(unet.parameters(), lr=1e-9, fused=fused) for fused in (False, True)]
    row("fused AdamW", "on", ratio(in_turns(*(each.step for each in optimizers), 4 * rounds)))
    averages = [EMAModel(unet.parameters(), foreach=foreach) for foreach in (False, True)]
    steps = [partial(average.step, list(unet.parameters())) for average in averages]
    row("foreach EMA", "on", ratio(in_turns(*steps, 4 * rounds)))


def compiled(backend: str, rounds: int) -> None:
    """The first pass, which compiles, stands in a row of its own."""
    head(f"plain over compiled by {backend}")
    unet, images = UNet2DModel(**unet_config()), torch.randn(16, 3, 32, 32)
    fast = partial(passes, torch.compile(copy.deepcopy(unet), backend=backend), images)
    plain = partial(passes, unet, images)
    row("the first pass", f"{seconds(fast):.0f} s")
    pairs = in_turns(plain, fast, rounds)
    row("UNet of 1.1 M at 32 px, 16 images", f"{milliseconds(pairs)}; by the launch", ratio(pairs))


def seconds_per_update(name: str, processes: int, steps: int, updates: int) -> float:
    """The fastest update of a launched run: what else the machine does only ever adds to one."""
    config = run_config(
        name, unet_config(), 64,
        training__micro_batch_size=8, training__gradient_accumulation_steps=steps, training__num_epochs=None,
        training__max_train_steps=updates, checkpoint__every_steps=1000,
    )  # fmt: skip
    file = write_config(Path(FOLDER.name, f"{name}.yaml"), config.model_dump(mode="json", exclude_defaults=True))
    outcome = launch("--config", file, processes=processes)
    assert outcome.returncode == 0, outcome.stderr[-2000:]
    lines = [line for line in history(Path(config.output_dir)) if "train/loss" in line]
    return median(
        sum(value for key, value in line.items() if key.startswith("time/")) for line in lines[updates // 3 :]
    )


def two_processes(updates: int) -> None:
    head("two processes of one thread each over one")
    for steps in (1, 4):
        one, two = (seconds_per_update(f"scale-{steps}-{count}", count, steps, updates) for count in (1, 2))
        row(f"8 images a micro-batch, N = {steps}", f"{1000 * two:.0f} : {1000 * one:.0f} ms", two / one, "1.15")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="a few updates, to see that it runs")
    parser.add_argument("--compile", action="store_true", help="torch.compile beside the plain network, nothing else")
    arguments = parser.parse_args()
    short = arguments.short
    torch.set_num_threads(1)
    if arguments.compile:
        compiled(*(("aot_eager", 1) if short else ("inductor", 20)))  # the latter calls a C++ compiler
        return
    overhead(2 if short else 30)
    kernels(1 if short else 6)
    two_processes(3 if short else 12)


if __name__ == "__main__":
    with FOLDER:
        main()
