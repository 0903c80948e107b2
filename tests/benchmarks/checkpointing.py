"""What a save costs beside a plain write of the same bytes, or in parts, and how soon a run trains, fresh or resumed.

python tests/benchmarks/checkpointing.py            # under three minutes on two CPU cores
python tests/benchmarks/checkpointing.py --short    # the smallest sizes: a smoke test
"""

import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

from environment import FOLDER, ROOT, machine, parser

import torch
from bare import ratio, run_config, seconds, unet_config
from table import head, row

from finetune.run import checkpoint
from harness.configs import write_config
from harness.faults import skip_the_export
from harness.in_process import train_here
from harness.processes import finish, run_two, start_several

DIGITS = ["--config", "configs/digits.yaml", "validation.every_steps=100000", "samples.count=0", "data.num_workers=0"]
DIGITS += ["data.validation_fraction=0"]
IMPORTS = """
import accelerate, datasets, torch
from diffusers import DDPMScheduler, UNet2DModel
UNet2DModel.from_pretrained("configs/digits-base", subfolder="unet")
"""


def plain_write(source: Path, target: Path) -> float:
    """Seconds to write and sync a folder's bytes, one file after the other."""
    contents = {file.name: file.read_bytes() for file in source.iterdir()}
    target.mkdir()

    def write() -> None:
        for name, content in contents.items():
            with open(target / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())

    spent = seconds(write)
    shutil.rmtree(target)
    return spent


def saving(unet: dict, rounds: int) -> None:
    found, sizes, save = [], [], checkpoint.save

    def taking_turns(accelerator, output_dir, *arguments) -> Path:
        started = time.perf_counter()
        folder = save(accelerator, output_dir, *arguments)
        spent = time.perf_counter() - started
        sizes.append(sum(file.stat().st_size for file in folder.iterdir()))
        found.append((spent, plain_write(folder, output_dir / "plain")))
        return folder

    checkpoint.save = taking_turns
    config = run_config(
        "saving", unet, 8, training__micro_batch_size=1, training__gradient_accumulation_steps=1,
        training__num_epochs=None, training__max_train_steps=rounds + 1, checkpoint__every_steps=1,
    )  # fmt: skip
    train_here(config)
    checkpoint.save = save
    save_seconds, plain_seconds = (median(times) for times in zip(*found[1:], strict=True))
    size = f"{sizes[0] / 1e6:.0f} MB: {save_seconds:.2f} : {plain_seconds:.2f} s"
    row("a save over a plain write and sync", size, ratio(found[1:]), "1.5")
    row("saves at the default interval, updates of 0.4 s", f"{100 * save_seconds / (500 * 0.4):.2f} %", None, "1 %")


def saving_in_parts(short: bool) -> None:
    """Two processes that each write their part, against the first of two writing everything."""
    head("saves of two processes")
    (unet, rounds), found = saved(short), {}
    for shard in ("true", "false"):
        config = run_config(
            f"saves-{shard}", unet, 8, training__micro_batch_size=1, training__gradient_accumulation_steps=1,
            training__num_epochs=None, training__max_train_steps=rounds + 1, checkpoint__every_steps=1,
        )  # fmt: skip
        file = write_config(Path(FOLDER.name, f"saves-{shard}.yaml"), config.model_dump(mode="json"))
        times = Path(FOLDER.name, f"times-{shard}")
        arguments = ("--config", file, f"training.shard={shard}")
        outcomes = run_two(*arguments, folder=Path(FOLDER.name, "log"), before=partial(noting_saves, times))
        assert [outcome.returncode for outcome in outcomes] == [0, 0], outcomes[0].stderr[-3000:]
        spent = [float(line) for line in times.read_text().split()][1:]
        folder = Path(config.output_dir, f"checkpoint-{rounds + 1}")
        found[shard] = median(spent), sum(each.stat().st_size for each in folder.iterdir())
    (parts, size), (whole, _) = found["true"], found["false"]
    row(
        "a save in two parts over one by one process",
        f"{size / 1e6:.0f} MB: {parts:.2f} : {whole:.2f} s",
        parts / whole,
    )


def noting_saves(times: Path, process: int) -> None:
    """The first process appends the seconds of each of its saves to a file."""
    skip_the_export()
    save = checkpoint.save

    def timed(*arguments) -> Path:
        started = time.perf_counter()
        folder = save(*arguments)
        if process == 0:
            with times.open("a") as file:
                file.write(f"{time.perf_counter() - started}\n")
        return folder

    checkpoint.save = timed


def first_update(output_dir: Path, short: bool) -> float:
    """Seconds from the command to the first logged update of this start, in an interpreter of its own; in a fork in the
    short form."""
    file, started = output_dir / "metrics.jsonl", time.perf_counter()
    lines = len(file.read_text().splitlines()) if file.exists() else 0
    command = [*DIGITS, f"output_dir={output_dir}", "training.max_train_steps=1000"]
    (process,) = start_several(1, *command, folder=Path(FOLDER.name, "log"), fresh=not short)
    while not file.exists() or len(file.read_text().splitlines()) <= lines:
        assert process.poll() is None, f"{command} ended with {process.poll()}"
        time.sleep(0.01)
    spent = time.perf_counter() - started
    process.end()
    return spent


def starting(rounds: int, saved_step: int, short: bool) -> None:
    base = Path(FOLDER.name, "base")
    length = f"training.max_train_steps={saved_step}"
    finish(*DIGITS, f"output_dir={base}", length, "checkpoint.every_steps=1000", folder=Path(FOLDER.name, "base-log"))
    fresh, resumed = [], []
    for number in range(rounds):
        bare = seconds(lambda: subprocess.run([sys.executable, "-c", IMPORTS], check=True, capture_output=True))
        start = first_update(Path(FOLDER.name, f"fresh-{number}"), short)
        again = Path(shutil.copytree(base, Path(FOLDER.name, f"resumed-{number}")))
        fresh.append((start, bare))
        resumed.append((first_update(again, short), start))
    times = [median(column) for column in zip(*fresh, strict=True)]
    seconds_each = f"{times[0]:.1f} : {times[1]:.1f} s"
    row("command to first update over bare imports and model", seconds_each, ratio(fresh), "1.3")
    row(f"resumed at update {saved_step} over fresh", f"{median(t for t, _ in resumed):.1f} s", ratio(resumed), "1.1")


def saved(short: bool) -> tuple[dict, int]:
    """A network, and how often it is saved."""
    return unet_config((8, 16), 8) if short else unet_config((64, 128, 176), 8), 1 if short else 8


def main() -> None:
    short = parser(__doc__).parse_args().short
    torch.set_num_threads(1)
    print(machine())
    os.chdir(ROOT)  # configs/digits.yaml names its base relative to it
    saving_in_parts(short)
    head("saving and starting")
    starting(*((1, 1) if short else (5, 60)), short)
    saving(*saved(short))


if __name__ == "__main__":
    with FOLDER:
        main()
