"""train.py from a config to a pipeline: the README's job, the course recipes, objectives, two processes, bf16."""

import json
import re

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from safetensors.torch import load_file

from harness.compare import curves, history, unequal, untimed, weights
from harness.configs import ROOT, SMALL, UNET, tiny_config, write_config, write_pictures
from harness.digits import read, run_job
from harness.faults import draw_the_curve, skip_the_export
from harness.processes import finish, run, run_two

CURVES = {  # colours of loss_curve.png: matplotlib's tab:blue, tab:orange, tab:green, tab:red
    "train/loss_smoothed": (31, 119, 180),
    "train/epoch_loss": (255, 127, 14),
    "validation/loss": (44, 160, 44),
    "validation/loss_ema": (214, 39, 40),
}


def logged(output_dir, name):
    """A scalar of metrics.jsonl, in the order of the steps."""
    return [line[name] for line in history(output_dir) if name in line]


def drawn(folder, count=200):
    """The digits that are read in `count` samples of a pipeline."""
    pipeline = DDIMPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    images = pipeline(batch_size=count, generator=generator, num_inference_steps=10, output_type="np").images
    return read(images[..., 0])


def test_help_has_a_line_for_each_option(tmp_path):
    helped = finish("--help", folder=tmp_path, COLUMNS="120")
    options = re.findall(r"^  (\S.*?)(?: FILE)? {2,}\S", helped.stdout, re.MULTILINE)
    assert options == ["key.path=value", "-h, --help", "--config", "--check", "--measure"]
    assert helped.stderr == ""


@pytest.mark.slow
def test_a_shipped_config_turns_a_model_of_0_to_4_into_one_of_5_to_9(tmp_path):
    assert (ROOT / "configs/digits-base/unet/diffusion_pytorch_model.safetensors").stat().st_size < 2_000_000
    base = drawn(ROOT / "configs/digits-base")
    assert (base >= 5).mean() <= 0.15
    run_dir = tmp_path / "run"
    run_job("digits.yaml", run_dir, "samples.count=5", before=draw_the_curve)
    trained = drawn(run_dir / "pipeline")
    assert (trained >= 5).mean() >= 0.9
    assert {5, 6, 7, 8, 9} <= set(trained.tolist())

    files = {str(path.relative_to(run_dir)) for path in run_dir.rglob("*")}
    assert {"config.yaml", "loss_curve.png", "metrics.jsonl", "pipeline/README.md", "samples/step-0.png"} <= files
    assert {"samples/step-91.png", "samples/step-182.png"} <= files
    assert {path.name for path in run_dir.glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (100, 150, 182)}
    assert [line["step"] for line in history(run_dir) if "validation/loss_ema" in line] == list(range(0, 183, 26))
    validation = logged(run_dir, "validation/loss_ema")
    assert validation[-1] < 0.85 * validation[0]


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """A small pipeline of RGB images in both formats of weights, and 23 colour pictures in nested folders."""
    base = tmp_path_factory.mktemp("faces")
    torch.manual_seed(0)
    unet = UNet2DModel(**UNET | {"sample_size": 32, "in_channels": 3, "out_channels": 3})
    pipeline = DDPMPipeline(unet, DDPMScheduler())
    pipeline.save_pretrained(base / "safetensors")
    pipeline.save_pretrained(base / "bin", safe_serialization=False)
    rng = np.random.default_rng(0)
    for index in range(23):
        pixels = rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)
        (base / "pictures" / "nested").mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(pixels).resize((40, 36), Image.Resampling.BICUBIC)
        picture.save(base / "pictures" / ("nested" if index % 2 else ".") / f"{index}.jpg")
    return base


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "weights_format"), [("butterflies", "safetensors"), ("wikiart", "bin")])
def test_a_course_recipe_trains_on_local_pictures(faces, tmp_path, recipe, weights_format):
    config = yaml.safe_load((ROOT / f"configs/{recipe}.yaml").read_text())
    changes = {
        "model.pretrained": faces / weights_format,
        "data.source": faces / "pictures",
        "output_dir": tmp_path / "run",
        "data.num_workers": 0,
        "samples.inference_steps": 2,
        "samples.count": 2,
        "validation.images": 2,
    }
    overrides = [f"{key}={value}" for key, value in changes.items()]
    file = write_config(tmp_path / "config.yaml", config)
    done = finish("--config", file, *overrides, folder=tmp_path, before=draw_the_curve)

    # butterflies: 22 images (1 held out) in windows of 4 x 2 = 8: 8 + 8 + 6, twice; wikiart: 22 in one window of 32
    updates = [line for line in history(tmp_path / "run") if "train/loss" in line]
    assert len(updates) == {"butterflies": 6, "wikiart": 1}[recipe]
    assert {line["train/learning_rate"] for line in updates} == {1e-5}
    averages = logged(tmp_path / "run", "train/epoch_loss")
    assert len(averages) == {"butterflies": 2, "wikiart": 1}[recipe]
    for epoch, average in enumerate(averages, 1):
        assert f"epoch {epoch}: average loss {average:.5f}" in done.stdout
    if recipe == "butterflies":  # the average is over images, not over updates
        first = [line["train/loss"] for line in updates[:3]]
        assert averages[0] == pytest.approx((8 * first[0] + 8 * first[1] + 6 * first[2]) / 22)

    with Image.open(tmp_path / "run/loss_curve.png") as curve:
        colours = {colour for _, colour in curve.convert("RGB").getcolors(2**24)}
    assert set(CURVES.values()) <= colours
    card = (tmp_path / "run/pipeline/README.md").read_text()
    assert "learning_rate: 1.0e-05" in card
    assert f"{averages[-1]:.5f}" in card
    assert "![samples](step-" in card
    assert DDPMPipeline.from_pretrained(tmp_path / "run/pipeline").unet.config.sample_size == 32


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), 13)


@pytest.mark.parametrize("snr_gamma", [None, 5.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_training_lowers_the_validation_loss_of_every_objective(pictures, tmp_path, prediction_type, snr_gamma):
    config = tiny_config(
        pictures,
        tmp_path / "run",
        model={"unet": UNET, "noise_scheduler": {"num_train_timesteps": 50, "prediction_type": prediction_type}},
        training__snr_gamma=snr_gamma,
        training__num_epochs=6,
        data__validation_fraction=0.1,
        validation__images=32,
    )
    done = finish("--config", write_config(tmp_path / "config.yaml", config), folder=tmp_path)
    named = [line.split()[0] for line in done.stdout.split("Finished: ")[1].splitlines()[1:]]
    assert "pipeline" in named
    assert "samples" not in named  # samples.count is 0
    validation = logged(tmp_path / "run", "validation/loss")
    assert len(validation) == 2  # before the first update and after the last
    assert validation[-1] < 0.95 * validation[0]
    exported = json.loads((tmp_path / "run/pipeline/scheduler/scheduler_config.json").read_text())
    assert exported["prediction_type"] == prediction_type


@pytest.mark.slow
def test_two_processes_log_and_validate_like_one(pictures, tmp_path):
    config = tiny_config(
        pictures,
        tmp_path / "run",
        logging__tracker="tensorboard",
        data__validation_fraction=0.1,
        validation__every_steps=2,
        samples={"every_steps": 2, "count": 3, "inference_steps": 2},
    )
    file = write_config(tmp_path / "config.yaml", config)
    main, other = run_two("--config", file, folder=tmp_path)
    assert [main.returncode, other.returncode] == [0, 0], main.stderr + other.stderr
    assert "cpu, 2 process(es) with 1 thread(s) each, float32" in main.stdout
    assert "16 = 4 per micro-batch x 2 accumulation steps x 2 process(es)" in main.stdout
    assert main.stdout.count("Finished:") == 1
    assert other.stdout == ""

    # 12 images in windows of 16: one update an epoch, two epochs
    shown = curves(tmp_path / "run")
    for tag in ("loss", "loss/each_update", "loss/epoch_mean", "optimizer/learning_rate", "optimizer/gradient_norm"):
        assert [step for step, _ in shown[f"train/{tag}"]] == [1, 2], tag
    for name in ("validation/loss", "validation_ema/loss"):
        assert [step for step, _ in shown[name]] == [0, 2], name
    losses = logged(tmp_path / "run", "train/loss")
    assert [value for _, value in shown["train/loss/each_update"]] == pytest.approx(losses, rel=1e-6)
    # Validation on one process in other micro-batches: bit-exact at the start, equal up to rounding after training.
    one = (f"output_dir={tmp_path / 'one'}", "training.micro_batch_size=16", "training.gradient_accumulation_steps=1")
    finish("--config", file, *one, folder=tmp_path, before=skip_the_export)
    found, expected = (logged(tmp_path / name, "validation/loss") for name in ("run", "one"))
    assert found[0] == expected[0]
    assert found == pytest.approx(expected, rel=1e-5)
    # DDP's prefix is not in the names of the weights.
    assert "conv_in.weight" in weights(tmp_path / "run", 2)


@pytest.mark.slow
def test_bf16_and_torch_compile_save_float32_weights_under_plain_names(pictures, tmp_path):
    config = tiny_config(pictures, tmp_path / "run")
    launch = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_DYNAMO_BACKEND": "AOT_EAGER"}
    outcome = finish("--config", write_config(tmp_path / "config.yaml", config), folder=tmp_path, **launch)
    assert "1 process(es) with 1 thread(s) each, bf16 mixed precision" in outcome.stdout
    exported = load_file(tmp_path / "run/pipeline/unet/diffusion_pytorch_model.safetensors")
    saved = weights(tmp_path / "run", 4)
    assert exported.keys() == saved.keys() == UNet2DModel(**SMALL).state_dict().keys()
    assert {tensor.dtype for tensor in (*exported.values(), *saved.values())} == {torch.float32}


@pytest.mark.parametrize("native", [True, False])
def test_the_plan_says_where_a_cpu_only_emulates_bf16(pictures, tmp_path, native):
    def before():
        from finetune.run import plan

        plan.has_bf16 = lambda device: native

    file = write_config(tmp_path / "config.yaml", tiny_config(pictures, tmp_path / "run"))
    environment = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_CPU": "true"}
    checked = finish("--config", file, "--check", folder=tmp_path, before=before, **environment)
    note = "" if native else " (no native bf16 support on this CPU: slower than float32)"
    assert f"cpu, 1 process(es) with 1 thread(s) each, bf16 mixed precision{note}\n" in checked.stdout


@pytest.mark.slow
def test_a_finished_run_can_be_extended_and_says_how(pictures, tmp_path):
    config = tiny_config(pictures, tmp_path / "run", training__num_epochs=1)
    command = ("--config", write_config(tmp_path / "config.yaml", config))
    finish(*command, folder=tmp_path)
    before, lines = weights(tmp_path / "run", 2), untimed(tmp_path / "run")

    again = finish(*command, folder=tmp_path)
    assert f"Resuming from {tmp_path / 'run/checkpoint-2'}: step 2 of 2." in again.stdout
    assert "to train longer" in again.stdout
    assert "run again with a training.max_train_steps above 2" in again.stdout
    assert unequal(before, weights(tmp_path / "run", 2)) == []
    assert untimed(tmp_path / "run") == lines

    extended = finish(*command, "training.max_train_steps=4", "optimizer.learning_rate=5e-4", folder=tmp_path)
    assert "optimizer.learning_rate: 0.001 in the checkpoint, 0.0005 now" in extended.stdout
    assert "training.max_train_steps: None in the checkpoint, 4 now" in extended.stdout
    assert [line["step"] for line in history(tmp_path / "run")] == [1, 2, 3, 4]
    assert logged(tmp_path / "run", "train/learning_rate") == [1e-3, 1e-3, 5e-4, 5e-4]


def test_another_seed_in_the_same_folder_is_refused(pictures, tmp_path):
    file = write_config(tmp_path / "config.yaml", tiny_config(pictures, tmp_path / "run", training__num_epochs=1))
    finish("--config", file, folder=tmp_path, before=skip_the_export)
    outcome = run("--config", file, "seed=4", folder=tmp_path)
    assert outcome.returncode == 2
    assert "Traceback" not in outcome.stderr
    assert outcome.errors == [
        f"{tmp_path / 'run/checkpoint-2'} is of another run: seed: 3 in the checkpoint, 4 now",
        "set another output_dir to start a new run, or the former values to resume this one",
    ]


def test_check_prints_the_plan_and_writes_nothing(pictures, tmp_path):
    file = write_config(tmp_path / "config.yaml", tiny_config(pictures, tmp_path / "run"))
    outcome = finish("--config", file, "--check", "training.num_epochs=3", folder=tmp_path)
    assert "13 to train on, 0 held out; 8 x 8, 1 channel(s)" in outcome.stdout
    assert "8 = 4 per micro-batch x 2 accumulation steps x 1 process(es)" in outcome.stdout
    assert "6 updates, 2 an epoch" in outcome.stdout  # 8 + 5 images, three times
    assert "Memory: " in outcome.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"data__source": "nowhere/at/all"}, "data.source"),
        ({"data__image_column": "picture"}, "data.image_column"),
        ({"data__resolution": 7}, "data.resolution: found 7; expected a multiple of 2"),
        ({"model": {"pretrained": "configs"}}, "model.pretrained: configs: model_index.json cannot be read"),
        ({"training__global_batch_size": 9}, "found global_batch_size 9; expected"),
        ({"logging__tracker": "wandb"}, "logging.tracker: wandb is not installed here"),
        ({"logging__tracker": "nonsense"}, "logging.tracker: found 'nonsense'; expected null or one of aim, "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_mistake_in_the_config_is_one_line_and_nothing_is_written(pictures, tmp_path, change, line):
    config = tiny_config(pictures, tmp_path / "run", **change)
    outcome = run("--config", write_config(tmp_path / "config.yaml", config), folder=tmp_path)
    assert outcome.returncode == 2
    assert line in outcome.error
    assert "Warning" not in outcome.stderr
    assert not (tmp_path / "run").exists()


def test_an_empty_folder_of_pictures_is_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    file = write_config(tmp_path / "config.yaml", tiny_config(tmp_path / "empty", tmp_path / "run"))
    outcome = run("--config", file, folder=tmp_path)
    assert outcome.returncode == 2
    assert outcome.error.startswith("data.source: ")
    assert not (tmp_path / "run").exists()


def test_accumulation_steps_in_the_environment_do_not_override_the_config(pictures, tmp_path):
    file = write_config(tmp_path / "config.yaml", tiny_config(pictures, tmp_path / "run"))
    outcome = run("--config", file, folder=tmp_path, ACCELERATE_GRADIENT_ACCUMULATION_STEPS="5")
    assert outcome.returncode == 2
    assert outcome.error.startswith(
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS: found 5 in the launch's environment, where the config gives 2, "
    )


def test_the_launch_configs_are_read_by_accelerate():
    from accelerate.commands.config.config_args import load_config_from_file

    found = {}
    for file in (ROOT / "accelerate_config.yaml", *(ROOT / "configs/accelerate").glob("*.yaml")):
        config = load_config_from_file(str(file))
        found[file.stem] = (config.num_processes, config.num_machines, config.mixed_precision)
    assert found == {
        "accelerate_config": (1, 1, "no"),
        "one-gpu-bf16": (1, 1, "bf16"),
        "several-gpus": (8, 1, "bf16"),
        "several-machines": (16, 2, "bf16"),
    }
