"""Class-conditional runs through the script: what the data has to give, what is resumed, what comes out."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from finetune.core.randomness import conditions_dropped
from finetune.data.batches import Batches
from finetune.evaluation.sampling import ImageSampler
from finetune.evaluation.validation import Validation
from finetune.training.window import Window
from harness.compare import differing, history, unequal, weights
from harness.configs import (
    EVALUATED_STEPS,
    KINDS,
    ROOT,
    evaluated_config,
    picture,
    tiny_config,
    write_config,
    write_pictures,
)
from harness.digits import run_job, share_read
from harness.faults import kill_at
from harness.processes import finish, run, run_two


def class_config(pictures, output_dir, **changes):
    options = KINDS["classes"] | {
        "samples": {"every_steps": 3, "count": 6, "inference_steps": 2, "guidance_scale": [1.0, 3.0]},
    }
    return evaluated_config(pictures, output_dir, **options | changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    base = tmp_path_factory.mktemp("classes")
    config = class_config(write_pictures(base / "pictures", 19, kind="classes"), base / "run")
    finish("--config", write_config(base / "config.yaml", config), folder=base)
    return base


def test_validation_is_measured_with_and_without_the_class(finished):
    lines = [line for line in history(finished / "run") if "validation/loss" in line]
    assert [line["step"] for line in lines] == [0, 3, 6]
    for line in lines:
        gain = line["validation/loss_unconditional"] - line["validation/loss"]
        assert line["validation/condition_gain"] == pytest.approx(gain, abs=1e-12)
        assert gain != 0


def test_the_export_knows_the_classes_by_name(finished):
    pipeline = DiffusionPipeline.from_pretrained(finished / "run/pipeline", trust_remote_code=True)
    assert pipeline.labels == {"cat": 0, "dog": 1, "emu": 2}
    assert pipeline.unet.config.num_class_embeds == 4
    averaged = weights(finished / "run", EVALUATED_STEPS, "ema")
    assert torch.equal(pipeline.unet.class_embedding.weight, averaged["class_embedding.weight"])


@pytest.mark.slow
def test_of_a_pretrained_models_classes_those_of_the_data_are_drawn(finished, tmp_path):
    """A model of 1,000 classes that is trained on two of them would show ten others in its grid and its card."""
    for index in range(8):
        folder = tmp_path / "pictures" / ("emu" if index % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        picture((8, 8), index).save(folder / f"{index}.png")
    model = {"class_conditional": True, "pretrained": str(finished / "run/pipeline")}
    config = class_config(tmp_path / "pictures", tmp_path / "run", model=model, data__validation_fraction=0.0)

    def before():
        sample = ImageSampler.sample

        def noted(sampler, names, *others):
            (tmp_path / "names").write_text(json.dumps(names))
            return sample(sampler, names, *others)

        ImageSampler.sample = noted

    finish("--config", write_config(tmp_path / "config.yaml", config), folder=tmp_path, before=before)
    assert json.loads((tmp_path / "names").read_text()) == ["dog"] * 3 + ["emu"] * 3
    card = (tmp_path / "run/pipeline/README.md").read_text()
    assert 'pipeline(["dog"], guidance_scale=2.0' in card
    assert "rows, guidance_scale, size = torch.tensor([1]), 2.0" in card  # the rows are cat, dog, emu


@pytest.mark.slow
def test_guidance_without_dropout_of_the_class_is_noted(finished, tmp_path):
    command = ("--config", finished / "config.yaml", f"output_dir={tmp_path / 'run'}", "--check")
    note = "Note: samples are guided, but training.condition_dropout is 0"
    for override, expected in (
        ("training.condition_dropout=0", 1),
        ("training.condition_dropout=0.1", 0),
        ("samples.guidance_scale=1", 0),
    ):
        assert finish(*command, override, folder=tmp_path).stdout.count(note) == expected
    assert ", 3 classes\n" in finish(*command, folder=tmp_path).stdout


def test_both_snippets_of_the_model_card_draw_a_class(finished):
    card = (finished / "run/pipeline/README.md").read_text()
    assert "Classes, in the order of their rows: cat, dog, emu." in card
    with_code, without = (block.split("```")[0] for block in card.split("```python\n")[1:])
    for snippet in (with_code, without):
        scope = {}
        exec(snippet.replace("PATH_OR_REPOSITORY", str(finished / "run/pipeline")), scope)
        assert len(scope["images"]) == 1
    assert scope["images"].shape == (1, 1, 8, 8)
    assert scope["images"].abs().max() <= 1 + 1e-6  # clipped, as its noise says


def test_samples_in_training_are_those_of_the_export(finished):
    """The grid's first row at scale 3: the same starting noise through the exported pipeline, to a grey level."""
    from PIL import Image

    from finetune.core.randomness import noise

    pipeline = DiffusionPipeline.from_pretrained(finished / "run/pipeline", trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.stack([noise(3, 0, index, (1, 8, 8), "samples") for index in range(6)])
    names = ["cat", "cat", "dog", "dog", "emu", "emu"]
    images = pipeline(names, guidance_scale=3.0, num_inference_steps=2, latents=latents, output_type="np").images
    grid = np.asarray(Image.open(finished / "run/samples/step-6.png").convert("L")).astype(int)
    drawn = (images[..., 0] * 255).round().astype(int).repeat(8, axis=1).repeat(8, axis=2)
    for tile in drawn:  # somewhere in the grid, wherever its labels are
        windows = np.lib.stride_tricks.sliding_window_view(grid, tile.shape)
        assert (abs(windows[:, :, ::8, ::8] - tile[::8, ::8]).max((2, 3)) <= 1).any()


@pytest.mark.parametrize(
    "kill",
    [(Window, "add", 8), (Validation, "losses", 5, True), (ImageSampler, "sample", 3)],
    ids=["inside a window", "in a validation without the classes", "between two guidance scales"],
)
def test_a_killed_run_resumes_to_the_bit(finished, tmp_path, kill):
    file = write_config(tmp_path / "config.yaml", class_config(finished / "pictures", tmp_path / "run"))
    assert run("--config", file, folder=tmp_path, before=partial(kill_at, *kill)).returncode == -9
    finish("--config", file, folder=tmp_path)
    assert differing(finished / "run", tmp_path / "run", EVALUATED_STEPS) == []


def test_two_processes_draw_and_measure_the_same(finished, tmp_path):
    """At step 0, before rounding sets runs apart: validation with and without the class, and the sample grid."""
    layout = {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "num_epochs": 2, "condition_dropout": 0.3}
    config = class_config(finished / "pictures", tmp_path / "run", training=layout)
    outcomes = run_two("--config", write_config(tmp_path / "config.yaml", config), folder=tmp_path)
    assert [outcome.returncode for outcome in outcomes] == [0, 0], outcomes
    first, second = (history(base / "run")[0] for base in (finished, tmp_path))
    assert first == second
    grid = "run/samples/step-0.png"
    assert (finished / grid).read_bytes() == (tmp_path / grid).read_bytes()


def test_dropout_of_the_class_is_a_stream_of_its_own(finished):
    """It drops the share that it is asked to, by position, and leaves noise and timesteps as they were."""
    from finetune.config.inputs import DataConfig
    from finetune.core.kind import ImageFormat
    from finetune.data.loading import load_data
    from finetune.data.order import Slot

    config = DataConfig(source=str(finished / "pictures"), validation_fraction=0.0)
    images, _ = load_data(config, ImageFormat(1, 8), 0, labelled=True)
    labels = images.classes(images.class_names)
    assert [labels.tolist().count(row) for row in range(3)] == [7, 6, 6]  # 19 pictures in turn
    slots = [Slot(position % 19, 0, position, 1.0) for position in range(2000)]
    without = Batches(images, 0, 100, "stratified", "center", False).__getitems__(slots)
    some = Batches(images, 0, 100, "stratified", "center", False, labels, 0.25).__getitems__(slots)
    assert unequal(without, some) == ["dropped", "labels"]  # images, noise, timesteps and weights are the same
    assert some["labels"].tolist() == [labels[slot.image] for slot in slots]
    assert some["dropped"].tolist() == conditions_dropped(0, 0, range(2000), 0.25).tolist()
    # 2000 draws of 0.25: standard deviation 0.0097, five of them on either side
    assert abs(some["dropped"].float().mean() - 0.25) < 0.05
    # one micro-batch or two: the same
    halves = [Batches(images, 0, 100, "stratified", "center", False, labels, 0.25).__getitems__(part)
              for part in (slots[:900], slots[900:])]  # fmt: skip
    assert torch.equal(torch.cat([half["dropped"] for half in halves]), some["dropped"])
    assert not conditions_dropped(0, 0, range(100), 0.0).any()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"data__label_column": "species"}, "data.label_column: found 'species'; expected a column of"),
        (
            {"samples__labels": ["cat", "fox"]},
            "samples.labels: found 'fox'; expected classes of the model, which has cat",
        ),
    ],
)
def test_a_mistake_in_the_classes_is_one_line_and_nothing_is_written(finished, tmp_path, changes, line):
    config = class_config(finished / "pictures", tmp_path / "run", **changes)
    outcome = run("--config", write_config(tmp_path / "config.yaml", config), folder=tmp_path)
    assert outcome.returncode == 2
    assert line in outcome.error
    assert not (tmp_path / "run").exists()


def test_pictures_without_classes_are_refused(tmp_path):
    config = class_config(write_pictures(tmp_path / "pictures", 5), tmp_path / "run")
    outcome = run("--config", write_config(tmp_path / "config.yaml", config), folder=tmp_path)
    assert outcome.returncode == 2
    assert "data.label_column: found no column 'label' of labels in" in outcome.error


def test_a_class_that_is_only_held_out_is_refused(tmp_path):
    """Of 19 pictures in three classes one is left to train on."""
    pictures = write_pictures(tmp_path / "pictures", 19, kind="classes")
    config = class_config(pictures, tmp_path / "run", data__validation_fraction=0.99)
    outcome = run("--config", write_config(tmp_path / "config.yaml", config), folder=tmp_path)
    assert outcome.returncode == 2
    assert outcome.error.startswith("data.validation_fraction: found the classes ")
    assert "among the images held out and not among those to train on" in outcome.error
    assert not (tmp_path / "run").exists()


def test_a_picture_without_a_label_is_named(tmp_path):
    write_pictures(tmp_path / "pictures", 4)
    rows = [{"file_name": f"{index:04}.png", "label": None if index == 2 else "cat"} for index in range(4)]
    (tmp_path / "pictures/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = class_config(tmp_path / "pictures", tmp_path / "run")
    outcome = run("--config", write_config(tmp_path / "config.yaml", config), folder=tmp_path)
    assert outcome.returncode == 2
    assert outcome.errors[0].startswith("data.label_column: found no label in 'label' for 1 of 4 images")
    assert outcome.errors[1] == "0002.png"


@pytest.mark.parametrize(
    ("key", "value"), [("samples__labels", [1]), ("samples__guidance_scale", 2.0), ("samples__guidance_scale", [1, 2])]
)
def test_settings_of_conditions_need_a_conditional_model(tmp_path, key, value):
    config = tiny_config(write_pictures(tmp_path / "pictures", 2), tmp_path / "run", **{key: value})
    outcome = run("--config", write_config(tmp_path / "config.yaml", config), folder=tmp_path)
    assert outcome.returncode == 2
    assert f"{key.replace('__', '.')}: found" in outcome.error
    assert "; only a model conditioned on classes (model.class_conditional=true)" in outcome.error


def test_another_set_of_classes_is_another_run(finished, tmp_path):
    file = write_config(tmp_path / "config.yaml", class_config(finished / "pictures", finished / "run"))
    outcome = run("--config", file, "training.condition_dropout=0.1", folder=tmp_path)
    assert outcome.returncode == 2
    assert "training.condition_dropout: 0.3 in the checkpoint, 0.1 now" in outcome.stderr


@pytest.mark.slow
def test_the_digits_job_draws_the_digit_that_is_asked_for(tmp_path):
    run_job("digits-classes.yaml", tmp_path / "run", "samples.count=0", "validation.every_steps=150")
    assert share_read(tmp_path / "run/pipeline", 2.0) >= 0.97
    assert share_read(tmp_path / "run/pipeline", 1.0) >= 0.85
    first, *_, last = (line for line in history(tmp_path / "run") if "validation/condition_gain" in line)
    assert first["validation/condition_gain"] < 0  # the rows of the classes are drawn at random, and disturb
    assert last["validation/condition_gain"] > 0.2 * last["validation/loss_unconditional"]  # it is 0.26 of it


def test_the_shipped_config_is_about_all_ten_digits():
    text = (ROOT / "configs/digits-classes.yaml").read_text()
    assert "class_conditional: true" in text
    assert "labels:" not in text.split("samples:")[0]
