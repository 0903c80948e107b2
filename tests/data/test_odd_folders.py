"""Folders as disks and people make them: pipes, links in circles, names of two lines, endings in capitals."""

import os
import socket

import datasets
import pytest
from PIL import Image

from finetune.config.inputs import DataConfig
from finetune.core.errors import UserError
from finetune.core.kind import ImageFormat
from finetune.data.loading import load_data
from finetune.data.sources import open_source
from harness.configs import tiny_config, write_config
from harness.folders import write_files
from harness.processes import run


def load(root, captioned=False, **options):
    data = DataConfig(source=str(root), validation_fraction=0.0, **options)
    return load_data(data, ImageFormat(1, 8), 0, captioned=captioned)[0]


def problems(root, **options) -> list[str]:
    with pytest.raises(UserError) as caught:
        load(root, **options)
    assert not any("\n" in line for line in caught.value.problems)
    return list(caught.value.problems)


METADATA = "metadata.csv", "metadata.jsonl", "metadata.parquet"


@pytest.mark.parametrize("name", METADATA)
@pytest.mark.parametrize("kind", ["pipe", "socket", "broken link", "folder"])
def test_metadata_that_is_no_file_is_refused_and_not_waited_for(tmp_path, monkeypatch, name, kind):
    root = write_files(tmp_path / "x", "sub/a.png")
    monkeypatch.chdir(root / "sub")
    with socket.socket(socket.AF_UNIX) as end:
        make = {
            "pipe": os.mkfifo,
            "socket": end.bind,
            "broken link": lambda name: os.symlink("nowhere", name),
            "folder": os.mkdir,
        }
        make[kind](name)
        if kind == "folder":
            assert len(load(root)) == 1  # which is only a folder of that name
            return
        assert problems(root) == [
            f"data.source: {root}: found sub/{name}, which is a metadata file by its name and no regular file (a "
            "broken link, a named pipe or a socket); replace or remove it"
        ]


OTHERS = "README.md", ".huggingface.yaml", "dataset_infos.json", "state.json", "dataset_dict.json", "x.psd", "x.txt"


@pytest.mark.parametrize("name", OTHERS)
def test_other_pipes_are_left_out(tmp_path, name):
    root = write_files(tmp_path, "a.png")
    os.mkfifo(root / name)
    images = load(root)
    assert len(images) == 1
    assert any(note.startswith("left out ") and name in note for note in images.notes)


def test_a_pipe_by_the_name_of_a_picture_or_a_caption_is_named(tmp_path):
    root = write_files(tmp_path, "a.png")
    (root / "a.txt").write_text("a cat")
    os.mkfifo(root / "b.png")
    assert problems(root)[1:] == ["b.png: is not a regular file"]
    (root / "b.png").unlink()
    (root / "a.txt").unlink()
    os.mkfifo(root / "a.txt")
    assert "found no caption in the files beside the pictures for 1 of 1" in problems(root, captioned=True)[0]


def test_a_folder_with_a_pipe_ends_in_one_line(tmp_path):
    """The whole script, within its minute."""
    root = write_files(tmp_path / "pictures", "a.png")
    os.mkfifo(root / "metadata.jsonl")
    outcome = run("--config", write_config(tmp_path / "c.yaml", tiny_config(root, tmp_path / "run")), folder=tmp_path)
    assert outcome.returncode == 2
    assert "found metadata.jsonl, which is a metadata file by its name and no regular file" in outcome.error
    assert not (tmp_path / "run").exists()


def test_links_in_circles_are_followed_once(tmp_path):
    write_files(tmp_path, "cat/a.png", "dog/b.png")
    (tmp_path / "cat/up").symlink_to(tmp_path)
    (tmp_path / "dog/self").symlink_to(".")
    (tmp_path / "me").symlink_to("me")
    source = open_source(str(tmp_path))
    assert source.notes == [
        "found 2 pictures: 2 .png",
        "left out other files (1): 1 without extension (me)",
        "left out links to folders that are read already (2): 2 without extension (cat/up, dog/self)",
    ]
    (tmp_path / "c.png").symlink_to("c.png")
    (tmp_path / "d.png").symlink_to("nowhere.png")
    assert problems(tmp_path)[1:] == [
        "c.png: cannot be read: Too many levels of symbolic links",
        "d.png: does not exist",
    ]
    assert len(load(tmp_path, on_bad_image="skip")) == 2


@pytest.fixture
def locked(monkeypatch):
    """Files that may not be read, by name; a mode of 000 does not keep root out."""
    names = set()
    opened, allowed = open, os.access

    def refuse(file, *arguments, **options):
        if os.path.basename(str(file)) in names:
            raise PermissionError(13, "Permission denied", str(file))
        return opened(file, *arguments, **options)

    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr(os, "access", lambda file, mode: os.path.basename(file) not in names and allowed(file, mode))
    return names


def test_a_picture_that_may_not_be_read_is_a_bad_one(tmp_path, locked):
    write_files(tmp_path, "a.png", "b.png", "c.png")
    locked.add("b.png")
    assert problems(tmp_path)[1:] == ["b.png: cannot be read: Permission denied"]
    assert len(load(tmp_path, on_bad_image="skip")) == 2


@pytest.mark.parametrize("name", ["x.parquet", "metadata.csv"])
def test_another_file_that_may_not_be_read_is_named(tmp_path, locked, name):
    write_files(tmp_path, *(["a.png"] if name == "metadata.csv" else []))
    datasets.Dataset.from_dict({"file_name": ["a.png"]}).to_parquet(tmp_path / name)
    locked.add(name)
    (problem,) = problems(tmp_path)
    assert f"{tmp_path / name}" in problem
    assert "permission" in problem.lower()
    assert problem.endswith("; change its permissions, or leave it out")


def test_names_of_two_lines_stay_on_one(tmp_path):
    write_files(tmp_path, "a\nb.png", "x\ny/c\td.png", "odd\n.txt")
    (tmp_path / "bad\nname.png").write_bytes(b"x")
    named = r"'bad\nname.png': is not a picture in any known format, or damaged at its start"
    assert problems(tmp_path)[1:] == [named]
    images = load(tmp_path, on_bad_image="skip")
    assert len(images) == 2
    assert not any("\n" in note for note in images.notes)
    (tmp_path / "x\ny/metadata.csv").symlink_to("nowhere")
    assert r"found 'x\ny/metadata.csv', which" in problems(tmp_path)[0]


@pytest.mark.parametrize("name", ["METADATA.CSV", "Metadata.csv", "metadata.JSONL"])
def test_metadata_is_read_whatever_the_case_of_its_name(tmp_path, name):
    write_files(tmp_path, "a.png", "b.png")
    rows = '{"file_name": "a.png", "text": "one"}\n' if "JSONL" in name else "file_name,text\na.png,one\n"
    (tmp_path / name).write_text(rows)
    images = load(tmp_path, captioned=True)
    assert images.captions.texts == ["one"]
    assert images.notes[1] == "left out 1 of 2 pictures, which no metadata file names: 1 .png (b.png)"


def test_captions_are_read_whatever_the_case_of_their_ending(tmp_path):
    write_files(tmp_path, "a.PNG", "b.Jpg", "c.png")
    for name in ("a.TXT", "b.txt", "c.txt", "other.TXT"):
        (tmp_path / name).write_text(f"caption of {name}")
    (tmp_path / "c.TXT").write_text("another")  # of two the one in small letters
    images = load(tmp_path, captioned=True)
    assert images.captions.texts == ["caption of a.TXT", "caption of b.txt", "caption of c.txt"]
    assert images.notes[1] == "left out other files (1): 1 .txt (other.TXT)"


def test_a_picture_that_several_rows_name_is_noted(tmp_path):
    write_files(tmp_path, "a.png", "sub/b.png")
    (tmp_path / "metadata.csv").write_text("file_name,label\na.png,x\n./a.png,y\nsub\\b.png,x\n")
    images = load(tmp_path)
    assert len(images) == 3
    assert images.notes[1] == "named by several rows, each of which is an image: 1 .png (a.png)"


def test_json_that_is_one_list_says_what_is_expected(tmp_path):
    write_files(tmp_path, "a.png")
    (tmp_path / "metadata.jsonl").write_text('[{"file_name": "a.png"}]\n')
    assert problems(tmp_path) == [
        f"data.source: {tmp_path}/metadata.jsonl: cannot be read: its first line is no mapping; expected {{...}} for "
        "each picture, a line each"
    ]


def test_tables_that_windows_wrote_are_read(tmp_path):
    """A byte order mark, carriage returns, backslashes, and a value of two lines."""
    write_files(tmp_path, "a.png", "sub/b.png")
    rows = b'\xef\xbb\xbffile_name,text\r\na.png,one\r\nsub\\b.png,"two\r\nlines"\r\n'
    (tmp_path / "metadata.csv").write_bytes(rows)
    assert load(tmp_path, captioned=True).captions.texts == ["one", "two lines"]
    (tmp_path / "metadata.csv").write_text("file_name,text\n/a.png,one\n")
    expected = f"found the file_name '/a.png'; expected a name inside {tmp_path}"
    assert expected in problems(tmp_path, captioned=True)[0]
    (tmp_path / "metadata.csv").write_bytes("file_name,text\na.png,one\n".encode("utf-16"))
    assert "found no UTF-8 at byte 0; expected text in UTF-8" in problems(tmp_path, captioned=True)[0]


def test_pictures_of_no_or_one_or_too_many_pixels_are_named(tmp_path):
    write_files(tmp_path, "a.png")
    (tmp_path / "empty.png").write_bytes(b"")
    Image.new("L", (1, 9)).save(tmp_path / "narrow.png")
    (tmp_path / "nothing.gif").write_bytes(b"GIF89a\0\0\0\0\0\0\0;")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    found = dict(line.split(": ", 1) for line in problems(tmp_path)[1:])
    assert found["bomb.png"].startswith("is too large: Image size (400000000 pixels) exceeds limit")
    assert found["empty.png"] == "is empty (0 bytes)"
    assert found["narrow.png"] == "is 1 x 9 pixels, expected at least 2 a side"
    assert found["nothing.gif"].startswith("is a GIF picture of a kind that Pillow does not decode")
    assert len(found) == 4


def test_names_that_mean_something_to_a_shell_are_names(tmp_path):
    assert len(load(write_files(tmp_path, "a[1].png", "[b]/c*.png", "{d}/e?.png", "$HOME.png", "~.png", "-f.png"))) == 6
