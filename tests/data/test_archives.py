"""A tar file is read as a whole, or one line says what would be lost."""

import gzip
import tarfile
from pathlib import Path

import pytest

from finetune.core.errors import UserError
from finetune.data.sources import open_source
from harness.configs import png
from harness.folders import tar

PICTURES = {f"{number}.png": png(seed=number) for number in range(7)}
TEXTS = {f"{number}.txt": b"words" for number in range(7)}


def problem(source) -> str:
    with pytest.raises(UserError) as caught:
        open_source(str(source))
    (line,) = caught.value.problems
    assert "\n" not in line
    return line


def rows(source) -> int:
    return len(open_source(str(source)).splits["train"])


def offsets(path) -> list[int]:
    with tarfile.open(path) as archive:
        return [member.offset for member in archive]


@pytest.mark.parametrize("into", [0, 100, 511])
def test_a_tar_that_is_cut_between_two_files_is_refused(tmp_path, into):
    path = Path(tar(tmp_path / "x.tar", PICTURES))
    data, place = path.read_bytes(), offsets(path)[3]
    path.write_bytes(data[: place + into])
    assert problem(path).startswith(f"data.source: {path} is cut off at byte {place:,}, where a file or the end")
    path.write_bytes(data)
    assert rows(path) == 7  # what was refused is looked at again


def test_a_tar_without_an_end_is_refused_also_in_a_folder(tmp_path):
    path = Path(tar(tmp_path / "x" / "b.tar", PICTURES) if (tmp_path / "x").mkdir() is None else "")
    tar(tmp_path / "x" / "a.tar", PICTURES)
    data = path.read_bytes().rstrip(b"\0")
    path.write_bytes(data.ljust(-(-len(data) // 512) * 512, b"\0"))
    assert f"{path} is cut off at byte" in problem(tmp_path / "x")


def test_a_tar_with_a_damaged_header_is_refused(tmp_path):
    path = Path(tar(tmp_path / "x.tar", PICTURES))
    place, data = offsets(path)[3], bytearray(path.read_bytes())
    data[place : place + 4] = b"\xff\xff\xff\xff"
    path.write_bytes(data)
    assert problem(path).startswith(f"data.source: {path} is damaged at byte {place:,}")


def test_joined_tars_are_refused(tmp_path):
    path = Path(tar(tmp_path / "x.tar", PICTURES))
    path.write_bytes(path.read_bytes() * 2)
    assert "goes on after its end, as joined archives do, and only the first would be read" in problem(path)


def test_a_compressed_tar_is_looked_at_too(tmp_path):
    whole = Path(tar(tmp_path / "plain.tar", PICTURES))
    data = whole.read_bytes()
    (tmp_path / "x.tar").write_bytes(gzip.compress(data))
    assert rows(tmp_path / "x.tar") == 7
    (tmp_path / "y.tar").write_bytes(gzip.compress(data[: offsets(whole)[3]]))
    assert "is cut off" in problem(tmp_path / "y.tar")
    (tmp_path / "z.tar").write_bytes(gzip.compress(data)[:-20])
    assert problem(tmp_path / "z.tar").startswith(f"data.source: {tmp_path}/z.tar ")


@pytest.mark.parametrize("first", [1, 5, 6])
def test_files_that_the_first_row_lacks_are_not_lost(tmp_path, first):
    later = {
        name: data for number in range(first, 7) for name, data in ((f"{number}.png", png()), (f"{number}.txt", b"x"))
    }
    path = tar(tmp_path / "x.tar", {f"{number}.png": png() for number in range(first)} | later)
    assert problem(path) == (
        f"data.source: found rows with different files in x.tar: '0' has .png and '{first}' has .png, .txt; expected "
        "the same in all rows: unpack the files and set data.source to the folder"
    )


def test_files_that_only_the_first_archive_lacks_are_not_lost(tmp_path):
    tar(tmp_path / "a.tar", PICTURES)
    both = sorted((PICTURES | TEXTS).items())
    tar(tmp_path / "b.tar", dict(both))
    assert "in a.tar, b.tar: '0' has .png and '0' has .png, .txt" in problem(tmp_path)
    assert rows(tmp_path / "b.tar") == 7


def test_later_rows_may_lack_what_the_first_has(tmp_path):
    files = dict(sorted((PICTURES | TEXTS).items()))
    path = tar(tmp_path / "x.tar", {name: data for name, data in files.items() if name != "6.txt"})
    assert open_source(path).splits["train"]["txt"][:] == ["words"] * 6 + [None]


def test_a_tar_sorted_by_kind_is_refused(tmp_path):
    path = tar(tmp_path / "x.tar", PICTURES | TEXTS)
    assert f"{path}: the files of '0' do not follow one another" in problem(path)


def test_pictures_without_an_extension_are_not_passed_over(tmp_path):
    assert "found the picture 'b', which would be left out" in problem(
        tar(tmp_path / "x.tar", {"a.png": png(), "b": png()})
    )
    assert rows(tar(tmp_path / "y.tar", {"a.png": png(), "LICENSE": b"free", "._a": png()})) == 1
    assert "found no rows in z.tar" in problem(tar(tmp_path / "z.tar", {"LICENSE": b"free"}))


def test_a_class_that_is_no_integer_is_named(tmp_path):
    path = tar(tmp_path / "x.tar", {"a.png": png(), "a.cls": b"cat"})
    assert problem(path) == f"data.source: {path}: found b'cat' in 'a.cls', expected an integer; texts are named .txt"


@pytest.mark.parametrize("name", ["data/._0.png", "data/.DS_Store"])
def test_hidden_files_in_folders_of_a_tar_are_refused_by_name(tmp_path, name):
    """macOS adds ._0.png to each 0.png; up to its first dot the name is `data/`, a row of its own."""
    files = {name: b"", **{f"data/{file}": data for file, data in PICTURES.items()}}
    line = problem(tar(tmp_path / "x.tar", files))
    assert line.startswith(f"data.source: {tmp_path}/x.tar: found the hidden file '{name}', which would become a row")
    assert rows(tar(tmp_path / "y.tar", {"./._0.png": b"", **PICTURES})) == 7  # without a folder it is passed over


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])  # tar stores the second name of a file as a link
def test_links_in_a_tar_are_not_passed_over(tmp_path, kind):
    path = tar(tmp_path / "x.tar", PICTURES)
    for name, refused in (("LATEST", False), ("9.png", True)):
        with tarfile.open(path, "a") as archive:
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "0.png"
            archive.addfile(link)
        if refused:
            assert f"{path}: found '9.png', a link to '0.png', which would be left out; pack" in problem(path)
        else:
            assert rows(path) == 7
