"""A checkpoint or a pipeline of a stranger runs no code."""

import io
import json
import os
import pickle
import shutil

import pytest
import torch
from trouble import said, script

from finetune import manifest
from tiny import tiny_config, write_config, write_pictures


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A config, and a run of it: two checkpoints and a pipeline."""
    base = tmp_path_factory.mktemp("base")
    config = tiny_config(write_pictures(base / "pictures", 8), base / "run", checkpoint={"every_steps": 1})
    write_config(base / "config.yaml", config)
    assert script("--config", base / "config.yaml", folder=base).returncode == 0
    return base


class Bomb:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def plain(marker):
    return pickle.dumps(Bomb(marker))


def archived(marker):
    """As torch saves it."""
    file = io.BytesIO()
    torch.save({"state": Bomb(marker)}, file)
    return file.getvalue()


def legacy(marker):
    """As torch saved it until 1.6."""
    file = io.BytesIO()
    torch.save({"state": Bomb(marker)}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


KINDS = [plain, archived, legacy]


def test_these_pickles_do_run_when_they_are_let(tmp_path):
    for kind in KINDS:
        marker = tmp_path / kind.__name__
        if kind is plain:
            pickle.loads(kind(marker))
        else:
            torch.load(io.BytesIO(kind(marker)), weights_only=False)
        assert marker.exists()


FILES = ["ema.safetensors", "model.safetensors", "optimizer.bin", "random_states_0.pkl", "run_state.json"]
FOREIGN = ["custom_checkpoint_0.pkl", "pytorch_model.bin", "train.py"]


@pytest.mark.parametrize("name", [*FILES, *FOREIGN, manifest.MANIFEST])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pickle_in_a_checkpoint(base, tmp_path, kind, name):
    """Its manifest says that all is as it was written: only what reads the file stands between."""
    run, marker = tmp_path / "run", tmp_path / "ran"
    newest = run / "checkpoint-2"
    shutil.copytree(base / "run/checkpoint-2", newest)
    assert {*FILES, manifest.MANIFEST} == set(os.listdir(newest))
    (newest / name).write_bytes(kind(marker))
    if name != manifest.MANIFEST:
        (newest / manifest.MANIFEST).unlink()
        manifest.seal(newest, 2)
    arguments = ("--config", base / "config.yaml", f"output_dir={run}", "training.num_epochs=3")
    refused = script(*arguments, folder=tmp_path)
    line = said(refused, 2)
    assert not marker.exists()
    if name in FILES:
        assert line.startswith(f"{newest}: refused: found ")
        assert "expected plain tensors and numbers of this network" in line
    else:
        assert f"{newest} is passed over: " in refused.stdout
        assert name in refused.stdout
        assert "none of the 1 checkpoints" in line
    assert sorted(os.listdir(run)) == [".lock", newest.name]


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
PIPELINE = {WEIGHTS, "unet/config.json", "scheduler/scheduler_config.json", "model_index.json", "README.md"}
IGNORED = ["README.md", "unet/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.bin", "pipeline.py"]


def fine_tuned(base, pipeline, tmp_path):
    return script(
        "--config", base / "config.yaml", f"output_dir={tmp_path / 'run'}", f"model.pretrained={pipeline}",
        "model.unet=null", folder=tmp_path,
    )  # fmt: skip


@pytest.fixture
def pipeline(base, tmp_path):
    pipeline = tmp_path / "pipeline"
    shutil.copytree(base / "run/pipeline", pipeline)
    assert {str(file.relative_to(pipeline)) for file in pipeline.rglob("*") if file.is_file()} == PIPELINE
    return pipeline


@pytest.mark.parametrize("name", sorted({*PIPELINE, *IGNORED}))
@pytest.mark.parametrize("kind", KINDS)
def test_a_pickle_in_a_pretrained_folder(base, pipeline, tmp_path, kind, name):
    marker = tmp_path / "ran"
    (pipeline / name).parent.mkdir(exist_ok=True)
    (pipeline / name).write_bytes(kind(marker))
    outcome = fine_tuned(base, pipeline, tmp_path)
    assert not marker.exists()
    if name in IGNORED:
        assert outcome.returncode == 0, outcome.stderr
    else:
        assert said(outcome, 2).startswith(f"model.pretrained: {pipeline}")
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shards", [False, True])
def test_a_pickle_in_place_of_safetensors(base, pipeline, tmp_path, kind, shards):
    marker, unet = tmp_path / "ran", pipeline / "unet"
    names = torch.load(base / "run/checkpoint-2/optimizer.bin", weights_only=True)  # any mapping will do
    (pipeline / WEIGHTS).unlink()
    (unet / "diffusion_pytorch_model.bin").write_bytes(kind(marker))
    if shards:
        index = {"metadata": {}, "weight_map": dict.fromkeys(map(str, names), "diffusion_pytorch_model.bin")}
        for kind_of_index in ("bin", "safetensors"):
            (unet / f"diffusion_pytorch_model.{kind_of_index}.index.json").write_text(json.dumps(index))
    line = said(fine_tuned(base, pipeline, tmp_path), 2)
    assert line.startswith(f"model.pretrained: {unet}: the weights cannot be loaded safely (")
    assert not marker.exists()


TRICKS = {  # file, and what stands in it beside what belongs there
    "a pipeline class of its own": ("model_index.json", {"_class_name": ["pipeline", "Evil"]}),
    "a custom pipeline": ("model_index.json", {"custom_pipeline": ".", "trust_remote_code": True}),
    "a network of its own": ("model_index.json", {"unet": ["pipeline", "Evil"]}),
    "a module of its own": ("model_index.json", {"unet": ["unet.pipeline", "UNet2DModel"]}),
    "a scheduler of its own": ("model_index.json", {"scheduler": ["pipeline", "Evil"]}),
    "one more component": ("model_index.json", {"vae": ["pipeline", "Evil"]}),
    "a network's own class": ("unet/config.json", {"_class_name": "Evil", "auto_map": {"AutoModel": "pipeline.Evil"}}),
    "a scheduler's own class": ("scheduler/scheduler_config.json", {"_class_name": "pipeline.Evil"}),
    "a quantizer": ("unet/config.json", {"quantization_config": {"quant_method": "pipeline.Evil"}}),
}
HARMLESS = {"a pipeline class of its own", "a network's own class", "a scheduler's own class"}  # the classes are ours


@pytest.mark.parametrize("trick", TRICKS)
def test_code_that_a_pretrained_folder_names(base, pipeline, tmp_path, trick):
    name, more = TRICKS[trick]
    marker = tmp_path / "ran"
    for folder in (pipeline, pipeline / "unet", pipeline / "scheduler"):
        (folder / "pipeline.py").write_text(f"import os; os.mkdir({str(marker)!r})\nclass Evil: pass\n")
    content = json.loads((pipeline / name).read_text())
    (pipeline / name).write_text(json.dumps(content | more))
    outcome = fine_tuned(base, pipeline, tmp_path)
    assert not marker.exists()
    if trick in HARMLESS:
        assert outcome.returncode == 0, outcome.stderr
    else:
        assert said(outcome, 2).startswith(f"model.pretrained: {pipeline}")
        assert not (tmp_path / "run").exists()
