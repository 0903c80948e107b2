"""The real script, from a config to a pipeline: the main job, the notebook's recipe, every objective and launch."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from finetune.compute import has_bf16
from test_model import CELEBAHQ
from tiny import ROOT, UNET, history, launch, run_here, tiny_config, weights, write_config, write_pictures


def judged(folder, count=200):
    """Digits that an SVC, trained on all the real ones, sees in `count` samples of a pipeline."""
    from sklearn.datasets import load_digits
    from sklearn.svm import SVC

    digits = load_digits()
    judge = SVC(gamma=0.001).fit(digits.data, digits.target)
    pipeline = DDIMPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    images = pipeline(batch_size=count, generator=generator, num_inference_steps=40, output_type="np").images
    # 16 x 16 back to 8 x 8 by averaging, 0..1 back to 0..16
    return judge.predict(16 * images.reshape(count, 8, 2, 8, 2).mean((2, 4)).reshape(count, 64))


def test_the_main_job(tmp_path):
    """The README's command: a base that knows 0-4 learns 5-9."""
    assert (ROOT / "configs/digits-base/unet/diffusion_pytorch_model.safetensors").stat().st_size < 2_000_000
    base = judged(ROOT / "configs/digits-base")
    assert (base >= 5).mean() <= 0.15
    outcome = launch(
        *("--config", "configs/digits.yaml", f"output_dir={tmp_path / 'run'}"),
        config_file="accelerate_config.yaml",
        OMP_NUM_THREADS="2",
    )
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    made = judged(tmp_path / "run/pipeline")
    assert (made >= 5).mean() >= 0.9
    assert {5, 6, 7, 8, 9} <= set(made.tolist())

    files = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*")}
    assert {"config.yaml", "loss_curve.png", "metrics.jsonl", "pipeline/README.md", "samples/step-0.png"} <= files
    assert {"samples/step-91.png", "samples/step-182.png", "checkpoint-182/manifest.json"} <= files
    assert len([file for file in files if file.startswith("checkpoint-") and file.endswith("manifest.json")]) == 3
    validation = [line["validation/loss_ema"] for line in history(tmp_path / "run") if "validation/loss_ema" in line]
    assert len(validation) == 8  # steps 0, 26, .. 182
    assert validation[-1] < 0.85 * validation[0]


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """A small pipeline of google/ddpm-celebahq-256's architecture, in both formats, and colour pictures for it."""
    base = tmp_path_factory.mktemp("faces")
    torch.manual_seed(0)
    pipeline = DDPMPipeline(UNet2DModel(**CELEBAHQ), DDPMScheduler())
    pipeline.save_pretrained(base / "safetensors")
    pipeline.save_pretrained(base / "bin", safe_serialization=False)
    rng = np.random.default_rng(0)
    for index in range(23):
        pixels = rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)
        (base / "pictures" / "nested").mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(pixels).resize((40, 36), Image.Resampling.BICUBIC)
        picture.save(base / "pictures" / ("nested" if index % 2 else ".") / f"{index}.jpg")
    return base


@pytest.mark.parametrize(("recipe", "weights_format"), [("butterflies", "safetensors"), ("wikiart", "bin")])
def test_the_notebook_recipes_on_local_folders(faces, tmp_path, capsys, recipe, weights_format):
    config = yaml.safe_load((ROOT / f"configs/{recipe}.yaml").read_text())
    overrides = [
        f"model.pretrained={faces / weights_format}",
        f"data.source={faces / 'pictures'}",
        f"output_dir={tmp_path / 'run'}",
        "data.num_workers=0",
        "samples.inference_steps=2",
        "samples.count=2",
        "validation.images=2",
    ]
    assert run_here(config, tmp_path / "config.yaml", *overrides) == 0
    lines, printed = history(tmp_path / "run"), capsys.readouterr().out

    # butterflies: 22 images (1 held out) in windows of 4 x 2 = 8: 8 + 8 + 6, twice; wikiart: 22 in one window of 32
    updates = [line for line in lines if "train/loss" in line]
    assert len(updates) == {"butterflies": 6, "wikiart": 1}[recipe]
    assert {line["train/learning_rate"] for line in updates} == {1e-5}
    averages = [line["train/epoch_loss"] for line in updates if "train/epoch_loss" in line]
    assert len(averages) == {"butterflies": 2, "wikiart": 1}[recipe]
    for epoch, average in enumerate(averages, 1):
        assert f"epoch {epoch}: average loss {average:.5f}" in printed
    if recipe == "butterflies":  # the average is over images, not over updates
        first = [line["train/loss"] for line in updates[:3]]
        assert averages[0] == pytest.approx((8 * first[0] + 8 * first[1] + 6 * first[2]) / 22)

    with Image.open(tmp_path / "run/loss_curve.png") as curve:
        assert len(set(curve.convert("RGB").getdata())) > 20
    card = (tmp_path / "run/pipeline/README.md").read_text()
    assert "learning_rate: 1.0e-05" in card
    assert f"{averages[-1]:.5f}" in card
    assert "![samples](step-" in card
    assert DDPMPipeline.from_pretrained(tmp_path / "run/pipeline").unet.config.sample_size == 32


@pytest.fixture
def pictures(tmp_path):
    return write_pictures(tmp_path / "pictures", 13)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("snr_gamma", [None, 5.0])
def test_every_objective_gets_better(pictures, tmp_path, prediction_type, snr_gamma):
    config = tiny_config(
        pictures,
        tmp_path / "run",
        model={"unet": UNET, "noise_scheduler": {"num_train_timesteps": 50, "prediction_type": prediction_type}},
        training__snr_gamma=snr_gamma,
        training__num_epochs=6,
        data__validation_fraction=0.1,
        validation__images=32,
    )
    assert run_here(config, tmp_path / "config.yaml") == 0
    validation = [line["validation/loss"] for line in history(tmp_path / "run") if "validation/loss" in line]
    assert validation[-1] < 0.95 * validation[0]
    exported = json.loads((tmp_path / "run/pipeline/scheduler/scheduler_config.json").read_text())
    assert exported["prediction_type"] == prediction_type


def scalars(output_dir):
    events = EventAccumulator(str(output_dir / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    return events


def test_two_processes_watched_in_tensorboard(pictures, tmp_path):
    config = tiny_config(
        pictures,
        tmp_path / "run",
        logging__tracker="tensorboard",
        data__validation_fraction=0.1,
        validation__every_steps=2,
        samples={"every_steps": 2, "count": 3, "inference_steps": 2},
    )
    outcome = launch("--config", write_config(tmp_path / "config.yaml", config), processes=2)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    assert "cpu, 2 process(es), float32" in outcome.stdout
    assert "16 = 4 per micro-batch x 2 accumulation steps x 2 process(es)" in outcome.stdout
    assert outcome.stdout.count("Finished:") == 1

    events = scalars(tmp_path / "run")
    # 12 images in windows of 16: one update an epoch, two epochs
    for tag in ("loss", "epoch_loss", "learning_rate", "grad_norm", "images_per_second", "loss_smoothed"):
        assert [point.step for point in events.Scalars(f"train/{tag}")] == [1, 2], tag
    for tag in ("validation/loss", "validation/loss_ema"):
        assert [point.step for point in events.Scalars(tag)] == [0, 2], tag
    assert [image.step for image in events.Images("samples")] == [0, 2]
    logged = [line["train/loss"] for line in history(tmp_path / "run") if "train/loss" in line]
    assert [point.value for point in events.Scalars("train/loss")] == pytest.approx(logged, rel=1e-6)
    assert "global_batch_size" in str(events.Tensors("config/text_summary")[0])
    # the same validation on one process in other micro-batches: to the bit at the start, and with rounding later
    config["training"] |= {"micro_batch_size": 16, "gradient_accumulation_steps": 1}
    assert run_here({**config, "output_dir": str(tmp_path / "one")}, tmp_path / "one.yaml") == 0
    found, expected = (
        [line["validation/loss"] for line in history(tmp_path / name) if "validation/loss" in line]
        for name in ("run", "one")
    )
    assert found[0] == expected[0]
    assert found == pytest.approx(expected, rel=1e-5)
    # the weights that were trained have no prefix of the wrapper that trained them
    assert "conv_in.weight" in weights(tmp_path / "run", 2)


def test_bfloat16_and_a_compiled_network_export_plain_float32(pictures, tmp_path):
    config = tiny_config(pictures, tmp_path / "run")
    outcome = launch(
        *("--config", write_config(tmp_path / "config.yaml", config)),
        launcher=["--mixed_precision", "bf16", "--dynamo_backend", "aot_eager"],
    )
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    slow = "" if has_bf16(torch.device("cpu")) else " (this CPU has no unit for it: slower than float32)"
    assert f"1 process(es), bf16 mixed precision{slow}\n" in outcome.stdout
    exported = load_file(tmp_path / "run/pipeline/unet/diffusion_pytorch_model.safetensors")
    assert "conv_in.weight" in exported
    assert {tensor.dtype for tensor in exported.values()} == {torch.float32}
    assert {tensor.dtype for tensor in weights(tmp_path / "run", 4).values()} == {torch.float32}


def test_a_finished_run_says_so_and_can_be_extended(pictures, tmp_path, capsys):
    config = tiny_config(pictures, tmp_path / "run", training__num_epochs=1)
    assert run_here(config, tmp_path / "config.yaml") == 0
    before = weights(tmp_path / "run", 2)
    capsys.readouterr()

    assert run_here(config, tmp_path / "config.yaml") == 0
    printed = capsys.readouterr().out
    assert f"Going on from {tmp_path / 'run/checkpoint-2'}: step 2 of 2." in printed
    assert "to go on" in printed
    assert "the same command with a training.max_train_steps above 2" in printed
    after = weights(tmp_path / "run", 2)
    assert all(torch.equal(before[name], after[name]) for name in before)

    config["training"] |= {"num_epochs": 2}
    config["optimizer"]["learning_rate"] = 5e-4
    assert run_here(config, tmp_path / "config.yaml") == 0
    printed = capsys.readouterr().out
    assert "optimizer.learning_rate: 0.001 in the checkpoint, 0.0005 now" in printed
    assert [line["step"] for line in history(tmp_path / "run")] == [1, 2, 3, 4]
    assert [line["train/learning_rate"] for line in history(tmp_path / "run")] == [1e-3, 1e-3, 5e-4, 5e-4]

    config["seed"] = 4
    file = write_config(tmp_path / "config.yaml", config)
    outcome = script("--config", file)
    assert outcome.returncode == 2
    assert "error: " in outcome.stderr
    assert "is of another run: seed: 3 in the checkpoint, 4 now" in outcome.stderr
    assert "Traceback" not in outcome.stderr


def script(*arguments):
    command = [sys.executable, ROOT / "train.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_check_says_the_plan_and_writes_nothing(pictures, tmp_path):
    file = write_config(tmp_path / "config.yaml", tiny_config(pictures, tmp_path / "run"))
    outcome = script("--config", file, "--check", "training.num_epochs=3")
    assert outcome.returncode == 0, outcome.stderr
    assert "13 to train on, 0 held out; 8 x 8, 1 channel(s)" in outcome.stdout
    assert "8 = 4 per micro-batch x 2 accumulation steps x 1 process(es)" in outcome.stdout
    assert "6 updates, 2 an epoch" in outcome.stdout
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
        ({"logging__tracker": "wandb"}, "logging.tracker"),
        ({"logging__tracker": "nonsense"}, "nonsense"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(pictures, tmp_path, change, line):
    from finetune.errors import UserError

    config = tiny_config(pictures, tmp_path / "run", **change)
    with pytest.raises(UserError) as failure:
        run_here(config, tmp_path / "config.yaml")
    assert failure.value.exit_code == 2
    assert len(failure.value.problems) == 1
    assert line in str(failure.value)
    assert not (tmp_path / "run").exists()


def test_a_mistake_through_the_script(tmp_path):
    (tmp_path / "empty").mkdir()
    file = write_config(tmp_path / "config.yaml", tiny_config(tmp_path / "empty", tmp_path / "run"))
    outcome = script("--config", file)
    assert outcome.returncode == 2
    assert outcome.stderr.splitlines()[-1].startswith("error: data.source: ")
    assert "Traceback" not in outcome.stderr
    assert not (tmp_path / "run").exists()


def test_the_accumulation_variable_of_the_launch_does_not_override_silently(pictures, tmp_path, monkeypatch):
    from finetune.errors import UserError

    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "5")
    with pytest.raises(UserError, match="found 5 in the launch's environment, where the config comes to 2"):
        run_here(tiny_config(pictures, tmp_path / "run"), tmp_path / "config.yaml")


@pytest.mark.parametrize(
    "file", [ROOT / "accelerate_config.yaml", *sorted((ROOT / "configs/accelerate").glob("*.yaml"))]
)
def test_launch_configs_are_accelerates(file):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(file))
    assert config.num_processes >= 1
    assert len(list((ROOT / "configs/accelerate").glob("*.yaml"))) == 3
