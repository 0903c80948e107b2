"""A file is what it was or what it was to become."""

import pytest

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
        raise OSError


def test_a_failure_leaves_the_old_one_and_nothing_else(tmp_path):
    file = tmp_path / "file"
    file.write_text("one")
    with pytest.raises(OSError):  # noqa: PT011 - the one of this test
        fail_half_way(file)
    assert file.read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
