"""What the trainer costs beside the bare compute of the network, and which kernels are worth having.

python tests/benchmarks/speed.py            # under three minutes on two CPU cores
python tests/benchmarks/speed.py --short    # a few updates: a smoke test
python tests/benchmarks/speed.py --compile  # torch.compile alone: it takes about two minutes to compile
"""

import copy
from functools import partial
from pathlib import Path
from statistics import median

from environment import FOLDER, ROOT, machine, parser

import torch
from bare import BareLoop, beside_the_trainer, in_turns, milliseconds, named, ratio, run_config, seconds, unet_config
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel
from table import head, row

from finetune.config.load import load_config
from finetune.config.updates import EMAConfig
from finetune.models.ema import make_ema
from finetune.models.load import load_kind
from finetune.training.compute import has_bf16
from harness.compare import history
from harness.configs import write_config
from harness.processes import start, start_two


def overhead(unet: dict, updates: int) -> None:
    head("update of train.py over the bare loop's")
    micro = {"training__micro_batch_size": 16, "training__gradient_accumulation_steps": 1}
    config = run_config("overhead", unet, 64, training__num_epochs=1000, data__num_workers=1, **micro)
    bare = BareLoop(UNet2DModel(**unet), 16)
    pairs = beside_the_trainer(config, bare.update, updates)
    row(f"{named(bare.unet)}, 16 images", milliseconds(pairs), ratio(pairs), "1.03")
    digits = [f"model.pretrained={ROOT / 'configs/digits-base'}", f"output_dir={FOLDER.name}/digits"]
    config = load_config(ROOT / "configs/digits.yaml", [*digits, "data.validation_fraction=0", "samples.count=0"])
    bare = BareLoop(load_kind(config.model, None, 0).network, 16, 4)
    pairs = beside_the_trainer(config, bare.update, updates)
    row("configs/digits.yaml, 4 x 16 images", milliseconds(pairs), ratio(pairs), "1.10")
    config = run_config("classes", unet, 64, "classes", training__num_epochs=1000, data__num_workers=1, **micro)
    bare = BareLoop(UNet2DModel(**unet, num_class_embeds=4), 16)
    pairs = beside_the_trainer(config, bare.update, updates)
    row(f"{named(bare.unet)}, 16 images, by class", milliseconds(pairs), ratio(pairs), "1.03")


def passes(unet: UNet2DModel, images: torch.Tensor, bf16: bool = False) -> None:
    """Forward and backward."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = unet(images, torch.zeros(len(images))).sample.float().square().mean()
    loss.backward()


def kernels(unet_options: dict, rounds: int) -> None:
    head("plain over optimised", "used", "ratio")
    unet = UNet2DModel(**unet_options)
    images = torch.randn(4, 3, unet.config.sample_size, unet.config.sample_size)
    plain, bf16 = partial(passes, unet, images), partial(passes, unet, images, bf16=True)
    has = has_bf16(images.device)
    pairs = in_turns(plain, bf16, max(rounds // 3, 1))
    row(f"bf16, {named(unet)}, 4 images", "by the launch" + ("" if has else "; no native bf16 here"), ratio(pairs))
    last = copy.deepcopy(unet).to(memory_format=torch.channels_last)
    channels_last = partial(passes, last, images.to(memory_format=torch.channels_last))
    row("channels-last, float32", "off", ratio(in_turns(plain, channels_last, rounds)))
    optimizers = [torch.optim.AdamW(unet.parameters(), lr=1e-9, fused=fused) for fused in (False, True)]
    row("fused AdamW", "on", ratio(in_turns(*(each.step for each in optimizers), 4 * rounds)))
    averages = [EMAModel(unet.parameters(), foreach=foreach) for foreach in (False, True)]
    plainly, foreach, ours = (
        partial(average.step, list(unet.parameters()))
        for average in (*averages, make_ema(list(unet.parameters()), EMAConfig()))
    )
    row("EMA, foreach", "no", ratio(in_turns(plainly, foreach, 4 * rounds)))
    row("EMA, foreach in one pass", "on", ratio(in_turns(plainly, ours, 4 * rounds)))


def compiled(unet_options: dict, backend: str, rounds: int) -> None:
    """The first pass, which compiles, has a row of its own."""
    head(f"plain over compiled by {backend}", "measured", "ratio")
    unet = UNet2DModel(**unet_options)
    images = torch.randn(16, 3, unet.config.sample_size, unet.config.sample_size)
    fast = partial(passes, torch.compile(copy.deepcopy(unet), backend=backend), images)
    plain = partial(passes, unet, images)
    row("the first pass", f"{seconds(fast):.0f} s")
    pairs = in_turns(plain, fast, rounds)
    row(f"{named(unet)}, 16 images", milliseconds(pairs), ratio(pairs))


def seconds_per_update(name: str, unet: dict, processes: int, steps: int, updates: int) -> float:
    """The median over a run's updates, without the first third."""
    config = run_config(
        name, unet, 64,
        training__micro_batch_size=8, training__gradient_accumulation_steps=steps, training__num_epochs=None,
        training__max_train_steps=updates, checkpoint__every_steps=1000,
    )  # fmt: skip
    file = write_config(Path(FOLDER.name, f"{name}.yaml"), config.model_dump(mode="json", exclude_defaults=True))
    begin = start_two if processes == 2 else lambda *arguments, **keywords: [start(*arguments, **keywords)]
    for outcome in [process.wait(300) for process in begin("--config", file, folder=Path(FOLDER.name, f"{name}-log"))]:
        assert outcome.returncode == 0, outcome.stderr[-2000:]
    lines = [line for line in history(Path(config.output_dir)) if "train/loss" in line]
    return median(
        sum(value for key, value in line.items() if key.startswith("time/")) for line in lines[updates // 3 :]
    )


def two_processes(unet: dict, updates: int) -> None:
    head("two processes of one thread each over one")
    for steps in (1, 4):
        one, two = (seconds_per_update(f"scale-{steps}-{count}", unet, count, steps, updates) for count in (1, 2))
        row(f"8 images a micro-batch, N = {steps}", f"{1000 * two:.0f} : {1000 * one:.0f} ms", two / one, "1.15")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--compile", action="store_true", help="only torch.compile beside the plain network")
    arguments = options.parse_args()
    short = arguments.short
    small, large = [unet_config((8, 16), 8)] * 2 if short else (unet_config(), unet_config((64, 128, 176)))
    torch.set_num_threads(1)
    print(machine())
    if arguments.compile:
        compiled(small, *(("aot_eager", 1) if short else ("inductor", 20)))  # the latter calls a C++ compiler
        return
    two_processes(small, 3 if short else 12)  # first, as autograd's threads would not survive the fork
    overhead(small, 1 if short else 30)
    kernels(large, 1 if short else 6)


if __name__ == "__main__":
    with FOLDER:
        main()
