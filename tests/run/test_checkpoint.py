"""One checkpoint: saved atomically, verified, loaded."""

import os

import pytest
import torch
from safetensors.torch import load_file

from finetune.core.errors import UserError
from finetune.run import checkpoint, manifest
from harness.checkpoints import DAMAGE, FILES, FOREIGN, empty
from harness.faults import failing_at


def test_loading_restores_what_was_saved(save, accelerator):
    weights = accelerator._models[0].weight.detach().clone()
    folder = save(7, "digest")
    with torch.no_grad():
        accelerator._models[0].weight.zero_()
    accelerator.step = 3
    assert checkpoint.flaw(folder) is None
    with checkpoint.untrusted(folder) as files:
        checkpoint.load(accelerator, files)
        assert checkpoint.read_run_state(files) == {"state": {"step": 7, "branches": ["digest"]}}
        assert load_file(files / "ema.safetensors")["weight"].tolist() == [7.0, 7.0]
    assert torch.equal(accelerator._models[0].weight, weights)
    assert accelerator.step == 0  # a checkpoint is at a window's end
    assert checkpoint.step_of(folder) == 7


def test_all_of_it_has_the_permissions_of_new_files(save, tmp_path):
    (tmp_path / "new").touch()
    modes = {file.name: file.stat().st_mode for file in save(7).iterdir()}
    assert modes == dict.fromkeys(modes, (tmp_path / "new").stat().st_mode)
    assert {"model.safetensors", "ema.safetensors"} <= modes.keys()


@pytest.mark.parametrize(("damage", "file"), DAMAGE)
def test_a_damaged_file_is_named(save, damage, file):
    folder = save(1)
    assert {*FILES, "manifest.json"} == set(os.listdir(folder))
    damage(folder / file)
    assert file in checkpoint.flaw(folder)


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")])
def test_a_file_that_cannot_be_read_is_named_itself(save, error):
    """And not its manifest, which can be read. Files are read in the order of their names."""
    folder = save(1)
    with failing_at(manifest, "checksum", 1 + FILES.index("model.safetensors"), error):
        assert checkpoint.flaw(folder) == f"model.safetensors cannot be read ({error.strerror})"


def test_a_changed_checksum_in_the_manifest_is_reported(save):
    folder = save(1)
    text = (folder / "manifest.json").read_text()
    at = text.index('"xxh3_128": "') + len('"xxh3_128": "')
    (folder / "manifest.json").write_text(text[:at] + ("1" if text[at] == "0" else "0") + text[at + 1 :])
    assert checkpoint.flaw(folder) == "ema.safetensors has another checksum than when it was written"


def test_a_manifest_that_leaves_out_what_is_needed_is_not_valid(save):
    folder = save(1)
    manifest.seal(folder, 1, ["model.safetensors", "run_state.json"])
    assert checkpoint.flaw(folder) == "optimizer.bin is not in its manifest.json"


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_is_ignored(save, accelerator, name):
    """As file managers, network file systems and other programs leave them; among them names that Accelerate loads."""
    folder = save(1)
    (folder / name).write_bytes(b"x")
    assert checkpoint.flaw(folder) is None
    with checkpoint.untrusted(folder) as files:
        assert sorted(os.listdir(files)) == FILES
        checkpoint.load(accelerator, files)


def test_a_foreign_folder_is_ignored(save):
    folder = save(1)
    (folder / "@eaDir").mkdir()
    assert checkpoint.flaw(folder) is None


def test_a_foreign_file_that_appears_while_saving_is_not_listed(save, monkeypatch):
    seal = manifest.seal

    def sealing(folder, step, names):
        names = list(names)
        (folder / ".nfs0001").write_bytes(b"x")
        seal(folder, step, names)
        (folder / ".nfs0001").unlink()

    monkeypatch.setattr(manifest, "seal", sealing)
    assert checkpoint.flaw(save(1)) is None


@pytest.mark.parametrize(("owner", "name"), [(manifest, "seal"), (checkpoint, "save_file")])
def test_a_failed_save_leaves_the_checkpoint_before_and_nothing_else(save, tmp_path, owner, name):
    good = save(1)
    full, line = OSError(28, "No space left on device"), r"checkpoint-2: cannot be written \(No space left on device"
    with pytest.raises(UserError, match=line) as failure, failing_at(owner, name, 1, full):
        save(2)
    assert failure.value.exit_code == 1
    assert os.listdir(tmp_path) == [good.name]
    assert checkpoint.flaw(good) is None


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(save):
    empty(save(1) / "optimizer.bin")
    assert checkpoint.flaw(save(1)) is None
