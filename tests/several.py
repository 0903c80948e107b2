"""train.py on several configs, one after another in the same processes, keeping what each image went through.

    accelerate launch tests/several.py [CONFIG ...] [--float64 CONFIG ...] [--stop-after UPDATES]

Beside each run's metrics a file `slots-<process>.jsonl` tells, for every slot that is no padding, the image, its
position and a digest of its pixels (cropped and flipped), noise and timestep. What a finished run shows (pipeline, loss
curve) is left out: it takes as long as the training here.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def run(files: list[str], stop_after: int | None) -> None:
    import train
    from finetune.config import load_config
    from tiny import forget_processes, leave_out_the_export, stop_after_updates

    leave_out_the_export()
    read = train.Batches.__getitems__
    for file in files:
        config = load_config(file)
        forget_processes()
        kept = []

        def reading(batches, slots, kept=kept):
            batch = read(batches, slots)
            for place, slot in enumerate(slots):
                if slot.weight > 0:
                    parts = [batch[name][place].numpy().tobytes() for name in ("images", "noise", "timesteps")]
                    digest = hashlib.blake2b(b"".join(parts), digest_size=8).hexdigest()
                    kept.append([slot.epoch, slot.position, int(batch["image_ids"][place]), digest])
            return batch

        train.Batches.__getitems__ = reading
        if stop_after is not None:
            stop_after_updates(stop_after)
        try:
            train.main(config)
        finally:
            train.Batches.__getitems__ = read
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        Path(config.output_dir, f"slots-{rank}.jsonl").write_text("".join(json.dumps(slot) + "\n" for slot in kept))
    forget_processes()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--float64", nargs="+", default=[], metavar="CONFIG", help="configs to run in float64")
    parser.add_argument("--stop-after", type=int, metavar="UPDATES", help="end each run as a signal would")
    parser.add_argument("files", nargs="*", metavar="CONFIG")
    arguments = parser.parse_args()
    from finetune.launch import exit_code

    def run_all() -> int:
        run(arguments.files, arguments.stop_after)
        torch.set_default_dtype(torch.float64)  # before anything is built
        run(arguments.float64, arguments.stop_after)
        return 0

    sys.exit(exit_code(run_all))
