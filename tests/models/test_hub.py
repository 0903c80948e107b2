"""Exported pipelines generate, replace what was there before, and are uploaded where the config says."""

import pytest
from diffusers import DDIMPipeline, DDPMPipeline

from finetune.config.inputs import ModelConfig
from finetune.core.errors import UserError
from finetune.models import hub
from finetune.models.load import load_kind
from harness.configs import UNET


@pytest.mark.parametrize("pipeline_class", [DDPMPipeline, DDIMPipeline])
def test_an_exported_pipeline_generates(tmp_path, pipeline_class):
    kind = load_kind(ModelConfig(unet=UNET), 16, 0)
    folder, picture = tmp_path / "pipeline", tmp_path / "grid.png"
    folder.mkdir()
    (folder / "of a run before").write_text("")
    picture.write_text("pixels")
    hub.save_export(kind.save, folder, "# card", [picture])
    assert not (folder / "of a run before").exists()
    assert (folder / "README.md").read_text() == "# card"
    assert (folder / "grid.png").read_text() == "pixels"
    modes = {file.name: file.stat().st_mode for file in folder.rglob("*") if file.is_file()}
    assert modes == dict.fromkeys(modes, modes["README.md"])  # the weights too, which safetensors makes private
    pipeline = pipeline_class.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=2, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 16, 16, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.png", "pipeline"]


def test_an_export_that_fails_leaves_the_former_one(tmp_path):
    kind = load_kind(ModelConfig(unet=UNET), None, 0)
    folder = tmp_path / "pipeline"
    hub.save_export(kind.save, folder, "# first", [])
    with pytest.raises(UserError, match="pipeline: cannot be written"):
        hub.save_export(kind.save, folder, "# second", [tmp_path / "no such picture.png"])
    assert (folder / "README.md").read_text() == "# first"
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]


def test_an_upload_goes_where_the_config_says(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(hub, "create_repo", lambda repository, exist_ok: calls.append((repository, exist_ok)))
    monkeypatch.setattr(hub, "upload_folder", lambda **arguments: calls.append(arguments))
    assert hub.push(tmp_path, "somebody/digits") == "https://huggingface.co/somebody/digits"
    assert calls[0] == ("somebody/digits", True)
    assert (calls[1]["repo_id"], calls[1]["folder_path"]) == ("somebody/digits", tmp_path)


def test_an_upload_that_fails_is_one_line_with_advice(tmp_path):
    line = rf"export.push_to_hub: somebody/digits: the upload of {tmp_path} failed .*hf auth"
    with pytest.raises(UserError, match=line) as failure:
        hub.push(tmp_path, "somebody/digits")
    assert failure.value.exit_code == 1
    assert "\n" not in str(failure.value)
