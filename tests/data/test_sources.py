"""What each kind of source opens to: its splits, rows, labels, and the line that says why it cannot be opened."""

import contextlib
import errno
import io
import json
import os
import pickle

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from finetune.core.errors import UserError
from finetune.data import sources
from finetune.data.sources import open_source
from harness.configs import png
from harness.folders import tar, write_files


def paths(dataset: datasets.Dataset, root) -> list[str]:
    rows = dataset.cast_column("image", datasets.Image(decode=False))["image"]
    return [os.path.relpath(row["path"], root) for row in rows]


def problem(source) -> str:
    """The one line that says why a source cannot be opened."""
    with pytest.raises(UserError) as caught:
        open_source(str(source))
    (line,) = caught.value.problems
    assert line.startswith("data.source: ")
    assert "\n" not in line
    return line


@pytest.mark.slow
def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    digits, splits = load_digits(), open_source("digits").splits
    assert list(splits) == ["train"]
    assert len(splits["train"]) == 1797
    assert splits["train"]["label"][:] == digits.target.tolist()
    pixels = np.asarray(Image.open(io.BytesIO(splits["train"][7]["image"]["bytes"])))
    # 16, the brightest, becomes 255; 8 becomes 127.5, which rounds to the even 128.
    assert (pixels == np.rint(digits.images[7] * 255 / 16)).all()


def test_digits_are_read_from_the_cache_without_scikit_learn(monkeypatch):
    open_source("digits")
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)  # importing it would now fail
    assert len(open_source("digits").splits["train"]) == 1797


def test_a_folder_of_pictures_is_one_split_in_the_order_of_its_names(tmp_path):
    root = write_files(
        tmp_path, "b/2.png", "a.JPG", "b/c/1.webp", ".hidden.png", ".git/x.png", "__MACOSX/y.png", "note.txt"
    )
    source = open_source(str(root))
    assert list(source.splits) == ["train"]
    assert paths(source.splits["train"], root) == ["a.JPG", "b/2.png", "b/c/1.webp"]
    assert source.folders == (str(root),)


def test_class_folders_become_labels(tmp_path):
    root = write_files(tmp_path, "dog/1.png", "cat/2.png", "cat/1.png")
    split = open_source(str(root)).splits["train"]
    assert split.features["label"].names == ["cat", "dog"]
    assert split["label"][:] == [0, 0, 1]
    assert paths(split, root) == ["cat/1.png", "cat/2.png", "dog/1.png"]


@pytest.mark.parametrize("files", [["cat/1.png", "cat/2.png"], ["cat/1.png", "dog/young/2.png"], ["1.png", "2.png"]])
def test_one_folder_or_folders_of_different_depths_give_no_labels(tmp_path, files):
    assert list(open_source(str(write_files(tmp_path, *files))).splits["train"].features) == ["image"]


def test_a_split_in_the_name_of_some_files_does_not_leave_out_the_others(tmp_path):
    """`datasets` alone would take train_station.jpg for the split train, and leave all others out."""
    root = write_files(tmp_path / "one", "train_station.jpg", "test.jpg", "a.jpg")
    assert paths(open_source(str(root)).splits["train"], root) == ["a.jpg", "test.jpg", "train_station.jpg"]
    root = write_files(tmp_path / "two", "train/1.jpg", "test/1.jpg", "plane/1.jpg")  # vehicles and a test, not splits
    split = open_source(str(root)).splits["train"]
    assert split.features["label"].names == ["plane", "test", "train"]
    assert len(split) == 3


def test_folders_of_splits_are_splits(tmp_path):
    root = write_files(tmp_path, "Train/cat/1.png", "Train/dog/2.png", "val/cat/3.png", "test/dog/4.png")
    splits = open_source(str(root)).splits
    assert {name: paths(split, root) for name, split in splits.items()} == {
        "train": ["Train/cat/1.png", "Train/dog/2.png"],
        "validation": ["val/cat/3.png"],
        "test": ["test/dog/4.png"],
    }


def test_only_topmost_folders_are_splits_and_none_under_one_metadata_file(tmp_path):
    root = write_files(tmp_path / "deep", "a/train/1.png", "b/test/2.png")
    assert paths(open_source(str(root)).splits["train"], root) == ["a/train/1.png", "b/test/2.png"]
    root = write_files(tmp_path / "described", "train/1.png", "test/2.png")
    (root / "metadata.csv").write_text("file_name\ntrain/1.png\ntest/2.png\n")
    assert paths(open_source(str(root)).splits["train"], root) == ["test/2.png", "train/1.png"]


@pytest.mark.parametrize("name", ["photos [2020]", "a*b?", "spaces  and ünïcode"])
def test_a_folder_may_have_any_name(tmp_path, name):
    root = write_files(tmp_path / name, "x[1].png", "y.png")
    assert paths(open_source(str(root)).splits["train"], root) == ["x[1].png", "y.png"]
    (root / "metadata.csv").write_text("file_name\nx[1].png\ny.png\n")
    assert paths(open_source(str(root)).splits["train"], root) == ["x[1].png", "y.png"]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_metadata_gives_columns(tmp_path, kind):
    root = write_files(tmp_path, "b.png", "a.png", "train/c.png")
    rows = [("b.png", "boat"), ("a.png", "ant"), ("train/c.png", "cup")]
    if kind == "csv":
        (root / "metadata.csv").write_text("file_name,label\n" + "".join(f"{f},{w}\n" for f, w in rows))
    else:
        lines = (json.dumps({"file_name": f, "label": w}) + "\n" for f, w in rows)
        (root / "metadata.jsonl").write_text("".join(lines))
    split = open_source(str(root)).splits["train"]
    assert paths(split, root) == ["a.png", "b.png", "train/c.png"]
    assert split["label"][:] == ["ant", "boat", "cup"]


def test_rows_of_several_metadata_files_are_sorted_by_path(tmp_path):
    for name in "abcdefgh":
        write_files(tmp_path, f"{name}/1.png")
        (tmp_path / name / "metadata.csv").write_text(f"file_name,label\n1.png,{name}\n")
    assert open_source(str(tmp_path)).splits["train"]["label"][:] == list("abcdefgh")


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "x/../../secret.png", "file:///etc/passwd"])
def test_metadata_cannot_name_a_file_outside_the_source(tmp_path, name):
    write_files(tmp_path, "secret.png")
    root = write_files(tmp_path / "photos", "a.png")
    (root / "metadata.csv").write_text(f"file_name,label\na.png,a\n{name},b\n")
    assert problem(root).endswith(f"found the file_name {name!r}; expected a name inside {root}")


def test_links_are_followed_but_not_in_circles(tmp_path):
    write_files(tmp_path / "elsewhere", "a.png", "b.png")
    root = write_files(tmp_path / "photos", "c.png")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "linked" / "back").symlink_to(root)
    (root / "gone.png").symlink_to(tmp_path / "nothing")
    found = paths(open_source(str(root)).splits["train"], root)
    assert found == ["c.png", "gone.png", "linked/a.png", "linked/b.png"]


def test_the_fingerprint_follows_a_pictures_size_and_time(tmp_path):
    write_files(tmp_path, "a.png", "b.png")

    def fingerprint() -> str:
        return open_source(str(tmp_path)).splits["train"]._fingerprint

    os.utime(tmp_path / "a.png", ns=(10**18, 10**18))
    first = fingerprint()
    assert fingerprint() == first
    os.utime(tmp_path / "a.png", ns=(10**18, 10**18 + 10**6))
    second = fingerprint()
    (tmp_path / "a.png").write_bytes(b"longer")
    os.utime(tmp_path / "a.png", ns=(10**18, 10**18))
    assert len({first, second, fingerprint()}) == 3


TABLE = pa.table({"image": [{"bytes": png(), "path": "x.png"}] * 3, "label": [2, 1, 2]})


def test_parquet_files_by_name_glob_and_folder(tmp_path):
    for name in ("one.parquet", "two[1].parquet"):
        pq.write_table(TABLE, tmp_path / name)
    (tmp_path / "README.md").write_text("# About")
    (tmp_path / "sizes.csv").write_text("a,b\n")
    for source, count in (("one.parquet", 3), ("*.parquet", 6), ("", 6)):
        opened = open_source(str(tmp_path / source))
        assert {name: len(split) for name, split in opened.splits.items()} == {"train": count}
        assert opened.folders == ()  # no path in a row is followed


def test_splits_of_shards_are_read_from_their_names(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"):
        pq.write_table(TABLE, tmp_path / "data" / f"{name}.parquet")
    splits = open_source(str(tmp_path)).splits
    assert {name: len(split) for name, split in splits.items()} == {"train": 6, "validation": 3}
    pq.write_table(TABLE, tmp_path / "data" / "extra.parquet")  # its name has no split, so that all files are one
    assert {name: len(split) for name, split in open_source(str(tmp_path)).splits.items()} == {"train": 12}


def test_saved_datasets(tmp_path):
    saved = datasets.Dataset(TABLE)
    saved.save_to_disk(tmp_path / "one")
    assert {name: len(split) for name, split in open_source(str(tmp_path / "one")).splits.items()} == {"train": 3}
    datasets.DatasetDict(train=saved, test=saved.select([0])).save_to_disk(tmp_path / "two")
    splits = open_source(str(tmp_path / "two")).splits
    assert {name: len(split) for name, split in splits.items()} == {"train": 3, "test": 1}


def test_arrow_files(tmp_path):
    datasets.Dataset(TABLE).save_to_disk(tmp_path)
    assert len(open_source(str(tmp_path / "*.arrow")).splits["train"]) == 3


def test_tar_files(tmp_path):
    one = tar(tmp_path / "one.tar", {"a.png": png(), "a.cls": b"3", "b.png": png(), "b.cls": b"4"})
    tar(tmp_path / "two.tar", {"c.png": png(), "c.cls": b"5"})
    split = open_source(one).splits["train"]
    assert isinstance(split.features["png"], datasets.Image)
    assert split["cls"][:] == [3, 4]
    assert open_source(str(tmp_path)).splits["train"]["cls"][:] == [3, 4, 5]


def test_names_in_a_tar_create_no_files(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    path = tar(inside / "x.tar", {"../../escaped.png": png(), "/finetune-escaped.png": png()})
    assert len(open_source(path).splits["train"]) == 2
    assert [file.name for file in tmp_path.rglob("*")] == ["inside", "x.tar"]
    assert not os.path.exists("/finetune-escaped.png")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_in_a_tar_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    hostile = pickle.dumps(Bomb())
    for kind in ("pth", "npy", "pyd", "pickle"):
        source = tar(tmp_path / f"{kind}.tar", {f"a.{kind}": hostile, "a.png": png()})
        with contextlib.suppress(UserError):  # whether read as bytes or refused
            open_source(source)
        assert not (tmp_path / "ran").exists()


def test_dataset_scripts_are_not_run(tmp_path):
    root = write_files(tmp_path / "photos", "a.png")
    (root / "photos.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})")
    assert len(open_source(str(root)).splits["train"]) == 1
    assert not (tmp_path / "ran").exists()


def test_a_source_that_cannot_be_opened_is_a_one_line_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path, "notes/a.txt", "mixed/a.parquet", "mixed/b.png", "mixed/c.png", "photo.png", "table.csv")
    os.mkdir("empty")
    assert f"found nothing to read in the folder {tmp_path}/empty, expected files of one kind" in problem("empty")
    assert "found nothing to read" in problem("notes")
    assert "found 2 .png and 1 .parquet in the folder" in problem("mixed")
    assert "found photo.png, files of unsupported or mixed types: 1 .png; expected digits, a folder" in problem(
        "photo.png"
    )
    assert "unsupported or mixed types: 1 .csv, 1 .png" in problem("*.*")
    assert f"found nothing at {tmp_path}/no/such/folder; expected" in problem("no/such/folder")
    assert "found nothing" in problem("./digits")
    assert "found nothing" in problem("*.parquet")
    assert "found nothing" in problem("csv")  # the name of a reader, which would read the working directory
    for name in ("nobody", "nobody/nothing"):
        assert "no such folder or file here, and the hub cannot be reached" in problem(name)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but not for long")
    (tmp_path / "broken.tar").write_bytes(b"no archive")
    for name in ("broken.parquet", "broken.tar"):
        assert problem(name).startswith(f"data.source: {tmp_path}/{name} is damaged or of another type: ")
    os.mkdir("saved")
    (tmp_path / "saved" / "state.json").write_text("{")
    assert problem("saved").startswith("data.source: saved: ")


def test_messages_for_a_full_disk_and_an_unreachable_hub(monkeypatch):
    def fails(error: Exception) -> str:
        def build(*_, **__):
            raise error

        monkeypatch.setattr(sources, "build", build)
        return problem("someone/something")

    full = datasets.exceptions.DatasetGenerationError("An error occurred while generating the dataset")
    full.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert f"no room in the datasets cache {datasets.config.HF_DATASETS_CACHE}: free some space" in fails(full)
    gone = datasets.exceptions.DatasetNotFoundError("Dataset 'someone/something' doesn't exist on the Hub.")
    assert "nor on the hub (Dataset 'someone/something' doesn't exist on the Hub.)" in fails(gone)
    assert "the network" in fails(ConnectionError("Couldn't reach it"))
    assert fails(ValueError("two\nlines")).endswith(": two lines")
    assert fails(KeyError()).endswith(": KeyError")
    several = ValueError(
        "Config name is missing.\nPlease pick one: ['full', 'tiny']\nExample of usage:\n\t`load_dataset()`"
    )
    assert fails(several).endswith(
        "Please pick one: ['full', 'tiny']; download the files of one, and set data.source to them"
    )


def test_a_row_is_described_by_its_file_or_number(tmp_path):
    source = sources.Source({}, ("/photos",))
    assert source.describe(7, {"path": "/photos/cat/1.png"}) == "cat/1.png"
    assert source.describe(7, {"path": "cat.png"}) == "row 7 (cat.png)"
    assert source.describe(7, {"path": None}) == source.describe(7, None) == "row 7"
    assert source.describe(7, {"path": "a\x1b[2J\nb.png"}) == r"row 7 ('a\x1b[2J\nb.png')"


def test_saved_datasets_in_folders_below_are_not_read_as_one(tmp_path):
    for name in ("cats", "dogs"):
        datasets.Dataset.from_dict({"image": [{"bytes": png(), "path": None}]}).save_to_disk(tmp_path / "all" / name)
    with pytest.raises(
        UserError, match=r"found 2 saved dataset\(s\) in folders below .*: cats, dogs; give the folder of one"
    ):
        open_source(str(tmp_path / "all"))
