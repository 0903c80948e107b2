"""Files that are not what their name says end in one line that says which, and what to do."""

import os

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune.config.inputs import DataConfig
from finetune.core.errors import UserError
from finetune.core.kind import ImageFormat
from finetune.data.loading import load_data
from finetune.data.sources import open_source
from harness.configs import png
from harness.folders import POINTER, tar, write_files


def load(source, **options):
    return load_data(DataConfig(source=str(source), validation_fraction=0.0, **options), ImageFormat(1, 8), 0)[0]


def problems(source, **options) -> list[str]:
    with pytest.raises(UserError) as caught:
        load(source, **options)
    assert not any("\n" in line for line in caught.value.problems)
    return list(caught.value.problems)


def table(count: int = 3, **columns) -> pa.Table:
    return pa.table({"image": [{"bytes": png(seed=seed), "path": None} for seed in range(count)], **columns})


PULL = "is a git-lfs pointer instead of the picture: run `git lfs pull` in its repository"


def test_a_picture_that_is_a_git_lfs_pointer_is_named(tmp_path):
    write_files(tmp_path, "a.png", "b.png")
    (tmp_path / "b.png").write_bytes(POINTER)
    assert problems(tmp_path)[1:] == [f"b.png: {PULL}"]
    assert f"  b.png: {PULL}" in load(tmp_path, on_bad_image="skip").notes
    (tmp_path / "b.png").write_bytes(png(seed=1))  # as git lfs pull does
    assert len(load(tmp_path)) == 2


def test_a_picture_inside_a_table_or_tar_may_be_a_git_lfs_pointer(tmp_path):
    pq.write_table(
        pa.table({"image": [{"bytes": POINTER, "path": "x.png"}, {"bytes": png(), "path": None}]}),
        tmp_path / "x.parquet",
    )
    assert problems(tmp_path / "x.parquet")[1:] == [f"row 0 (x.png): {PULL}"]
    assert problems(tar(tmp_path / "x.tar", {"a.png": png(), "b.png": POINTER}))[1:] == [f"row 1 (b.png): {PULL}"]


@pytest.mark.parametrize(
    ("pointer", "source"),
    [
        ("x.parquet", "x.parquet"),
        ("x.tar", "x.tar"),
        ("x.arrow", "*.arrow"),
        ("x.parquet", ""),
        ("deep/train/x.tar", ""),
        ("metadata.csv", ""),
        ("metadata.parquet", ""),
    ],
)
def test_a_file_that_is_a_git_lfs_pointer_is_named(tmp_path, pointer, source):
    (tmp_path / pointer).parent.mkdir(parents=True, exist_ok=True)
    if "metadata" in pointer:
        write_files(tmp_path, "a.png")
    (tmp_path / pointer).write_bytes(POINTER)
    assert problems(tmp_path / source) == [
        f"data.source: found a git-lfs pointer instead of a file: {tmp_path / pointer}; run `git lfs pull` in its "
        "repository"
    ]


def test_several_git_lfs_pointers_are_counted(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.parquet").write_bytes(POINTER)
    assert f": {tmp_path}/a.parquet and 2 more; run `git lfs pull`" in problems(tmp_path)[0]


def test_a_saved_dataset_of_git_lfs_pointers_is_named(tmp_path):
    datasets.Dataset(table()).save_to_disk(tmp_path / "x")
    (arrow,) = (tmp_path / "x").glob("*.arrow")
    arrow.write_bytes(POINTER)
    assert f"found a git-lfs pointer instead of a file: {arrow}" in problems(tmp_path / "x")[0]


@pytest.mark.parametrize("alike", [0, 1, 6])  # `datasets` looks at the first five rows
def test_a_tar_with_pictures_of_several_types_is_refused(tmp_path, alike):
    rows = {f"{number}.jpg": png(seed=number) for number in range(alike)} | {"x.png": png(), "y.jpg": png()}
    first, second = ("'0' has .jpg", "'x' has .png") if alike else ("'x' has .png", "'y' has .jpg")
    path = tar(tmp_path / "x.tar", rows)
    assert problems(path) == [
        f"data.source: found rows with pictures of different types in x.tar: {first} and {second}; expected one type "
        "in all rows: convert them, or unpack the files and set data.source to the folder"
    ]


def test_tars_with_pictures_of_different_types_are_refused(tmp_path):
    tar(tmp_path / "a.tar", {"1.jpg": png(), "2.jpg": png()})
    tar(tmp_path / "b.tar", {"1.png": png()})
    assert "in a.tar, b.tar: '1' has .jpg and '1' has .png" in problems(tmp_path)[0]


def test_rows_of_a_tar_may_have_several_pictures_or_none(tmp_path):
    pairs = {f"{number}.{kind}": png() for number in range(7) for kind in ("jpg", "mask.png")}
    assert len(load(tar(tmp_path / "pairs.tar", pairs), image_column="jpg")) == 7
    rows = {name: png() for number in range(7) for name in (f"{number}.jpg", f"{number}.txt")}
    path = tar(
        tmp_path / "none.tar",
        {**{name: data if "jpg" in name else b"text" for name, data in rows.items()}, "8.txt": b"x"},
    )
    assert problems(path)[1:] == ["row 7: has no picture"]


LATIN = b"caf\xe9"  # in ISO 8859-1


@pytest.mark.parametrize("name", [LATIN + b".png", b"x/" + LATIN + b".png", LATIN + b"/x.png", LATIN + b".parquet"])
def test_a_file_name_that_is_not_utf8_is_named(tmp_path, name):
    path = os.path.join(os.fsencode(tmp_path), name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(png())
    assert problems(tmp_path) == [f"data.source: {tmp_path}: found the name {name!r}, expected one in UTF-8; rename it"]


def test_other_files_may_have_names_that_are_not_utf8(tmp_path):
    write_files(tmp_path, "a.png")
    open(os.path.join(os.fsencode(tmp_path), LATIN + b".txt"), "w").close()
    assert open_source(str(tmp_path)).notes[1] == r"left out other files (1): 1 .txt ('caf\udce9.txt')"
    (tmp_path / "metadata.csv").write_text("file_name\na.png\n")
    assert len(load(tmp_path)) == 1


def test_a_name_in_a_tar_that_is_not_utf8_is_named(tmp_path):
    path = tar(tmp_path / "x.tar", {"a.png": png(), os.fsdecode(LATIN + b".png"): png()})
    assert problems(path) == [f"data.source: {path}: found the name {LATIN!r}, expected one in UTF-8; rename it"]


NO_ROWS = "found no rows; expected one for each picture: fill it, or remove it to use all pictures in its folder"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("metadata.csv", b"", NO_ROWS),
        ("metadata.csv", b"file_name,label\n", NO_ROWS),
        ("metadata.csv", b"\xef\xbb\xbffile_name\n\n\n", NO_ROWS),
        ("metadata.jsonl", b"", NO_ROWS),
        ("metadata.jsonl", b"\n \n", NO_ROWS),
        ("x/metadata.csv", b"file_name\n", NO_ROWS),
        ("metadata.csv", b"file_name,label\na.png,caf\xe9\n", "found no UTF-8 at byte 25; expected text in UTF-8"),
        ("metadata.jsonl", b'{"file_name": "caf\xe9.png"}\n', "found no UTF-8 at byte 18; expected text in UTF-8"),
        ("metadata.csv", b"name,label\na.png,x\n", "found the columns 'name', 'label'; expected file_name among them"),
        (
            "metadata.csv",
            b"file_name;label\na.png;x\n",
            "found the columns 'file_name;label'; expected file_name among them, with commas between them",
        ),
        ("metadata.jsonl", b'{"name": "a.png"}\n', "found the columns 'name'; expected file_name among them"),
        ("metadata.jsonl", b"a.png\n", "cannot be read: Expecting value: line 1 column 1 (char 0)"),
    ],
)
def test_a_metadata_file_that_names_no_pictures_is_named(tmp_path, name, content, reason):
    write_files(tmp_path, "a.png", "x/b.png")
    (tmp_path / name).write_bytes(content)
    assert problems(tmp_path) == [f"data.source: {tmp_path / name}: {reason}"]


def test_a_parquet_metadata_file_without_rows_is_named(tmp_path):
    write_files(tmp_path, "a.png")
    pq.write_table(pa.table({"file_name": pa.array([], pa.string())}), tmp_path / "metadata.parquet")
    assert problems(tmp_path) == [f"data.source: {tmp_path}/metadata.parquet: {NO_ROWS}"]


def test_a_split_without_metadata_is_left_out_and_noted(tmp_path):
    write_files(tmp_path, "train/a.png", "val/b.png")
    (tmp_path / "train/metadata.csv").write_text("file_name\na.png\n")
    images = load(tmp_path)
    assert len(images) == 1
    assert images.notes[1] == "left out 1 of 2 pictures, which no metadata file names: 1 .png (val/b.png)"
    (line,) = problems(tmp_path, validation_split="validation")
    assert line.startswith("data.validation_split: found 'validation'; expected a split of")


def test_a_named_pipe_is_not_waited_for(tmp_path):
    write_files(tmp_path, "a.png")
    os.mkfifo(tmp_path / "b.png")
    assert problems(tmp_path)[1:] == ["b.png: is not a regular file"]


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_the_damaged_one_of_several_files_is_named(tmp_path, kind, caplog):
    for name in "abc":
        if kind == "parquet":
            pq.write_table(table(), tmp_path / f"{name}.parquet")
        else:
            tar(tmp_path / f"{name}.tar", {"1.png": png()})
    (tmp_path / f"b.{kind}").write_bytes(b"<html>404 not found</html>")
    (line,) = problems(tmp_path)
    assert line.startswith(f"data.source: {tmp_path}/b.{kind} is damaged or of another type: ")
    assert caplog.records == []  # nothing is logged beside the error
    (tmp_path / f"b.{kind}").write_bytes(b"")
    assert problems(tmp_path) == [
        f"data.source: found an empty file: {tmp_path}/b.{kind}; copy or download it again, or remove it"
    ]


def test_parquet_files_with_different_columns_are_named(tmp_path):
    pq.write_table(table(label=[1, 2, 3]), tmp_path / "a.parquet")
    pq.write_table(table().rename_columns(["img"]), tmp_path / "b.parquet")
    assert problems(tmp_path) == [
        f"data.source: found the columns img in {tmp_path}/b.parquet and image, label in {tmp_path}/a.parquet; "
        "expected the same in all files"
    ]


@pytest.mark.parametrize("kind", ["numpy", "torch", "pandas", "arrow", None])
@pytest.mark.parametrize("columns", [None, ["label"]])
def test_a_format_that_was_set_before_saving_changes_nothing(tmp_path, kind, columns):
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    saved = datasets.Dataset(table(label=[2, 0, 1])).cast(features)
    saved.with_format(kind, columns=columns).save_to_disk(tmp_path / "x")
    images = load(tmp_path / "x", labels=[1, 2])
    assert images.labels.tolist() == [2, 1]
    assert len(images) == 2
    assert np.array_equal(images[0], load(tmp_path / "x")[0])
