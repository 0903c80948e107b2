"""A checkpoint or a pipeline from somebody else never runs code."""

import io
import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.run import manifest
from harness.bombs import BOMBS, plain_pickle
from harness.checkpoints import FILES, FOREIGN
from harness.compare import unequal, weights
from harness.processes import Outcome, nothing, run
from harness.undisturbed import undisturbed


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A config, and a run of it: two checkpoints and a pipeline."""
    return undisturbed(tmp_path_factory.mktemp("base"), images=8, before=nothing, checkpoint={"every_steps": 1})


@pytest.mark.parametrize("bomb", BOMBS)
def test_these_bombs_go_off_where_code_may_run(tmp_path, bomb):
    marker = tmp_path / "ran"
    if bomb is plain_pickle:
        pickle.loads(bomb(marker))
    else:
        torch.load(io.BytesIO(bomb(marker)), weights_only=False)
    assert marker.exists()


OWN_NAMES = ["random_states_1.pkl", "scaler.pt"]  # which are loaded if the manifest lists them
UNPICKLED = ["optimizer.bin", "random_states_0.pkl"]  # by torch.load; for the others one kind of bytes is like another
IN_A_CHECKPOINT = [(bomb, name) for bomb in BOMBS for name in FILES if bomb is plain_pickle or name in UNPICKLED]


@pytest.fixture
def newest(base, tmp_path):
    """A copy of a checkpoint, in the output folder of a run."""
    newest = tmp_path / "run" / "checkpoint-2"
    shutil.copytree(base / "run/checkpoint-2", newest)
    assert {*FILES, manifest.MANIFEST} == set(os.listdir(newest))
    return newest


def resume(base, newest) -> Outcome:
    command = ("--config", base / "config.yaml", f"output_dir={newest.parent}", "training.num_epochs=3")
    return run(*command, folder=newest.parents[1])


@pytest.mark.parametrize(("bomb", "name"), IN_A_CHECKPOINT)
def test_a_bomb_in_a_checkpoint_does_not_go_off(base, newest, tmp_path, bomb, name):
    """The manifest says that every file is as it was written, so only the reader of the file can refuse it."""
    marker = tmp_path / "ran"
    (newest / name).write_bytes(bomb(marker))
    manifest.seal(newest, 2, FILES)
    refused = resume(base, newest)
    assert not marker.exists()
    assert refused.returncode == 2
    assert refused.error.startswith(f"{newest}: refused: found ")
    assert "expected plain tensors and numbers of this network" in refused.error
    assert {*os.listdir(newest.parent)} <= {".lock", newest.name}


def wrong_average(folder, change):
    average = load_file(folder / "ema.safetensors")
    first = min(average)
    average[first] = change(average[first])
    save_file(average, folder / "ema.safetensors")


def wrong_moment(folder, change):
    saved = torch.load(folder / "optimizer.bin", weights_only=True)
    saved["state"][0]["exp_avg"] = change(saved["state"][0]["exp_avg"])
    torch.save(saved, folder / "optimizer.bin")


def wrong_options(folder, change):
    saved = torch.load(folder / "optimizer.bin", weights_only=True)
    change(saved["state"][0])
    torch.save(saved, folder / "optimizer.bin")


def wrong_state(folder, change):
    saved = json.loads((folder / "run_state.json").read_text())
    change(saved)
    (folder / "run_state.json").write_text(json.dumps(saved))


def one_value(tensor):
    """Of the shape of a tensor, without the memory for it."""
    return torch.zeros(1).expand(tensor.shape)


@pytest.mark.parametrize(
    ("write", "change"),
    [
        (wrong_moment, lambda tensor: torch.zeros(3)),  # the fused kernel would write behind it
        (wrong_moment, one_value),
        (wrong_options, lambda state: state.pop("exp_avg_sq")),
        (wrong_average, lambda tensor: torch.zeros(1)),
        (wrong_average, lambda tensor: torch.cat([tensor, tensor])),
        (wrong_state, lambda saved: saved["state"].update(seconds="x")),
        (wrong_state, lambda saved: saved["state"].update(step="x")),
        (wrong_state, lambda saved: saved.update(identity=[])),
        (wrong_state, lambda saved: saved["meters"]["epoch"].update(total="x")),
        (wrong_state, lambda saved: saved["meters"]["smoothed"].update(images=[1])),
        (wrong_state, lambda saved: saved["meters"]["smoothed"]["trend"].update(covariance=[1.0])),
    ],
    ids=[
        *("short moment", "moment of one value", "no second moment", "average of one value", "long average"),
        *("state of another type", "step of another type", "identity of another type", "sum of another type"),
        *("counts without baselines", "short covariance"),
    ],
)
def test_a_checkpoint_whose_contents_do_not_fit_is_refused_in_one_line(base, newest, write, change):
    """Each file is as its manifest says."""
    write(newest, change)
    manifest.seal(newest, 2, FILES)
    refused = resume(base, newest)
    assert refused.returncode == 2, refused.stderr
    assert refused.error.startswith(f"{newest}: refused: found ")
    assert {*os.listdir(newest.parent)} <= {".lock", newest.name}


def test_options_of_the_optimizer_in_a_checkpoint_do_not_count(base, newest):
    """They are the config's; AMSGrad would look for moments that are not there."""
    saved = torch.load(newest / "optimizer.bin", weights_only=True)
    saved["param_groups"][0].update(amsgrad=True, maximize=True, lr=9.0)
    torch.save(saved, newest / "optimizer.bin")
    manifest.seal(newest, 2, FILES)
    shutil.copytree(base / "run/checkpoint-2", newest.parents[1] / "plain/checkpoint-2")
    for folder in (newest, newest.parents[1] / "plain/checkpoint-2"):
        assert resume(base, folder).returncode == 0
    assert unequal(weights(newest.parent, 3), weights(newest.parents[1] / "plain", 3)) == []


def test_a_bomb_as_manifest_does_not_go_off(base, newest, tmp_path):
    marker = tmp_path / "ran"
    (newest / manifest.MANIFEST).write_bytes(plain_pickle(marker))
    refused = resume(base, newest)
    assert not marker.exists()
    assert refused.returncode == 2
    assert f"{newest} is skipped: its manifest.json cannot be read" in refused.stdout
    assert "none of the 1 checkpoints" in refused.error


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("bomb", BOMBS)
def test_foreign_files_in_a_checkpoint_are_not_opened(base, newest, tmp_path, bomb, listed):
    marker = tmp_path / "ran"
    for name in FOREIGN:
        (newest / name).write_bytes(bomb(marker))
    if listed:
        manifest.seal(newest, 2, [*FILES, *(name for name in FOREIGN if name not in OWN_NAMES)])
    resumed = resume(base, newest)
    assert resumed.returncode == 0, resumed.stderr
    assert not marker.exists()


FOREIGN_FOLDERS = "@eaDir/model.safetensors", ".ipynb_checkpoints/optimizer.bin", "lost/deep/random_states_0.pkl"


@pytest.mark.parametrize("name", FOREIGN_FOLDERS)
def test_foreign_folders_in_a_checkpoint_are_not_opened(base, newest, tmp_path, name):
    """As servers, notebooks and repairs of a disk leave them; and the checkpoint is pruned with them in it."""
    marker = tmp_path / "ran"
    (newest / name).parent.mkdir(parents=True)
    (newest / name).write_bytes(plain_pickle(marker))
    resumed = resume(base, newest)
    assert resumed.returncode == 0, resumed.stderr
    assert "Resum" in resumed.stdout
    assert not marker.exists()
    assert (newest / name).exists()  # what is not the run's own stays, as long as the checkpoint does


@pytest.mark.parametrize("kind", ["file", "empty folder", "copy", "broken link"])
def test_what_only_has_the_name_of_a_checkpoint_does_not_stop_the_run(base, newest, kind):
    other = newest.parent / {"copy": "checkpoint-2 (copy)"}.get(kind, "checkpoint-9")
    if kind == "file":
        other.write_bytes(b"")
    elif kind == "empty folder":
        other.mkdir()
    elif kind == "copy":
        shutil.copytree(newest, other)
    else:
        other.symlink_to("nowhere")
    resumed = resume(base, newest)
    assert resumed.returncode == 0, resumed.stderr
    assert "Traceback" not in resumed.stderr
    if kind != "copy":
        assert f"{other} is skipped: " in resumed.stdout


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_as_the_random_state_of_a_further_process_does_not_go_off(base, newest, tmp_path, bomb):
    marker = tmp_path / "ran"
    (newest / "random_states_1.pkl").write_bytes(bomb(marker))
    manifest.seal(newest, 2, [*FILES, "random_states_1.pkl"])
    refused = resume(base, newest)
    assert not marker.exists()
    assert refused.returncode == 2
    assert refused.error.startswith(f"{newest}: refused: found ")


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
PIPELINE = {WEIGHTS, "unet/config.json", "scheduler/scheduler_config.json", "model_index.json", "README.md"}
IGNORED = ["README.md", "unet/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.bin", "pipeline.py"]


def fine_tune(base, pipeline, tmp_path) -> Outcome:
    command = ("--config", base / "config.yaml", f"output_dir={tmp_path / 'run'}")
    return run(*command, f"model.pretrained={pipeline}", "model.unet=null", folder=tmp_path)


def assert_refused(outcome, pipeline, tmp_path):
    assert outcome.returncode == 2
    assert outcome.error.startswith(f"model.pretrained: {pipeline}")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def pipeline(base, tmp_path):
    pipeline = tmp_path / "pipeline"
    shutil.copytree(base / "run/pipeline", pipeline)
    assert {str(file.relative_to(pipeline)) for file in pipeline.rglob("*") if file.is_file()} == PIPELINE
    return pipeline


@pytest.mark.parametrize("name", sorted(PIPELINE - {*IGNORED}))
def test_a_bomb_in_place_of_a_pretrained_file_does_not_go_off(base, pipeline, tmp_path, name):
    marker = tmp_path / "ran"
    (pipeline / name).write_bytes(plain_pickle(marker))
    outcome = fine_tune(base, pipeline, tmp_path)
    assert not marker.exists()
    assert_refused(outcome, pipeline, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("bomb", BOMBS)
def test_files_of_a_pretrained_folder_that_nothing_needs_are_not_opened(base, pipeline, tmp_path, bomb):
    marker = tmp_path / "ran"
    for name in IGNORED:
        (pipeline / name).parent.mkdir(exist_ok=True)
        (pipeline / name).write_bytes(bomb(marker))
    outcome = fine_tune(base, pipeline, tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    assert not marker.exists()


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("shards", [False, True])
def test_a_bomb_instead_of_safetensors_does_not_go_off(base, pipeline, tmp_path, bomb, shards):
    marker, unet = tmp_path / "ran", pipeline / "unet"
    names = torch.load(base / "run/checkpoint-2/optimizer.bin", weights_only=True)  # any mapping will do
    (pipeline / WEIGHTS).unlink()
    (unet / "diffusion_pytorch_model.bin").write_bytes(bomb(marker))
    if shards:
        index = {"metadata": {}, "weight_map": dict.fromkeys(map(str, names), "diffusion_pytorch_model.bin")}
        for kind_of_index in ("bin", "safetensors"):
            (unet / f"diffusion_pytorch_model.{kind_of_index}.index.json").write_text(json.dumps(index))
    outcome = fine_tune(base, pipeline, tmp_path)
    assert_refused(outcome, unet, tmp_path)
    assert outcome.error.startswith(f"model.pretrained: {unet}: the weights cannot be loaded safely (")
    assert not marker.exists()


TRICKS = {  # file, and what is added to it
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
HARMLESS = {"a pipeline class of its own", "a network's own class"}  # the script chooses the class


@pytest.mark.parametrize("trick", TRICKS)
def test_code_that_a_pretrained_folder_names_does_not_run(base, pipeline, tmp_path, trick):
    name, more = TRICKS[trick]
    marker = tmp_path / "ran"
    for folder in (pipeline, pipeline / "unet", pipeline / "scheduler"):
        (folder / "pipeline.py").write_text(f"import os; os.mkdir({str(marker)!r})\nclass Evil: pass\n")
    content = json.loads((pipeline / name).read_text())
    (pipeline / name).write_text(json.dumps(content | more))
    outcome = fine_tune(base, pipeline, tmp_path)
    assert not marker.exists()
    if trick in HARMLESS:
        assert outcome.returncode == 0, outcome.stderr
    else:
        assert_refused(outcome, pipeline, tmp_path)
