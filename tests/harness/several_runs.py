"""train.main on several configs, one after another in the same processes, keeping what each image went through.

    accelerate launch tests/harness/several_runs.py [CONFIG ...] [--bf16 CONFIG ...] [--float64 CONFIG ...]

Beside each run's metrics a file `slots-<process>.jsonl` holds, for every slot that is not padding, the image, its
position and a digest of its pixels (cropped and flipped), noise, timestep and condition. The export of a finished run
is skipped.
"""

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
if __name__ == "__main__":
    from finetune.core.launcher import prepare_for_imports

    prepare_for_imports()

import torch  # noqa: E402 - as in train.py


def run_configs(processes: int, files: dict[str, list[Path]], folder: Path, **environment: str) -> None:
    """This script on forked processes, to its end.

    Args:
        files: configs by the precision that they are run in: "float32", "bf16" and "float64", or some of these.
        folder: takes what is printed.
    """
    from harness.processes import run_several

    arguments = [*files["float32"]]
    arguments += [word for name in ("bf16", "float64") if files.get(name) for word in (f"--{name}", *files[name])]
    script = "tests/harness/several_runs.py"
    outcomes = run_several(processes, *arguments, folder=folder, script=script, seconds=1200, **environment)
    assert [outcome.returncode for outcome in outcomes] == [0] * processes, outcomes[0].stderr[-3000:]


def run(files: list[str]) -> None:
    import train
    from finetune.config.load import load_config
    from finetune.data.batches import Batches
    from harness.faults import skip_the_export
    from harness.flops import remember_flops
    from harness.processes import forget_processes

    skip_the_export()
    remember_flops()
    read = Batches.__getitems__
    for file in files:
        config = load_config(file)
        forget_processes()
        torch._dynamo.reset()  # or what is compiled again and again is not compiled at all after a few runs
        kept = []

        def reading(batches, slots, kept=kept):
            batch = read(batches, slots)
            for place, slot in enumerate(slots):
                if slot.weight > 0:
                    parts = [batch[name][place].numpy().tobytes() for name in sorted({*batch} - {"weights"})]
                    digest = hashlib.blake2b(b"".join(parts), digest_size=8).hexdigest()
                    kept.append([slot.epoch, slot.position, int(slot.image), digest])
            return batch

        Batches.__getitems__ = reading
        try:
            train.main(config)
        finally:
            Batches.__getitems__ = read
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        Path(config.output_dir, f"slots-{rank}.jsonl").write_text("".join(json.dumps(slot) + "\n" for slot in kept))
    forget_processes()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--bf16", nargs="+", default=[], metavar="CONFIG", help="configs to run in bf16")
    parser.add_argument("--float64", nargs="+", default=[], metavar="CONFIG", help="configs to run in float64")
    parser.add_argument("files", nargs="*", metavar="CONFIG")
    arguments = parser.parse_args()
    from finetune.core.failures import exit_code

    def run_all() -> int:
        run(arguments.files)
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"  # as `accelerate launch --mixed_precision bf16` does
        run(arguments.bf16)
        os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
        torch.set_default_dtype(torch.float64)  # before anything is built
        run(arguments.float64)
        return 0

    sys.exit(exit_code(run_all))
