"""`training.shard`: the same run in parts, saved and resumed by any number of processes, exported as one."""

import json
import shutil
import signal

import pytest
import torch
from diffusers import DDPMPipeline, UNet2DConditionModel, UNet2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from finetune.run import checkpoint, manifest, shards
from harness.checkpoints import empty, flip_a_bit, parts, remove, truncate
from harness.compare import differences, differing, history, moments, run_state, unequal, valid_checkpoints, weights
from harness.configs import (
    EVALUATED_STEPS,
    evaluated_config,
    of_kind,
    tiny_config,
    write_config,
    write_pictures,
)
from harness.faults import at_call, kill_at, limit_file_size, skip_the_export, stop_after_updates
from harness.processes import run, run_two, start_several
from harness.shapes import SHAPES, write_shapes

STEPS = 6  # 19 images in windows of 8: 8 + 8 + 3, twice
SIZES = {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "num_epochs": 2, "shard": True}
FILES = [f"shard-0000{process}-model-00001-of-00001.safetensors" for process in (1, 2)]


def config_of(base, **changes):
    options = {"lr_scheduler": {"name": "cosine", "warmup_steps": 2}, "training": SIZES}
    options["logging__tracker"] = "tensorboard"
    return tiny_config(write_pictures(base / "pictures", 19), base / "run", **options | changes)


def in_float64(*_):
    skip_the_export()
    torch.set_default_dtype(torch.float64)


def finish_two(*arguments, folder, before=lambda process: skip_the_export()):
    outcomes = run_two(*arguments, folder=folder, before=before)
    assert [outcome.returncode for outcome in outcomes] == [0, 0], outcomes[0].stderr[-3000:] + outcomes[1].stderr
    return outcomes


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A config, and an undisturbed run of it by two processes."""
    base = tmp_path_factory.mktemp("sharded")
    finish_two("--config", write_config(base / "config.yaml", config_of(base)), folder=base)
    return base


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """The same in float64."""
    base = tmp_path_factory.mktemp("exact")
    finish_two("--config", write_config(base / "config.yaml", config_of(base)), folder=base, before=in_float64)
    return base


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """An undisturbed run with all that happens between updates, and its export."""
    base = tmp_path_factory.mktemp("evaluated")
    config = evaluated_config(write_pictures(base / "pictures", 19), base / "run", training=SIZES)
    finish_two("--config", write_config(base / "config.yaml", config), folder=base, before=lambda process: None)
    return base


def stopping(updates):
    def before(process):
        skip_the_export()
        stop_after_updates(updates)

    return before


@pytest.mark.slow
def test_a_process_holds_and_writes_half(base):
    folder = base / f"run/checkpoint-{STEPS}"
    assert sorted(file.name for file in folder.iterdir()) == ["manifest.json", "run_state.json", *FILES]
    first, second = ((folder / name).stat().st_size for name in FILES)
    assert 0.8 < first / second < 1.25
    # conv_out has one row, which the first process holds: the other's part of it is empty.
    rows = {tuple(place): len(part) for place, part in parts(folder)["model.conv_out.weight"]}
    assert rows == {(0, 0, 0, 0): 1, (1, 0, 0, 0): 0}


@pytest.mark.slow
def test_a_stopped_run_resumes_bit_exactly(base, tmp_path):
    arguments = ("--config", base / "config.yaml", f"output_dir={tmp_path / 'run'}")
    for updates in (1, 3):
        stopped = run_two(*arguments, folder=tmp_path, before=stopping(updates))
        assert [outcome.returncode for outcome in stopped] == [143, 143], stopped
    resumed, _ = finish_two(*arguments, folder=tmp_path)
    assert f"Resuming from {tmp_path / 'run/checkpoint-4'}: step 4 of {STEPS}." in resumed.stdout
    assert differing(base / "run", tmp_path / "run", STEPS) == []
    one, other = (moments(folder / "run", STEPS) for folder in (base, tmp_path))
    assert [name for name in one if unequal(one[name], other[name])] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "starts",
    [
        [(2, True), (1, True), (2, True)],  # the one process holds all, and writes it in one piece
        [(1, True), (2, True)],
        [(2, True), (4, True)],
        [(2, True), (2, False), (2, True)],
    ],
    ids=["2 1 2", "1 2", "2 4", "sharded and not"],
)
def test_a_run_resumes_on_other_processes(exact, tmp_path, starts):
    """Each start ends after two updates, the last at the end."""
    for number, (processes, shard) in enumerate(starts):
        last = number == len(starts) - 1

        def before(process, last=last):
            in_float64()
            if not last:
                stop_after_updates(2)

        sizes = [f"training.micro_batch_size={8 // processes // 2}", f"training.shard={str(shard).lower()}"]
        arguments = ("--config", exact / "config.yaml", f"output_dir={tmp_path / 'run'}", *sizes)
        outcomes = [each.wait() for each in start_several(processes, *arguments, folder=tmp_path, before=before)]
        assert [outcome.returncode for outcome in outcomes] == [0 if last else 143] * processes, outcomes
        assert not number or f": step {2 * number} of {STEPS}." in outcomes[0].stdout
    found = differences(exact / "run", tmp_path / "run", STEPS)
    assert {name: apart for name, apart in found.items() if apart > 4e-13} == {}


@pytest.mark.slow
def test_one_process_with_shard_is_the_run_without(base, tmp_path):
    for name, shard in (("sharded", "true"), ("whole", "false")):
        overrides = f"output_dir={tmp_path / name}", f"training.shard={shard}"
        outcome = run("--config", base / "config.yaml", *overrides, folder=tmp_path, before=skip_the_export)
        assert outcome.returncode == 0, outcome
        assert ("training.shard has no effect with one process" in outcome.stdout) == (shard == "true")
    assert differing(tmp_path / "sharded", tmp_path / "whole", 10) == []


@pytest.mark.slow
def test_the_noise_scale_counts_the_micro_batches_of_all_processes(base, tmp_path):
    """The first micro-step has images 0 to 3 in either case, in two micro-batches of 2 or in one of 4."""
    overrides = f"output_dir={tmp_path / 'run'}", "training.micro_batch_size=4"
    outcome = run("--config", base / "config.yaml", *overrides, folder=tmp_path, before=skip_the_export)
    assert outcome.returncode == 0, outcome
    expected, found = (run_state(folder / "run", STEPS)["meters"]["noise_scale"] for folder in (tmp_path, base))
    assert found["updates"] == expected["updates"] == 4  # of full windows
    for name in ("noise", "squared_gradient"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["unconditional", "text"])
def test_the_export_is_the_whole_average(evaluated, tmp_path, kind):
    base = evaluated
    if kind != "unconditional":
        base, pictures = tmp_path, write_pictures(tmp_path / "pictures", 19, kind=kind)
        config = tiny_config(pictures, base / "run", **of_kind(kind, pictures) | {"training": SIZES})
        finish_two("--config", write_config(base / "config.yaml", config), folder=base, before=lambda process: None)
    average = weights(base / "run", valid_checkpoints(base / "run")[-1], "ema")
    folder = base / "run/pipeline/unet"
    exported = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert unequal(exported, average) == []
    network = UNet2DConditionModel if kind == "text" else UNet2DModel
    assert json.loads((folder / "config.json").read_text())["_class_name"] == network.__name__
    network.from_pretrained(folder)


@pytest.mark.slow
def test_evaluations_with_more_processes_than_chunks(evaluated, tmp_path):
    """One chunk of validation and one of samples, which one process computes alone where nothing is sharded."""
    assert valid_checkpoints(evaluated / "run") == [4, 6]
    DDPMPipeline.from_pretrained(evaluated / "run/pipeline")
    whole = ("--config", evaluated / "config.yaml", f"output_dir={tmp_path / 'run'}", "training.shard=false")
    finish_two(*whole, folder=tmp_path)
    pairs = zip(history(evaluated / "run"), history(tmp_path / "run"), strict=True)
    losses = [(a["validation/loss_ema"], b["validation/loss_ema"]) for a, b in pairs if "validation/loss_ema" in a]
    assert len(losses) == 3
    assert all(a == pytest.approx(b, rel=1e-5) for a, b in losses)


@pytest.mark.slow
def test_pictures_of_many_shapes(tmp_path):
    """With gradient checkpointing, whose second forward pass is inside of the backward pass."""
    found = {}
    for shard in (True, False):
        config = evaluated_config(
            write_shapes(tmp_path / "pictures", 19),
            tmp_path / f"run-{shard}",
            training=SIZES | {"shard": shard},
            data__buckets=SHAPES,
            model__gradient_checkpointing=shard,
        )
        finish_two("--config", write_config(tmp_path / f"{shard}.yaml", config), folder=tmp_path)
        found[shard] = tmp_path / f"run-{shard}"
    apart = differences(found[False], found[True], EVALUATED_STEPS)
    assert {name: difference for name, difference in apart.items() if difference > 1e-5} == {}


@pytest.mark.slow
@pytest.mark.parametrize("damage", [truncate, empty, remove, flip_a_bit])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_part_is_named(base, tmp_path, damage, file):
    folder = shutil.copytree(base / f"run/checkpoint-{STEPS}", tmp_path / "checkpoint-6")
    assert checkpoint.flaw(folder) is None
    damage(folder / file)
    assert file in checkpoint.flaw(folder)


def test_a_manifest_that_leaves_out_a_part_is_not_valid(base, tmp_path):
    folder = shutil.copytree(base / f"run/checkpoint-{STEPS}", tmp_path / "checkpoint-6")
    manifest.seal(folder, STEPS, ["run_state.json", FILES[1]])
    assert checkpoint.flaw(folder) == f"{FILES[0]} is not in its manifest.json"
    manifest.seal(folder, STEPS, FILES)
    assert checkpoint.flaw(folder) == "run_state.json is not in its manifest.json"


def without_the_last_part(folder):
    (folder / FILES[1]).unlink()


def rewrite(path, change):
    """Write a file of parts again after a change of its tensors and of where they begin."""
    found = load_file(path)
    with safe_open(path, "pt") as file:
        places = json.loads(file.metadata()["DCP_SHARDING_INFO"])
    change(found, places)
    save_file(found, path, {"DCP_SHARDING_INFO": json.dumps(places)})


def with_one_weight_more(folder):
    def add(found, places):
        found["model.another.weight"] = found["model.conv_in.weight"].clone()
        places["model.another.weight"] = places["model.conv_in.weight"]

    rewrite(folder / FILES[0], add)
    rewrite(folder / FILES[1], add)


def with_a_row_left_out(folder):
    """Between the first part and the second, so that the tensor is as long as it should be."""

    def leave_out(found, places):
        found["model.conv_in.weight"] = found["model.conv_in.weight"][1:].clone()
        places["model.conv_in.weight"]["saved_offsets"][0] += 1

    rewrite(folder / FILES[1], leave_out)


def with_a_pickle(folder):
    torch.save({"model.conv_out.weight": torch.zeros(1)}, folder / FILES[1])


@pytest.mark.parametrize("change", [without_the_last_part, with_a_row_left_out, with_one_weight_more, with_a_pickle])
def test_parts_that_are_not_of_this_network_are_refused(base, tmp_path, change):
    """The manifest says that every file is as it was written."""
    folder = shutil.copytree(base / f"run/checkpoint-{STEPS}", tmp_path / "run/checkpoint-6")
    change(folder)
    manifest.seal(folder, STEPS, ["run_state.json", *(name for name in FILES if (folder / name).exists())])
    arguments = ("--config", base / "config.yaml", f"output_dir={tmp_path / 'run'}", "training.num_epochs=3")
    refused, other = run_two(*arguments, folder=tmp_path)
    assert (refused.returncode, other.returncode) == (2, 2)
    assert refused.error.startswith(f"{folder}: refused: found ")
    assert other.errors == []


@pytest.mark.slow
def test_a_process_that_cannot_write_its_part_leaves_the_checkpoint_before(base, tmp_path):
    def before(process):
        if process == 1:
            at_call(shards, "write", 2, lambda: limit_file_size(1000))

    arguments = ("--config", base / "config.yaml", f"output_dir={tmp_path / 'run'}", "checkpoint.every_steps=2")
    failed, other = run_two(*arguments, folder=tmp_path, before=before)
    assert (failed.returncode, other.returncode) == (1, 1)
    assert failed.error.startswith(f"{tmp_path / 'run/checkpoint-4'}: cannot be written (File too large, ")
    assert other.errors == []
    assert valid_checkpoints(tmp_path / "run") == [2]
    assert not list((tmp_path / "run").glob(".checkpoint*"))
    finish_two(*arguments, folder=tmp_path)
    assert differing(base / "run", tmp_path / "run", STEPS) == []


KILLS = {
    "a part half written": (1, shards, "write", 2),
    "its part written": (1, shards, "write", 2, True),
    "before the manifest": (0, manifest, "seal", 2),
    "after the manifest": (0, manifest, "seal", 2, True),
}


@pytest.mark.slow
@pytest.mark.parametrize("kill", KILLS.values(), ids=KILLS)
def test_a_killed_process_loses_nothing(base, tmp_path, kill):
    arguments = ("--config", base / "config.yaml", f"output_dir={tmp_path / 'run'}", "checkpoint.every_steps=2")

    def before(process):
        if process == kill[0]:
            kill_at(*kill[1:])

    outcomes = run_two(*arguments, folder=tmp_path, before=before)
    killed = kill[0]
    assert outcomes[killed].returncode == -signal.SIGKILL
    assert outcomes[1 - killed].error.startswith("launch: another process of this run ended")
    assert all(checkpoint.flaw(folder) is None for folder in (tmp_path / "run").glob("checkpoint-*"))
    finish_two(*arguments, folder=tmp_path)
    assert differing(base / "run", tmp_path / "run", STEPS) == []


@pytest.mark.slow
def test_a_plan_of_a_sharded_run(base, tmp_path):
    """Of a larger network than the config's own, which takes less than a MB."""
    overrides = [f"output_dir={tmp_path / 'run'}", "model.unet.block_out_channels=[64, 64]", "--check"]
    planned, other = run_two("--config", base / "config.yaml", *overrides, folder=tmp_path)
    assert (planned.returncode, other.returncode) == (0, 0), planned.stderr + other.stderr
    network = UNet2DModel(**config_of(tmp_path)["model"]["unet"] | {"block_out_channels": [64, 64]})
    half = sum(weight.numel() for weight in network.parameters()) * 5 * 4 / 2 / 1e6
    assert f"EMA weights will take {half:.0f} MB a process, 1/2 of the total (" in planned.stdout
    assert f" of it, {half:.0f} MB are weights, gradients, optimizer state and EMA weights, " in planned.stdout
    assert "float32; each process holds 1/2 of weights, gradients, optimizer state and EMA weights" in planned.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            [
                "training.micro_batch_size=auto",
                "training.gradient_accumulation_steps=null",
                "training.global_batch_size=8",
            ],
            "training.micro_batch_size: found auto with shard; expected a number (--check tests whether it fits)",
        ),
        (
            ["model.lora={rank: 2}", "model.pretrained=a/b", "model.unet=null"],
            "training.shard: found true with model.lora, whose adapters take little memory; expected false "
            "(model.lora.base_dtype halves what the frozen weights take)",
        ),
    ],
    ids=["auto", "lora"],
)
def test_what_cannot_be_sharded_is_refused(base, tmp_path, overrides, expected):
    refused = run("--config", base / "config.yaml", f"output_dir={tmp_path / 'run'}", *overrides, folder=tmp_path)
    assert refused.returncode == 2
    assert refused.error.endswith(f": {expected}")
    assert not (tmp_path / "run").exists()


def test_a_compiled_network_is_not_sharded(base, tmp_path):
    arguments = ("--config", base / "config.yaml", f"output_dir={tmp_path / 'run'}")
    refused, other = run_two(*arguments, folder=tmp_path, ACCELERATE_DYNAMO_BACKEND="EAGER")
    assert (refused.returncode, other.returncode) == (2, 2)
    expected = "launch: found --dynamo_backend eager with training.shard and several processes; expected no"
    assert refused.error == expected
    assert other.errors == []
