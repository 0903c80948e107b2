"""A file is what it was or what it was to become."""

import pytest

from finetune.errors import UserError
from finetune.files import whole


def test_a_file_takes_its_place_when_it_is_done(tmp_path):
    file = tmp_path / "new" / "file"
    with whole(file) as partial:
        partial.write_text("one")
        assert not file.exists()
    assert file.read_text() == "one"


def fail_half_way(file):
    with whole(file) as partial:
        partial.write_text("tw")
        raise OSError(28, "No space left on device")


def test_a_failure_leaves_the_old_one_and_nothing_else(tmp_path):
    file = tmp_path / "file"
    file.write_text("one")
    with pytest.raises(UserError, match="No space left on device") as failure:
        fail_half_way(file)
    assert f"{file}: cannot be written" in str(failure.value)
    assert file.read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
