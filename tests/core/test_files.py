"""Atomic writes: a file is replaced completely or not at all."""

import pytest

from finetune.core.errors import UserError
from finetune.core.files import atomic


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
