"""Safe writes: a file is replaced completely or not at all, only where there is room, for all who may read it."""

import os
import stat
from collections import namedtuple

import pytest
import torch
from safetensors.torch import save_file

from finetune.core.errors import UserError
from finetune.core.files import atomic, permit, require_room


def test_a_file_appears_when_the_block_ends(tmp_path):
    file = tmp_path / "new" / "file"
    with atomic(file) as partial:
        partial.write_text("one")
        assert not file.exists()
    assert file.read_text() == "one"


def fail_half_way(file):
    with atomic(file) as partial:
        partial.write_text("tw")
        raise OSError(28, "No space left on device")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "file"
    file.write_text("one")
    with pytest.raises(UserError) as failure:
        fail_half_way(file)
    assert str(failure.value).startswith(f"{file}: cannot be written (No space left on device, ")
    assert failure.value.exit_code == 1
    assert file.read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_too_little_room_is_refused_with_both_numbers(tmp_path, monkeypatch):
    disk = namedtuple("Disk", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: disk(5000, 3766, 1234))
    require_room("output_dir: there", tmp_path / "not" / "there", 1234, "files", "or set another")
    with pytest.raises(UserError) as failure:
        require_room("output_dir: here", tmp_path, 1235, "files", "or set another")
    assert str(failure.value) == (
        "output_dir: here: found 1,234 bytes free, expected 1,235 for files; free some, or set another"
    )


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_of_safetensors_get_the_permissions_of_other_new_files(tmp_path, umask, mode):
    """It makes them for their owner alone, who would be the only one to resume or load them from a shared folder."""
    before = os.umask(umask)
    try:
        save_file({"weight": torch.zeros(1)}, tmp_path / "weights.safetensors")
        assert stat.S_IMODE((tmp_path / "weights.safetensors").stat().st_mode) == 0o600
        permit(tmp_path.glob("*"))
        assert stat.S_IMODE((tmp_path / "weights.safetensors").stat().st_mode) == mode
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
