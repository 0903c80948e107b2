"""The results and the model card: true, and without the paths of this machine."""

import json
from pathlib import Path

import pytest
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from finetune.config import plain_yaml
from finetune.config.inputs import ModelConfig
from finetune.config.schema import Config
from finetune.models.hub import save_export
from finetune.models.load import load_kind
from finetune.run.state import Length
from finetune.run.summary import curves_folder, hyperparameters, model_card, outputs, results
from harness.compare import unequal
from harness.configs import UNET, tiny_config

KIND = load_kind(ModelConfig(unet=UNET), None, 0)


def config_of(**changes) -> Config:
    return Config.model_validate(tiny_config(Path("pictures"), Path("run"), **changes))


@given(st.integers(1, 100_000))
def test_there_are_at_least_ten_validations_whatever_the_length(total):
    every = Length(8, 8, total).interval(None)
    points = total // every + (total % every > 0)  # the last update is validated in any case
    assert points >= min(total, 10)
    assert points <= 20


def test_an_interval_in_the_config_is_kept():
    assert Length(8, 8, 1000).interval(7) == 7


def test_results_name_the_best_step_of_the_exported_weights():
    history = [
        {"step": 0, "validation/loss": 1.0, "validation/loss_ema": 1.0},
        {"step": 5, "validation/loss": 0.1, "validation/loss_ema": 0.5},
        {"step": 9, "validation/loss": 0.2, "validation/loss_ema": 0.6},
    ]
    rows = results(history, 9, 72, 4.0, 2_500_000_000)
    assert rows["validation loss"] == "0.60000, from 1.00000; best 0.50000 at step 5"
    assert rows["updates"] == "9, 72 images in 4 s of training, 18.0 images/s"
    assert rows["compute"] == "2.5 GFLOP an image, 45 GFLOP/s on all processes"


def test_a_run_that_drew_no_samples_names_none(tmp_path):
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "loss_curve.png").touch()
    rows = {"pipeline": f"{tmp_path}/pipeline", "loss_curve.png": f"{tmp_path}/loss_curve.png"}
    ending = {
        "curves": f"tensorboard --logdir {tmp_path.parent}",
        "to train longer": "run again with a training.max_train_steps above 6",
    }
    assert outputs(tmp_path, "pipeline", 6) == rows | ending
    (tmp_path / "samples").mkdir()
    assert outputs(tmp_path, "pipeline", 6) == rows | {"samples": f"{tmp_path}/samples"} | ending


def test_runs_are_compared_by_the_settings_of_the_config():
    assert hyperparameters(config_of(), 8, 6) == {
        "global_batch_size": 8,
        "updates": 6,
        "learning_rate": 1e-3,
        "lr_scheduler": "constant",
        "snr_gamma": "null",  # not 0, which would be another setting
        "timestep_sampling": "stratified",
        "seed": 3,
    }
    assert hyperparameters(config_of(training__snr_gamma=5.0), 8, 6)["snr_gamma"] == "5"


@pytest.mark.parametrize(
    ("output_dir", "folder"),
    [("/data/runs/digits", "/data/runs"), ("/digits", "/digits"), ("runs/digits", "runs"), ("digits", "digits")],
)
def test_tensorboard_is_pointed_at_the_folder_of_all_runs(output_dir, folder):
    assert str(curves_folder(Path(output_dir))) == folder


def test_the_card_is_one_that_the_hub_reads():
    card = ModelCard(model_card(config_of(), KIND, {"training loss": "0.1"}, "step-9.png", ""))
    assert card.data.library_name == "diffusers"
    assert "base_model" not in card.data.to_dict()
    assert "| training loss | 0.1 |" in card.text
    assert "![samples](step-9.png)" in card.text
    assert "# run\n" in card.text


def test_the_card_names_what_lies_on_the_hub():
    model, source = "google/ddpm-cat-256", "huggan/smithsonian_butterflies_subset"
    card = ModelCard(model_card(config_of(model={"pretrained": model}, data__source=source), KIND, {}, None, ""))
    assert card.data.base_model == model
    assert f"Fine-tuned from `{model}` on the images of `{source}`." in card.text
    assert recipe(card).data.source == source
    assert "on the images of `digits`." in model_card(config_of(data__source="digits"), KIND, {}, None, "")


def recipe(card: ModelCard) -> Config:
    return Config.model_validate(plain_yaml.read(card.text.split("## Recipe\n\n```yaml\n")[1].split("```")[0]))


def test_the_card_does_not_publish_local_paths(tmp_path, monkeypatch):
    secret = tmp_path / "alice"
    for folder in ("photographs", "digits-base", "dinov2"):
        (secret / folder).mkdir(parents=True)
    monkeypatch.setenv("HOME", str(secret))
    monkeypatch.chdir(secret)
    values = tiny_config(
        Path("~/photographs"),
        secret / "runs" / "digits",
        model={"pretrained": str(secret / "digits-base")},
        checkpoint={"resume": str(secret / "runs" / "digits" / "checkpoint-7")},
        data__validation_fraction=0.5,
        validation={"quality": {"features": str(secret / "dinov2")}},
    )
    config = Config.model_validate(values)
    text = model_card(config, KIND, {}, None, "")
    assert "alice" not in text
    assert "~" not in text
    card = ModelCard(text)
    assert "base_model" not in card.data.to_dict()
    assert "Fine-tuned from `digits-base` on the images of a local folder." in card.text
    saved = recipe(card)
    assert (saved.output_dir, saved.data.source) == ("digits", "photographs")
    assert (saved.model.pretrained, saved.checkpoint.resume) == ("digits-base", "checkpoint-7")
    assert saved.validation.quality.features == "dinov2"
    assert saved.optimizer == config.optimizer
    # a relative path too, of a folder or of files, and an address
    (secret / "photographs" / "a.parquet").touch()
    sources = {"runs/../photographs": "photographs", "photographs/*.parquet": "*.parquet"}
    for source, name in (sources | {f"file://{secret}/photographs/a.parquet": "a.parquet"}).items():
        card = ModelCard(model_card(config_of(data__source=source), KIND, {}, None, ""))
        assert "on the images of a local folder" in card.text
        assert recipe(card).data.source == name


def test_the_card_does_not_publish_the_secrets_of_an_address():
    text = model_card(config_of(data__source="https://user:secret@host/x.parquet?sig=secret"), KIND, {}, None, "")
    assert "secret" not in text
    assert "on the images of `https://host/x.parquet`." in text
    assert recipe(ModelCard(text)).data.source == "https://host/x.parquet"


def test_an_exported_pipeline_does_not_publish_where_it_was_loaded_from(tmp_path):
    DDPMPipeline(UNet2DModel(**UNET), DDPMScheduler()).save_pretrained(tmp_path / "alice" / "base")
    kind = load_kind(config_of(model={"pretrained": str(tmp_path / "alice" / "base")}).model, None, 0)
    save_export(kind.save, tmp_path / "pipeline", "a card", [])
    files = [file for file in (tmp_path / "pipeline").rglob("*") if file.is_file()]
    assert len(files) == 5  # the card, the index, two configs, the weights
    assert [file.name for file in files if b"alice" in file.read_bytes()] == []
    assert json.loads((tmp_path / "pipeline/unet/config.json").read_text())["sample_size"] == 8
    exported = DDPMPipeline.from_pretrained(tmp_path / "pipeline").unet.state_dict()
    assert unequal(kind.network.state_dict(), exported) == []
