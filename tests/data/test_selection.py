"""Which rows, pictures and labels of an opened source a config selects."""

import datasets
import numpy as np
import pyarrow as pa
import pytest

from finetune.config.inputs import DataConfig
from finetune.core.errors import UserError
from finetune.data.selection import check_held_out, select

PICTURE = {"bytes": b"", "path": None}
CLASSES = datasets.ClassLabel(names=["cat", "dog", "7"])


def dataset(labels: list, kind=None, image=PICTURE, feature=None, **columns) -> dict[str, datasets.Dataset]:
    kind = kind or datasets.Value("int64")
    features = {"image": feature or datasets.Image(decode=False), "label": kind}
    features |= {name: datasets.Value("string") for name in columns}
    rows = {"image": [image] * len(labels), "label": labels, **columns}
    return {"train": datasets.Dataset.from_dict(rows, features=datasets.Features(features))}


def selected(splits: dict, split: str = "train", **config):
    return select(splits, DataConfig(source="photos", **config), split)


def problem(splits: dict, split: str = "train", **config) -> str:
    with pytest.raises(UserError) as caught:
        selected(splits, split, **config)
    (line,) = caught.value.problems
    return line


def test_classes_keep_their_numbers_and_names():
    chosen = selected(dataset([2, 0, None, 1], CLASSES))
    assert chosen.rows.tolist() == [0, 1, 2, 3]
    assert chosen.labels.tolist() == [2, 0, -1, 1]
    assert chosen.label_names == ["cat", "dog", "7"]


def test_whole_numbers_are_labels_without_names():
    chosen = selected(dataset([30, -1, 5]), labels=[5, 30, "-1"])
    assert chosen.labels.tolist() == [30, -1, 5]
    assert chosen.label_names is None


def test_words_are_numbered_alphabetically():
    chosen = selected(dataset(["dog", "cat", None, "dog"], datasets.Value("string")))
    assert chosen.labels.tolist() == [1, 0, -1, 1]
    assert chosen.label_names == ["cat", "dog"]


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view"])
def test_blanks_are_no_label_and_no_part_of_one(kind):
    chosen = selected(dataset(["dog", " cat", "", "cat ", " ", "Cat"], datasets.Value(kind)))
    assert chosen.labels.tolist() == [2, 1, -1, 1, -1, 0]
    assert chosen.label_names == ["Cat", "cat", "dog"]


def test_a_label_that_no_64_bits_hold_is_refused():
    def labelled(label: int) -> dict[str, datasets.Dataset]:
        return {
            "train": datasets.Dataset(pa.table({"image": [PICTURE] * 2, "label": pa.array([1, label], pa.uint64())}))
        }

    line = problem(labelled(2**63))
    assert line == f"data.label_column: found {2**63} in 'label' of photos; expected below 2^63"
    assert selected(labelled(2**63 - 1)).labels.tolist() == [1, 2**63 - 1]


@pytest.mark.parametrize(
    ("labels", "rows"),
    [(["dog"], [1, 3]), ([1], [1, 3]), (["cat", "7"], [0, 2]), ([7], [2]), ([0, "dog"], [0, 1, 3]), ([2], [2])],
)
def test_classes_are_chosen_by_name_or_number(labels, rows):
    chosen = selected(dataset([0, 1, 2, 1, None], CLASSES), labels=labels)
    assert chosen.rows.tolist() == rows
    assert chosen.labels.tolist() == [[0, 1, 2, 1][row] for row in rows]


def test_words_are_chosen_by_name_alone():
    splits = dataset(["dog", "5", "dog"], datasets.Value("string"))
    assert selected(splits, labels=[5]).rows.tolist() == [1]
    assert problem(splits, labels=[0]) == "data.labels: found [0]; expected labels of photos, which has 5, dog"


def test_any_column_can_hold_the_labels():
    splits = dataset([0, 1], kind_of=["a", "b"])
    chosen = selected(splits, label_column="kind_of", labels=["b"])
    assert (chosen.rows.tolist(), chosen.label_names) == ([1], ["a", "b"])
    assert "found 'kind'; expected a column of photos, which has image (pictures), label, kind_of" in problem(
        splits, label_column="kind"
    )


def test_a_column_named_label_is_used_unasked_only_if_it_holds_labels():
    """In segmentation sets `label` is a picture: reading it for its values would decode them all."""
    splits = dataset([PICTURE] * 2, datasets.Image())
    assert selected(splits).labels is None
    assert "holds Image" in problem(splits, label_column="label")
    assert selected(dataset([0.5], datasets.Value("float32"))).labels is None
    assert "expected class labels, integers or texts" in problem(
        dataset([0.5], datasets.Value("float32")), labels=["a"]
    )


def test_unknown_labels_are_refused_with_a_list_of_the_known_ones():
    splits = dataset([0, 0], CLASSES)
    assert problem(splits, labels=["dog", "cat", 9]) == (
        "data.labels: found ['dog', 9]; expected labels of photos, which has cat"
    )
    assert problem(dataset(list(range(30))), labels=[99]).endswith("17, 18, 19, ...")
    without = {"train": splits["train"].remove_columns("label")}
    assert problem(without, label_column="label") == (
        "data.label_column: found 'label'; expected a column of photos, which has image (pictures)"
    )


def test_labels_without_a_column_of_them_are_refused_by_the_key_that_was_set():
    without = {"train": dataset([0, 0], CLASSES)["train"].remove_columns("label")}
    assert problem(without, labels=[0, 1]) == (
        "data.labels: found [0, 1], but photos has no column 'label', only image (pictures); set data.label_column to "
        "the labels, or data.labels=null to train on all images"
    )


def test_splits_and_slices_of_them():
    splits = {"train": dataset(list(range(10)))["train"], "test": dataset([50, 51])["train"]}
    for spec, labels in {
        "test": [50, 51],
        "train[:3]": [0, 1, 2],
        "train[-2:]": [8, 9],
        "train[50%:70%]": [5, 6],
        "train[9:]+test": [9, 50, 51],
    }.items():
        assert selected(splits, spec).labels.tolist() == labels
    for spec in ("train[:0]", "train[10:]", "train[5:3]", "train[10:]+test[:0]"):
        assert problem(splits, spec) == f"data.split: found no images in {spec!r} of photos; expected at least one"
    for spec, twice in {"train+train": 10, "train[:6]+train[4:]": 2, "test+train[:1]+test[1:]": 1}.items():
        line = problem(splits, spec)
        assert line == f"data.split: found {spec!r}, which names {twice} rows twice; expected each once"
    for spec in ("validation", "train[:3", "train[a:]", "", "validation[:3]", "../train"):
        line = problem(splits, spec)
        assert line == f"data.split: found {spec!r}; expected a split of photos, which has train, test"


@pytest.mark.parametrize(
    ("split", "held", "both"),
    [
        ("train", "train[:1]", 1),
        ("train[:80%]", "train[70%:]", 1),  # of 10 rows 0 to 7 and 7 to 9
        ("train[:7]", "train[7:]", 0),
        ("train", "test", 0),
        ("train+test[:1]", "test", 1),
        ("train[:3]", "train[2:]+test", 1),
    ],
)
def test_rows_that_are_trained_on_cannot_be_held_out(split, held, both):
    splits = {"train": dataset(list(range(10)))["train"], "test": dataset([50, 51])["train"]}
    config = DataConfig(source="photos", split=split, validation_split=held)
    if not both:
        check_held_out(splits, config)
        return
    with pytest.raises(UserError) as caught:
        check_held_out(splits, config)
    assert caught.value.problems == (
        f"data.validation_split: found {held!r}, which has {both} rows in common with data.split {split!r}; expected "
        "rows that are not trained on",
    )


def test_image_means_the_only_column_of_pictures():
    splits = {"train": dataset([0])["train"].rename_column("image", "jpg")}
    assert selected(splits).image_column == "jpg"
    assert problem(splits, image_column="png") == (
        "data.image_column: found 'png'; expected a column of photos, which has jpg (pictures), label"
    )
    two = {"train": splits["train"].add_column("depth", [PICTURE], feature=datasets.Image(decode=False))}
    assert "jpg (pictures), label, depth (pictures)" in problem(two)


@pytest.mark.parametrize("kind", ["binary", "large_binary", "string"])
def test_plain_columns_of_bytes_or_paths_are_pictures(kind):
    value = "x.png" if kind == "string" else b"abc"
    chosen = selected(dataset([0], image=value, feature=datasets.Value(kind)))
    expected = {"bytes": None, "path": "x.png"} if kind == "string" else {"bytes": b"abc", "path": None}
    assert chosen.dataset[0]["image"] == expected


def test_an_image_column_without_pictures_is_refused():
    assert problem(dataset([0]), image_column="label").startswith(
        "data.image_column: found 'label', which holds Value('int64'); expected pictures"
    )


def test_row_numbers_are_int64():
    assert selected(dataset([1, 2])).rows.dtype == selected(dataset([1, 2]), labels=[1]).rows.dtype == np.int64
