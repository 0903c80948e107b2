"""Which files are whose split, by hand; what is taken for none is said."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune.data.sources import open_source
from finetune.data.splits import missing_shards, splits_of
from harness.configs import png
from harness.folders import write_files


@pytest.mark.parametrize(
    ("files", "splits", "labels"),
    [
        ("train/cat/1 train/dog/2 val/cat/3", {"train": [0, 1], "validation": [0]}, ["cat", "dog"]),
        # below folders that all pictures share, as an archive unpacks to
        ("data/train/cat/1 data/train/dog/2 data/test/dog/3", {"test": [1], "train": [0, 1]}, ["cat", "dog"]),
        ("a/b/Training/cat/1 a/b/dev/dog/2", {"train": [0], "validation": [1]}, ["cat", "dog"]),
        # with further words
        ("training_set/cat/1 test_set/dog/2", {"test": [1], "train": [0]}, ["cat", "dog"]),
        ("seg_train/cat/1 seg_test/dog/2", {"test": [1], "train": [0]}, ["cat", "dog"]),
        # folders of splits are no classes
        ("train/1 test/2", {"test": None, "train": None}, None),
        ("x/train-2020/1 x/train-2021/2 x/val-2021/3", {"train": None, "validation": None}, None),
        # not every picture is in such a folder, or none is of `train`
        ("train/1 test/2 plane/3", {"train": [2, 1, 0]}, ["plane", "test", "train"]),
        ("test_tube/1 bottle/2", {"train": [1, 0]}, ["bottle", "test_tube"]),
        ("test_tube/1 dev_board/2", {"train": [1, 0]}, ["dev_board", "test_tube"]),
        ("train_station/1 train_cabin/2", {"train": [1, 0]}, ["train_cabin", "train_station"]),
        ("mine/test/1 mine/test/2", {"train": None}, None),
        ("test/1 test/2", {"test": None}, None),
    ],
)
def test_splits_and_classes_of_folders(tmp_path, files, splits, labels):
    """`labels` of the first row, sorted by name, are numbers of the sorted classes."""
    source = open_source(str(write_files(tmp_path, *(f"{file}.png" for file in files.split()))))
    found = {name: split["label"][:] if "label" in split.features else None for name, split in source.splits.items()}
    expected = {name: numbers and sorted(numbers) for name, numbers in splits.items()}
    assert {name: numbers and sorted(numbers) for name, numbers in found.items()} == expected
    features = next(iter(source.splits.values())).features
    assert (features["label"].names if "label" in features else None) == labels


@pytest.mark.parametrize(
    ("files", "folders"),
    [
        (["cat/train/1.png", "cat/test/2.png", "dog/train/3.png"], "test, train"),
        (["seg_train/1.png", "seg_test/2.png", "seg_pred/3.png"], "seg_test, seg_train"),
        (["train/1.png", "test/2.png", "val/3.png", "x.png"], "test, train, val"),
    ],
)
def test_folders_that_are_not_taken_for_splits_are_noted(tmp_path, files, folders):
    source = open_source(str(write_files(tmp_path, *files)))
    assert [*source.splits] == ["train"]
    assert source.notes[1:] == [
        f"not taken for splits, as not every picture is in one at the same depth: folders named {folders}"
    ]


def test_metadata_belongs_to_the_split_that_it_lies_in(tmp_path):
    write_files(tmp_path, "data/train/1.png", "data/test/1.png")
    for split in ("train", "test"):
        (tmp_path / f"data/{split}/metadata.csv").write_text(f"file_name,label\n1.png,{split}ed\n")
    opened = open_source(str(tmp_path)).splits
    assert {name: split["label"][:] for name, split in opened.items()} == {"test": ["tested"], "train": ["trained"]}


def test_one_metadata_file_above_the_folders_of_splits_describes_all(tmp_path):
    files = ["data/train/1.png", "data/test/2.png"]
    assert splits_of(files, "imagefolder", ["data/metadata.csv"]) == {"train": files}
    assert len(splits_of(files, "imagefolder", ["data/train/metadata.csv"])) == 2


def test_shards_that_a_series_lacks_are_noted(tmp_path):
    for name in ("train-00000-of-00003", "train-00002-of-00003", "test-00000-of-00001"):
        pq.write_table(pa.table({"image": [{"bytes": png(), "path": None}]}), tmp_path / f"{name}.parquet")
    assert open_source(str(tmp_path)).notes[1:] == ["missing 1 of 3 shards of train-*-of-00003"]
    assert open_source(f"file://{tmp_path}").notes[1:] == ["missing 1 of 3 shards of train-*-of-00003"]
    assert missing_shards(["a/x-00001-of-00002.tar", "b/x-00000-of-00002.tar", "00000-of-00001.tar", "y.tar"]) == [
        "missing 1 of 2 shards of a/x-*-of-00002",
        "missing 1 of 2 shards of b/x-*-of-00002",
    ]
