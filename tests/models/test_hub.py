"""Exported pipelines generate, replace what was there before, and are uploaded where the config says."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline

from finetune.config.inputs import ModelConfig
from finetune.core.errors import UserError
from finetune.models import hub
from finetune.models.classes import with_classes
from finetune.models.load import load_kind
from harness.configs import UNET
from harness.pipelines import add_checker, pipeline, save_pipeline


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


KINDS = [*("unconditional", "classes", "sd", "sdxl", "lora"), *("with a safety checker", "in half precision")]


def kind_of(name, base):
    if name in ("unconditional", "classes"):
        kind = load_kind(ModelConfig(unet=UNET), None, 0)
        return with_classes(kind, ["cat", "dog"], 0) if name == "classes" else kind
    if name == "in half precision":
        pipeline().to(torch.float16).save_pretrained(base, variant="fp16")
    elif name == "with a safety checker":
        add_checker(Path(save_pipeline(base)))
    else:
        save_pipeline(base, xl=name == "sdxl")
    return load_kind(ModelConfig(pretrained=str(base), lora={"rank": 2} if name == "lora" else None), None, 0)


def layout(file):
    """Bytes of a safetensors file's header, those of its tensors, and how many these are."""
    content = file.read_bytes()
    header = int.from_bytes(content[:8], "little")
    return header, len(content) - 8 - header, len(json.loads(content[8 : 8 + header]).keys() - {"__metadata__"})


@pytest.mark.parametrize("name", KINDS)
def test_what_a_kind_saves_takes_the_bytes_that_it_announces(tmp_path, name):
    """Those of weights and vocabularies are exact; 256 for a tensor's name and place and 1 MiB for the rest suffice."""
    kind = kind_of(name, tmp_path / "base")
    announced = kind.export_bytes()
    kind.save(tmp_path / "export")
    files = [file for file in (tmp_path / "export").rglob("*") if file.is_file()]
    weights = [layout(file) for file in files if file.suffix == ".safetensors"]
    headers, data, tensors = map(sum, zip(*weights, strict=True))
    vocabularies = sum(file.stat().st_size for file in files if file.name == "tokenizer.json")
    assert announced == data + vocabularies + 256 * tensors + 2**20
    assert headers < 256 * tensors
    assert sum(file.stat().st_size for file in files) < announced


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
