"""Checkpoints are whole or not there: found, refused, pruned, and never half written."""

import json
import os
import subprocess
import sys
import threading

import pytest
import torch
from accelerate import Accelerator

from finetune import checkpoint, manifest
from finetune.errors import UserError
from finetune.folder import Lock


@pytest.fixture
def accelerator():
    accelerator = Accelerator(cpu=True)
    network = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(network.parameters())
    accelerator.prepare(network, optimizer)
    checkpoint.share_weights_between_setups(accelerator)
    return accelerator


@pytest.fixture
def save(accelerator, tmp_path):
    def save(step, keep=10):
        tensors = {"ema": {"weight": torch.full((2,), float(step))}}
        return checkpoint.save(accelerator, tmp_path, step, {"state": {"step": step}}, tensors, keep)

    return save


def find(folder, resume="auto"):
    warnings = []
    return checkpoint.find(folder, resume, warnings.append), warnings


def test_a_saved_checkpoint_comes_back(save, accelerator, tmp_path):
    weights = accelerator._models[0].weight.detach().clone()
    folder = save(7)
    with torch.no_grad():
        accelerator._models[0].weight.zero_()
    accelerator.step = 3
    assert find(tmp_path) == (folder, [])
    checkpoint.load(accelerator, folder)
    assert torch.equal(accelerator._models[0].weight, weights)
    assert accelerator.step == 0  # a checkpoint is at a window's end
    assert checkpoint.read_run_state(folder) == {"state": {"step": 7}}
    assert checkpoint.load_tensors(folder, "ema")["weight"].tolist() == [7.0, 7.0]


def test_newest_is_by_number_and_not_by_name(save, tmp_path):
    save(9)
    newest = save(10)
    assert find(tmp_path)[0] == newest


def removed():
    """What was pruned goes while training goes on."""
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.current_thread():
            thread.join()


def test_only_the_newest_are_kept(save, tmp_path):
    for step in (1, 2, 3, 4):
        save(step, keep=2)
    removed()
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-3", "checkpoint-4"]


def damage_truncate(file):
    os.truncate(file, file.stat().st_size - 1)


def damage_empty(file):
    os.truncate(file, 0)


def damage_remove(file):
    file.unlink()


def damage_flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


FILES = ["model.safetensors", "optimizer.bin", "random_states_0.pkl", "ema.safetensors", "run_state.json"]


@pytest.mark.parametrize("damage", [damage_truncate, damage_empty, damage_remove, damage_flip])
@pytest.mark.parametrize("file", [*FILES, "manifest.json"])
def test_a_damaged_one_is_named_and_the_one_before_is_used(save, tmp_path, file, damage):
    before, newest = save(1), save(2)
    assert {*FILES, "manifest.json"} == set(os.listdir(newest))
    damage(newest / file)
    if damage is damage_flip and file == "manifest.json":
        assert find(tmp_path)[0] in (before, newest)  # a flipped blank may leave it as true as it was
        return
    found, warnings = find(tmp_path)
    assert found == before
    assert len(warnings) == 1
    assert str(newest) in warnings[0]
    assert file in warnings[0]


def test_a_file_that_was_not_written_by_the_save_is_refused(save):
    folder = save(1)
    (folder / "custom_checkpoint_0.pkl").write_bytes(b"x")
    assert "custom_checkpoint_0.pkl" in checkpoint.flaw(folder)


def test_none_whole_though_some_exist_is_no_fresh_start(save, tmp_path):
    damage_empty(save(1) / "optimizer.bin")
    with pytest.raises(UserError, match="none of the 1 checkpoints"):
        find(tmp_path)


def test_never_does_not_mix_runs(save, tmp_path):
    assert find(tmp_path, "never")[0] is None
    save(1)
    with pytest.raises(UserError, match=r"holds checkpoint-1"):
        find(tmp_path, "never")


def test_an_explicit_one_must_be_whole(save, tmp_path):
    folder = save(1)
    assert find(tmp_path, str(folder))[0] == folder
    damage_flip(folder / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors"):
        find(tmp_path, str(folder))
    with pytest.raises(UserError, match=r"manifest\.json"):
        find(tmp_path, str(tmp_path / "nothing"))


def test_a_failed_save_leaves_the_last_one_and_no_rubbish(save, tmp_path, monkeypatch):
    good = save(1)

    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    for room, function in ((manifest, "seal"), (checkpoint, "save_file")):
        monkeypatch.setattr(room, function, full)
        with pytest.raises(UserError, match=r"checkpoint-2: cannot be written \(No space left on device") as failure:
            save(2, keep=1)
        monkeypatch.undo()
        assert failure.value.exit_code == 1
        assert os.listdir(tmp_path) == [good.name]
        assert checkpoint.flaw(good) is None


def test_an_invalid_leftover_of_the_same_step_is_replaced(save):
    damage_empty(save(1) / "optimizer.bin")
    assert checkpoint.flaw(save(1)) is None


def test_two_runs_on_one_folder(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from finetune.folder import Lock\n"
        "lock = Lock(Path(sys.argv[1])); lock.acquire(); print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another run is writing here"):
            Lock(tmp_path).acquire()
    finally:
        other.kill()
        other.wait()
    Lock(tmp_path).acquire()  # a killed owner leaves nothing behind


def test_an_output_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Lock(tmp_path / "file").acquire()


def test_differences_are_named_by_their_path():
    saved = {"seed": 0, "data": {"crop": "center", "flip": False}, "gone": 1}
    current = {"seed": 0, "data": {"crop": "random", "flip": False}}
    assert checkpoint.differences(saved, current) == [
        "data.crop: 'center' in the checkpoint, 'random' now",
        "gone: 1 in the checkpoint, None now",
    ]
    assert checkpoint.differences(saved, json.loads(json.dumps(saved))) == []
