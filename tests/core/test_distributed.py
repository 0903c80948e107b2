"""What the main process makes for all processes of a launch."""

import argparse
import json
import shutil
import socket

import datasets
import datasets.table
import pytest

from finetune.data import loading, tables
from finetune.models import hub, unconditional
from finetune.run import plan
from harness.compare import differing
from harness.configs import picture, tiny_config, write_config, write_pictures
from harness.faults import limit_images, skip_the_export
from harness.processes import run_two

pytestmark = pytest.mark.slow


@pytest.fixture
def config(tmp_path):
    training = {"micro_batch_size": 4, "global_batch_size": 8, "max_train_steps": 2}
    options = {"training": training, "logging__tracker": "tensorboard"}  # whose curves are compared
    config = tiny_config(write_pictures(tmp_path / "pictures", 16), tmp_path / "run", **options)
    return write_config(tmp_path / "config.yaml", config)


def logged(owner, name, log):
    """From here on each call of a function is a line in a file."""
    function = getattr(owner, name)

    def logging(*arguments, **keywords):
        with open(log, "a") as file:
            print(json.dumps(str(arguments[0])), file=file)
        return function(*arguments, **keywords)

    setattr(owner, name, logging)


def test_the_main_process_alone_looks_at_the_pictures(config, tmp_path):
    def before(process):
        skip_the_export()
        logged(tables, "_state", tmp_path / f"looked-at-{process}")

    outcomes = run_two("--config", config, folder=tmp_path, before=before)
    assert [outcome.returncode for outcome in outcomes] == [0, 0], outcomes
    looked_at = (tmp_path / "looked-at-0").read_text().splitlines()
    assert len(looked_at) == len({*looked_at}) == 16
    assert not (tmp_path / "looked-at-1").exists()


@pytest.mark.parametrize(
    ("second", "problem"),
    [
        (
            ["training.num_epochs=3"],
            "overrides ['training.num_epochs=3'] on process 1 (HOST), and [] on process 0 (HOST)",
        ),
        (["--check"], "check True on process 1 (HOST), and False on process 0 (HOST)"),
        (
            ["--config", "nowhere/other.yaml"],
            "config other.yaml on process 1 (HOST), and config.yaml on process 0 (HOST)",
        ),
    ],
    ids=["overrides", "flags", "config"],
)
def test_two_hosts_with_different_commands_are_refused(config, tmp_path, second, problem):
    """Otherwise the second host's command would be ignored, or leave the first host waiting."""

    def before(process):
        if process == 1:  # as another host's command line
            parse = argparse.ArgumentParser.parse_intermixed_args
            words = ["--config", str(config), *second]
            argparse.ArgumentParser.parse_intermixed_args = lambda self: parse(self, words)

    main, other = run_two("--config", config, folder=tmp_path, before=before)
    assert (main.returncode, other.returncode) == (2, 2)
    problem = problem.replace("HOST", socket.gethostname())
    assert main.error == f"launch: found {problem}; expected the same command for all processes"
    assert other.errors == []
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "environment", "problem"),
    [
        (["training.global_batch_size=12"], {}, "training: found global_batch_size 12"),
        ([], {"ACCELERATE_MIXED_PRECISION": "fp16"}, "launch: "),
        ([], {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "3"}, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS: found 3"),
        (["logging.tracker=wandb"], {}, "logging.tracker: wandb is not installed"),
        (["data.source=/nowhere"], {}, "data.source: found nothing at /nowhere"),
        (["samples.inference_steps=101"], {}, "samples.inference_steps: found 101"),
        (["training.micro_batch_size=auto"], {}, "training.micro_batch_size: auto: not even single images fit"),
        (["--check"], {}, "training.micro_batch_size: a trial update with 4 does not fit"),
        (["lr_scheduler.name=polynomial", "lr_scheduler.warmup_steps=500"], {}, "lr_scheduler.warmup_steps: found 500"),
        (["output_dir=/proc/run"], {}, "output_dir: /proc/run"),
    ],
    ids=[
        *("batch", "precision", "environment", "tracker", "source", "samples", "auto", "memory", "schedule", "folder")
    ],
)
def test_a_mistake_is_printed_once_and_ends_all_processes(config, tmp_path, words, environment, problem):
    """Wherever it is found: by the main process, by each of them, or by those whose memory is too small."""

    def before(process):
        if "micro_batch_size" in problem:
            limit_images(lambda count: True)

    outcomes = run_two("--config", config, *words, folder=tmp_path, before=before, **environment)
    assert [outcome.returncode for outcome in outcomes] == [2, 2], outcomes
    assert outcomes[0].error.startswith(problem)
    assert outcomes[1].stderr == ""


@pytest.mark.parametrize("shard", [False, True])
def test_an_upload_that_fails_is_printed_once_and_ends_all_processes(config, tmp_path, shard):
    """The main process alone uploads, and the others wait for it, of a sharded run with the weights gathered."""

    def before(process):
        def refuse(*arguments, **options):
            raise ConnectionError("no route to the hub")

        hub.create_repo = refuse

    words = ("export.push_to_hub=somebody/digits", f"training.shard={shard}".lower())
    main, other = run_two("--config", config, *words, folder=tmp_path, before=before)
    assert (main.returncode, other.returncode) == (1, 1), (main, other)
    assert main.error.startswith("export.push_to_hub: somebody/digits: the upload of ")
    assert other.stderr == ""
    assert (tmp_path / "run/pipeline/README.md").exists()


def test_the_plan_is_made_by_the_main_process_alone(config, tmp_path):
    """It goes through all captions of a data set."""

    def before(process):
        make = plan.data_notes
        plan.data_notes = lambda *data: (tmp_path / f"made-by-{process}").touch() or make(*data)

    outcomes = run_two("--config", config, "--check", folder=tmp_path, before=before)
    assert [outcome.returncode for outcome in outcomes] == [0, 0], outcomes
    assert [file.name for file in tmp_path.glob("made-by-*")] == ["made-by-0"]


def test_hosts_may_keep_the_config_in_folders_of_their_own(config, tmp_path):
    def before(process):
        skip_the_export()
        if process == 1:
            parse = argparse.ArgumentParser.parse_intermixed_args
            argparse.ArgumentParser.parse_intermixed_args = lambda self: parse(
                self, ["--config", "of/mine/config.yaml"]
            )

    outcomes = run_two("--config", config, folder=tmp_path, before=before)
    assert [outcome.returncode for outcome in outcomes] == [0, 0], outcomes


def test_a_host_with_a_cache_of_its_own_decodes_for_itself(config, tmp_path):
    """The second process has another cache, and none of the first one's files."""

    def before(process):
        skip_the_export()
        logged(loading, "_load", tmp_path / f"loaded-{process}")
        own = tmp_path / f"cache-{process}"
        datasets.config.HF_DATASETS_CACHE, name = own, "_memory_mapped_arrow_table_from_file"
        read = getattr(datasets.table, name)

        def read_own(file):
            if str(own) not in str(file):
                raise FileNotFoundError(file)
            return read(file)

        setattr(datasets.table, name, read_own)

    outcomes = run_two("--config", config, folder=tmp_path, before=before)
    assert [outcome.returncode for outcome in outcomes] == [0, 0], outcomes
    assert [len((tmp_path / f"loaded-{process}").read_text().splitlines()) for process in range(2)] == [1, 1]
    assert all(list((tmp_path / f"cache-{process}/pixels").glob("*/*.arrow")) for process in range(2))
    arguments = ("--config", config, f"output_dir={tmp_path / 'shared'}")
    again = run_two(*arguments, folder=tmp_path, before=lambda process: skip_the_export())
    assert [outcome.returncode for outcome in again] == [0, 0], again
    assert differing(tmp_path / "run", tmp_path / "shared", 2) == []


@pytest.mark.parametrize("difference", ["changed", "missing", "another name"])
def test_a_host_with_other_pictures_is_named(config, tmp_path, difference):
    """Its folder is a copy of its own, which somebody changed; nothing is trained on a mixture."""

    def before(process):
        if process == 0:
            return
        datasets.config.HF_DATASETS_CACHE, open_source = tmp_path / "cache", loading.open_source

        def of_this_host(source, *arguments):
            own = tmp_path / "own"
            if not own.exists():
                shutil.copytree(source, own)
                if difference == "changed":
                    picture((8, 8), 77).save(own / "0003.png")
                elif difference == "missing":
                    (own / "0003.png").unlink()
                else:
                    (own / "0003.png").rename(own / "9999.png")
            return open_source(str(own), *arguments)

        loading.open_source, datasets.table._memory_mapped_arrow_table_from_file = of_this_host, unreadable

    read = datasets.table._memory_mapped_arrow_table_from_file

    def unreadable(file):
        if str(tmp_path / "cache") not in str(file):
            raise FileNotFoundError(file)
        return read(file)

    main, other = run_two("--config", config, folder=tmp_path, before=before)
    assert (main.returncode, other.returncode) == (2, 2), (main, other)
    host, count = socket.gethostname(), 15 if difference == "missing" else 16
    assert main.error == (
        f"data.source: {tmp_path / 'pictures'}: found other images on process 1 ({host}), {count} of them, than "
        f"on process 0 ({host}), 16; expected the same files under the same names on every host"
    )
    assert other.errors == []
    assert not (tmp_path / "run").exists()


def test_a_host_with_another_model_is_named(config, tmp_path):
    """Its folder has another network's config, text encoder or base of adapters; the weights alone may differ, since
    those of the main process count."""

    def before(process):
        if process == 1:
            own = unconditional.Unconditional.identity
            unconditional.Unconditional.identity = lambda kind: own(kind) | {"encoders": {"vae": "of this host"}}

    main, other = run_two("--config", config, folder=tmp_path, before=before)
    assert (main.returncode, other.returncode) == (2, 2), (main, other)
    host = socket.gethostname()
    assert main.error == (
        f"model: found other files on process 1 ({host}) than on process 0 ({host}), which differ in encoders; "
        "expected the same model and images on every host"
    )
    assert other.errors == []
    assert not (tmp_path / "run").exists()
