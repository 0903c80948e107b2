"""What a person wrote into a metadata file is what is read, or one line says why it is not."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.config.inputs import DataConfig
from finetune.core.errors import UserError
from finetune.core.kind import ImageFormat
from finetune.data.loading import load_data
from finetune.data.metadata import read_metadata
from finetune.data.sources import open_source
from harness.folders import write_files


def labels(root) -> list:
    return open_source(str(root)).splits["train"]["label"][:]


def refused(root) -> str:
    with pytest.raises(UserError) as caught:
        load_data(DataConfig(source=str(root), validation_fraction=0.0), ImageFormat(1, 8), 0, labelled=True)
    return caught.value.problems[0]


def described(tmp_path, *values: str, header: str = "file_name,label"):
    """A folder of pictures a.png, b.png, ... with a metadata.csv of these labels."""
    names = [f"{letter}.png" for letter in "abcdefgh"[: len(values)]]
    root = write_files(tmp_path, *names)
    lines = [header, *(f"{name},{value}" for name, value in zip(names, values, strict=True))]
    (root / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["NA", "None", "null"], ["NA", "None", "null"]),
        (["nan", "N/A", "#N/A", "", "-nan", "<NA>"], ["nan", "N/A", "#N/A", None, "-nan", "<NA>"]),
        (["01", "1", "007"], ["01", "1", "007"]),  # two classes, and a name
        (["1", "2", ""], [1, 2, None]),
        (["-3", "0", "12"], [-3, 0, 12]),
        (["True", "False", "true"], ["True", "False", "true"]),
        (["1e3", "1000", "1_000"], ["1e3", "1000", "1_000"]),
        (["1.5", "2.0"], [1.5, 2.0]),
        (["2020-01-01", "2020-01-02"], ["2020-01-01", "2020-01-02"]),
        (["inf", "Infinity"], ["inf", "Infinity"]),
        (['"a, b"', '"say ""x"""'], ["a, b", 'say "x"']),
        ([" cat", "cat"], ["cat", "cat"]),
        (["12345678901234567890", "1"], ["12345678901234567890", "1"]),  # more than 64 bits hold
    ],
)
def test_values_of_a_csv(tmp_path, values, expected):
    assert labels(described(tmp_path, *values)) == expected


@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters='\0\r\n",'), max_size=4), min_size=1, max_size=5)
)
def test_a_text_is_read_as_it_is_written_or_as_the_integer_that_is_written_so(tmp_path_factory, texts):
    root = tmp_path_factory.mktemp("x")
    names = [f"{number}.png" for number in range(len(texts))]
    rows = "".join(f'{name},"{text}"\n' for name, text in zip(names, texts, strict=True))
    (root / "metadata.csv").write_text("file_name,label\n" + rows, encoding="utf-8")
    table, _ = read_metadata(str(root), ["metadata.csv"])
    found = table["label"].to_pylist()
    if any(isinstance(value, float) for value in found):
        return
    assert ["" if value is None else str(value) for value in found] == texts


@pytest.mark.parametrize("quoted", ["NA", "null"])
def test_pictures_may_have_such_names_too(tmp_path, quoted):
    root = write_files(tmp_path, quoted)  # without an extension it is no picture of the folder
    write_files(tmp_path, "a.png")
    (root / "metadata.csv").write_text(f"file_name,label\n{quoted},x\na.png,y\n")
    assert sorted(labels(root)) == ["x", "y"]


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (["a.png,cat,"], "line 2: found 3 values; expected 2, one for each column"),
        (["a.png,cat", "b.png"], "line 3: found 1 values; expected 2"),
        (["a.png,cat", "b.png,dog, brown"], "line 3: found 3 values; expected 2"),
        # A quote that is not closed takes the rows after it into its value.
        (['a.png,"cat', "b.png,dog"], "line 3: unexpected end of data (a quote that is opened has to be closed)"),
        (['a.png,"cat', 'b.png,"dog"'], "line 3: ',' expected after '\"'"),
        (["a.png," + "x" * 131_073], "line 2: field larger than field limit (131072)"),
    ],
)
def test_rows_that_are_not_a_value_for_each_column_are_refused(tmp_path, lines, reason):
    root = write_files(tmp_path, "a.png", "b.png")
    (root / "metadata.csv").write_text("\n".join(["file_name,label", *lines]))
    assert f"{root}/metadata.csv: {reason}" in refused(root)


def test_columns_of_one_name_are_refused(tmp_path):
    assert "found the columns file_name, label, label; expected a name for each" in refused(
        described(tmp_path, "1,2", header="file_name,label,label")
    )


@pytest.mark.parametrize("with_label", ["x", "y"])
def test_a_column_that_one_of_several_files_lacks_is_kept(tmp_path, with_label):
    for name in "xy":
        write_files(tmp_path, f"{name}/a.png")
        column, value = (",label", ",cat") if name == with_label else ("", "")
        (tmp_path / name / "metadata.csv").write_text(f"file_name{column}\na.png{value}\n")
    assert labels(tmp_path) == (["cat", None] if with_label == "x" else [None, "cat"])
    assert "found no label in 'label' for 1 of 2 images" in refused(tmp_path)


def test_integers_and_texts_of_several_csv_are_texts(tmp_path):
    for name, label in (("x", "1"), ("y", "cat")):
        write_files(tmp_path, f"{name}/a.png")
        (tmp_path / name / "metadata.csv").write_text(f"file_name,label\na.png,{label}\n")
    assert labels(tmp_path) == ["1", "cat"]


def test_csv_and_jsonl_and_parquet_in_folders_of_their_own(tmp_path):
    write_files(tmp_path, "x/a.png", "y/a.png", "z/a.png")
    (tmp_path / "x/metadata.csv").write_text("file_name,label\na.png,cat\n")
    (tmp_path / "y/metadata.jsonl").write_text('{"file_name": "a.png", "label": "NA"}\n')
    pq.write_table(pa.table({"file_name": ["a.png"], "label": ["emu"]}), tmp_path / "z/metadata.parquet")
    assert labels(tmp_path) == ["cat", "NA", "emu"]


@pytest.mark.parametrize("other", ["metadata.jsonl", "metadata.parquet"])
def test_two_metadata_files_of_one_folder_are_refused(tmp_path, other):
    root = described(tmp_path, "cat", "dog")
    if other.endswith("jsonl"):
        (root / other).write_text('{"file_name": "a.png", "label": "emu"}\n')
    else:
        pq.write_table(pa.table({"file_name": ["a.png"]}), root / other)
    assert "found several metadata files in one folder" in refused(root)


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (['{"file_name": "a.png", "label": 1}', '{"file_name": "b.png", "label": "x"}'], "found 1 and 'x' in 'label'"),
        (
            ['{"file_name": "a.png", "label": true}', '{"file_name": "b.png", "label": 2}'],
            "found True and 2 in 'label'",
        ),
        (['{"file_name": "a.png"}', "[1]"], "line 2: expected a mapping"),
        (['{"file_name": "a.png", "label": 1, "label": 2}'], "line 1: found the key 'label' twice; expected one"),
        (['{"file_name": "a.png", "label": {"x": 1, "x": 2}}'], "line 1: found the key 'x' twice; expected one"),
        (['{"file_name": "a.png", "label": 99999999999999999999}'], "'label' of metadata.jsonl cannot be read: "),
        (['{"file_name": "a.png"}', '{"file_name": "b'], "line 2: Unterminated string"),
        (['{"file_name": 7}'], "found the file_name 7; expected a name inside "),
    ],
)
def test_values_of_several_types_and_broken_lines_are_refused(tmp_path, lines, reason):
    root = write_files(tmp_path, "a.png", "b.png")
    (root / "metadata.jsonl").write_text("\n".join(lines))
    assert reason in refused(root)


def test_names_with_backslashes_are_of_windows(tmp_path):
    root = write_files(tmp_path, "x/a.png")
    (root / "metadata.csv").write_text("file_name,label\nx\\a.png,cat\n")
    images, _ = load_data(DataConfig(source=str(root), validation_fraction=0.0), ImageFormat(1, 8), 0, labelled=True)
    assert len(images) == 1
    (root / "metadata.csv").write_text("file_name,label\n..\\a.png,cat\n")
    assert f"expected a name inside {root}" in refused(root)


@pytest.mark.parametrize(
    ("source", "written", "expected"),
    [
        ("x", "BASE/x/a.png", "x/a.png"),
        ("x", "BASE/x/./in/../a.png", "x/a.png"),
        ("x", "../a.png", "x/a.png"),  # metadata.csv is in x/in
        ("x", "BASE/x/in/b.png", "x/in/b.png"),
        ("link", "BASE/x/a.png", "link/a.png"),  # link -> x
        ("x", "BASE/link/in/b.png", "x/in/b.png"),
        ("x", "BASE/x/more/c.png", "x/more/c.png"),  # x/more -> other, which links lead to
        ("x", "BASE/other/c.png", None),
        ("x", "BASE/xy/a.png", None),
        ("x", "BASE/x", None),
        ("x", "../../other/c.png", None),
    ],
)
def test_a_picture_is_named_by_any_path_that_leads_into_the_source(tmp_path, source, written, expected):
    write_files(tmp_path, "x/a.png", "x/in/b.png", "other/c.png", "xy/a.png")
    (tmp_path / "link").symlink_to("x")
    (tmp_path / "x/more").symlink_to(tmp_path / "other")
    written = written.replace("BASE", str(tmp_path))
    (tmp_path / "x/in/metadata.csv").write_text(f"file_name,label\n{written},cat\n")
    if expected is None:
        assert refused(tmp_path / source).endswith(
            f"found the file_name {written!r}; expected a name inside {tmp_path}/x"
        )
        return
    data = DataConfig(source=str(tmp_path / source), validation_fraction=0.0)
    (row,) = open_source(data.source).splits["train"]
    assert row["image"]["path"] == str(tmp_path / expected)
    assert len(load_data(data, ImageFormat(1, 8), 0, labelled=True)[0]) == 1


def test_the_fingerprint_follows_labels_and_pictures(tmp_path):
    def fingerprint() -> str:
        return open_source(str(tmp_path)).splits["train"]._fingerprint

    first = fingerprint() if described(tmp_path, "cat", "dog") else ""
    assert fingerprint() == first
    described(tmp_path, "cat", "emu")
    second = fingerprint()
    (tmp_path / "a.png").write_bytes(b"longer")
    assert len({first, second, fingerprint()}) == 3
