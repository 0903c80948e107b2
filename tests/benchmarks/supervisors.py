"""What a signal does to each command that starts a run, where a supervisor kills what is left when it has ended.

python tests/benchmarks/supervisors.py             # about eight minutes on two CPU cores
python tests/benchmarks/supervisors.py --only two  # the rows whose command's name has this word
"""

import os
import signal
from pathlib import Path

from environment import FOLDER, parser

from table import head, row

from harness.compare import valid_checkpoints
from harness.configs import tiny_config, write_config, write_pictures
from harness.supervisors import DOCKER, ONE, PATIENT, PYTHON, SYSTEMD, TWO, Job, Supervisor

COMMANDS = {
    "python train.py": (PYTHON, {}),
    "accelerate launch, one process": (ONE, {}),
    "accelerate launch, two processes": (TWO, {}),
    "the same with PET_SIGNALS_TO_HANDLE": (TWO, PATIENT),
}
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def result(job: Job, supervisor: Supervisor, number: signal.Signals) -> str:
    outcome, seconds = job.end(supervisor, number)
    try:
        saved = valid_checkpoints(job.output_dir)
    except AssertionError:  # killed while it saved
        saved = []
    what = "saved" if saved else "nothing saved"
    return f"{what}, exit code {outcome.returncode}, {seconds:.1f} s"


def main(only: str, short: bool) -> None:
    base = Path(FOLDER.name)
    config = tiny_config(
        write_pictures(base / "pictures", 16),
        base / "run",
        data__num_workers=1,
        training={"micro_batch_size": 4, "global_batch_size": 8, "max_train_steps": 1_000_000},
    )
    file = write_config(base / "config.yaml", config)
    head("command", "signal", "to all processes", "to the first one alone")
    for name in [name for name in COMMANDS if only in name][: 1 if short else None]:
        command, environment = COMMANDS[name]
        for number in SIGNALS[: 1 if short else None]:
            cells = []
            for supervisor in (SYSTEMD, DOCKER):
                output_dir = base / f"run-{os.urandom(4).hex()}"
                job = Job(*command, "--config", file, output_dir=output_dir, **environment)
                cells.append(result(job, supervisor, number))
            row(name, number.name, *cells)


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("--only", default="", metavar="WORD", help="of the commands' names")
    parsed = arguments.parse_args()
    main(parsed.only, parsed.short)
