"""Several parquet or arrow files are one table only if their columns mean the same."""

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune.core.errors import UserError
from finetune.data.sources import open_source
from harness.configs import png


def table(labels, classes: list[str] | None = None) -> pa.Table:
    images = [{"bytes": png(seed=seed), "path": None} for seed in range(len(labels))]
    if classes is None:
        return pa.table(
            {"image": pa.array(images, pa.struct({"bytes": pa.binary(), "path": pa.string()})), "label": labels}
        )
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=classes))
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features).data.table


def problem(source) -> str:
    with pytest.raises(UserError) as caught:
        open_source(str(source))
    (line,) = caught.value.problems
    return line


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        ([1, 2], ["x", "y"], "found texts in 'label' of b.parquet and integers in that of a.parquet"),
        (["1", "2"], [1, 2], "found integers in 'label' of b.parquet and texts in that of a.parquet"),
        ([True, False], [1, 0], "found integers in 'label' of b.parquet and true or false in that of a.parquet"),
        ([None], [1, 0], "found integers in 'label' of b.parquet and missing values alone in that of a.parquet"),
        (
            *([None], [0.5]),
            "found values of type double in 'label' of b.parquet and missing values alone in that of a.parquet",
        ),
    ],
)
def test_labels_of_several_types_are_refused(tmp_path, first, second, reason):
    for name, labels in (("a", first), ("b", second)):
        pq.write_table(table(labels), tmp_path / f"{name}.parquet")
    assert problem(tmp_path).startswith(f"data.source: {reason}; expected the same in all files")


@pytest.mark.parametrize("first", [[1], [0.5], ["x"], [{"x": 1}], [None]])
def test_a_later_file_may_have_missing_values_alone(tmp_path, first):
    for name, labels in (("a", first), ("b", [None]), ("c", first)):
        pq.write_table(table(labels), tmp_path / f"{name}.parquet")
    assert open_source(str(tmp_path)).splits["train"]["label"][:] == [*first, None, *first]


def test_a_table_is_read_whatever_the_case_of_its_ending(tmp_path):
    pq.write_table(table([1, 2]), tmp_path / "A.PARQUET")
    for source in (tmp_path, tmp_path / "A.PARQUET"):
        assert open_source(str(source)).splits["train"]["label"][:] == [1, 2]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("second", [["dog", "cat"], ["cat", "dog", "emu"], None])
def test_classes_in_another_order_are_refused(tmp_path, kind, second):
    """Label 0 would be a cat in one file and a dog in the other."""
    for name, classes in (("a", ["cat", "dog"]), ("b", second)):
        rows = table([0, 1], classes)
        if kind == "parquet":
            pq.write_table(rows, tmp_path / f"{name}.parquet")
        else:
            with pa.ipc.new_stream(str(tmp_path / f"{name}.arrow"), rows.schema) as writer:
                writer.write_table(rows)
    assert f"in 'label' of b.{kind} and the classes cat, dog in that of a.{kind}" in problem(tmp_path)


def test_equal_classes_and_integers_of_other_widths_are_read(tmp_path):
    for name in "ab":
        pq.write_table(table([0, 1], ["cat", "dog"]), tmp_path / f"{name}.parquet")
    assert open_source(str(tmp_path)).splits["train"]["label"][:] == [0, 1, 0, 1]
    (tmp_path / "x").mkdir()
    for name, kind in (("a", pa.int64()), ("b", pa.int8())):
        pq.write_table(table(pa.array([0, 1], kind)), tmp_path / "x" / f"{name}.parquet")
    assert open_source(str(tmp_path / "x")).splits["train"]["label"][:] == [0, 1, 0, 1]


def test_parquet_without_rows_is_refused_and_an_empty_shard_is_not(tmp_path):
    pq.write_table(table(pa.array([], pa.int64())), tmp_path / "a.parquet")
    expected = f"data.source: found no rows in {tmp_path}/a.parquet; expected one for each picture"
    assert problem(tmp_path) == problem(tmp_path / "a.parquet") == expected
    pq.write_table(table([3]), tmp_path / "b.parquet")
    assert open_source(str(tmp_path)).splits["train"]["label"][:] == [3]


def test_a_split_of_empty_shards_is_no_split(tmp_path):
    pq.write_table(table(pa.array([], pa.int64())), tmp_path / "test-0.parquet")
    pq.write_table(table([3]), tmp_path / "train-0.parquet")
    assert list(open_source(str(tmp_path)).splits) == ["train"]


LONG = [f"class {number}" for number in range(25)]


@pytest.mark.parametrize(
    ("other", "here", "there"),
    [
        ([*LONG[:23], LONG[24], LONG[23]], "..., class 24, class 23", "..., class 23, class 24"),
        (LONG[:24], "..., no more", "..., class 24"),
        (LONG[:2], "class 0, class 1", f"{', '.join(LONG[:20])}, ..."),
    ],
)
def test_long_lists_of_classes_are_compared_to_their_ends(tmp_path, other, here, there):
    """And named from where they begin to differ, if that is behind the first twenty."""
    for name, classes in (("a", LONG), ("b", other)):
        pq.write_table(table([0, 1], classes), tmp_path / f"{name}.parquet")
    assert problem(tmp_path).startswith(
        f"data.source: found the classes {here} in 'label' of b.parquet and the classes {there} in that of a.parquet"
    )
