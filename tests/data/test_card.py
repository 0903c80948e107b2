"""A local dataset whose README.md has `configs:` is read as `datasets.load_dataset` reads it."""

import io
import json
import shutil

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from finetune.config.inputs import DataConfig
from finetune.core.errors import UserError
from finetune.core.kind import ImageFormat
from finetune.data.loading import load_data
from finetune.data.sources import open_source
from harness.configs import png
from harness.folders import tar, write_files


def write_table(file, count: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": [{"bytes": png(seed=seed), "path": None} for seed in range(count)]}), file)


@pytest.fixture
def tables(tmp_path):
    """full/ with 6 rows in train and 3 in test, tiny/ with 2."""
    root = tmp_path / "tables"
    write_table(root / "full/train-0.parquet", 6)
    write_table(root / "full/test-0.parquet", 3)
    write_table(root / "tiny/train-0.parquet", 2)
    return root


@pytest.fixture
def pictures(tmp_path):
    files = "full/cat/1.png", "full/dog/2.png", "full/dog/3.png", "tiny/cat/4.png", "tiny/cow/5.png"
    return write_files(tmp_path / "pictures", *files)


def describe(root, configs: str) -> str:
    (root / "README.md").write_text(f"---\nconfigs:\n{configs}---\n# About\n")
    return str(root)


def sizes(splits) -> dict[str, int]:
    return {name: len(split) for name, split in splits.items()}


def problem(root) -> str:
    with pytest.raises(UserError) as caught:
        open_source(str(root))
    (line,) = caught.value.problems
    assert "\n" not in line
    return line


FULL = """- config_name: full
  data_files:
  - split: train
    path: full/train-*
  - split: test
    path: full/test-*
"""
TINY = "- config_name: tiny\n  data_files: tiny/*\n"
TABLES = {
    "the default of two": (FULL + "  default: true\n" + TINY, {"train": 6, "test": 3}),
    "the last is the default": (FULL + TINY + "  default: true\n", {"train": 2}),
    "one named default": (FULL + TINY.replace("tiny\n", "default\n"), {"train": 2}),
    "the only one": (TINY, {"train": 2}),
    "of one split": (
        "- config_name: a\n  data_files:\n  - split: extra\n    path: [full/test*, tiny/*]\n",
        {"extra": 5},
    ),
    "a folder": ("- config_name: a\n  data_dir: full\n", {"train": 6, "test": 3}),
    "one file in two splits": (
        "- config_name: a\n  data_files:\n  - split: train\n    path: tiny/*\n  - split: test\n    path: tiny/*\n",
        {"train": 2, "test": 2},
    ),
}


@pytest.mark.parametrize("case", TABLES)
def test_the_splits_of_tables_are_those_of_load_dataset(tables, case):
    configs, expected = TABLES[case]
    source = describe(tables, configs)
    assert sizes(open_source(source).splits) == expected
    assert sizes(datasets.load_dataset(source)) == expected


PICTURES = {
    "labels by folder": "- config_name: a\n  data_files: full/**\n",
    "a class of its own": "- config_name: a\n  data_files: tiny/**\n",
    "no labels": "- config_name: a\n  data_files: full/**\n  drop_labels: true\n",
    "labels of one class": "- config_name: a\n  data_files: full/dog/*\n  drop_labels: false\n",
    "splits": FULL.replace("full/train-*", "full/**").replace("full/test-*", "tiny/**"),
}


@pytest.mark.parametrize("case", PICTURES)
def test_rows_and_labels_of_pictures_are_those_of_load_dataset(pictures, case):
    source = describe(pictures, PICTURES[case])
    ours, theirs = open_source(source).splits, datasets.load_dataset(source)
    assert sizes(ours) == sizes(theirs)
    for name, split in theirs.items():
        assert list(ours[name].features) == list(split.features)
        if "label" in split.features:
            assert ours[name].features["label"] == split.features["label"]
            assert ours[name]["label"][:] == split["label"][:]
        encoded = split.cast_column("image", datasets.Image(decode=False))
        assert [row["path"] for row in ours[name]["image"]] == [row["path"] for row in encoded["image"]]


def test_files_of_a_configuration_are_named_relative_to_its_folder(tables):
    """As the library's documentation has it; its reader of local folders looks for them at the top, and fails."""
    source = describe(tables, "- config_name: a\n  data_dir: full\n  data_files: train*\n")
    assert sizes(open_source(source).splits) == {"train": 6}


def test_metadata_counts_where_the_configuration_names_it(pictures):
    (pictures / "full/metadata.csv").write_text("file_name,text\ncat/1.png,one\ndog/2.png,two\n")
    source = describe(pictures, "- config_name: described\n  data_files: full/**\n")
    opened = open_source(source)
    assert opened.splits["train"]["text"][:] == datasets.load_dataset(source)["train"]["text"][:] == ["one", "two"]
    assert "left out 1 of 3 pictures, which no metadata file names: 1 .png (full/dog/3.png)" in opened.notes
    source = describe(pictures, "- config_name: dropped\n  data_files: full/**\n  drop_metadata: true\n")
    assert len(open_source(source).splits["train"]) == len(datasets.load_dataset(source)["train"]) == 3


def test_the_notes_name_what_the_configuration_leaves_out(tables):
    assert open_source(describe(tables, FULL + "  default: true\n" + TINY)).notes == [
        "found 2 files: 2 .parquet; 1 in train, 1 in test",
        "README.md: configuration full is used, left out tiny",
        "left out files that the configuration full of README.md does not name (1): 1 .parquet (tiny/train-0.parquet)",
        "left out other files (1): 1 .md (README.md)",
    ]


def test_several_configurations_without_a_default_are_listed(tables):
    assert problem(describe(tables, FULL + TINY)) == (
        f"data.source: {tables}: found the configurations full (full/train-*, full/test-*); tiny (tiny/*) in "
        "README.md, none of them the default; expected the files of one: set data.source to them, or mark one with "
        "`default: true`"
    )
    assert sizes(open_source(str(tables / "tiny/*")).splits) == {"train": 2}  # as the line advises
    assert sizes(open_source(str(tables / "full")).splits) == {"train": 6, "test": 3}


def test_two_defaults_are_refused(tables):
    line = problem(describe(tables, FULL + "  default: true\n" + TINY + "  default: true\n"))
    assert "several default configs" in line


@pytest.mark.parametrize(
    "configs",
    [
        "- config_name: a\n  data_files: ../secret/*\n",
        "- config_name: a\n  data_files: {}/secret/x.parquet\n",
        "- config_name: a\n  data_dir: ../secret\n",
        "- config_name: a\n  data_dir: ../secret\n  data_files: '*'\n",
    ],
)
def test_a_configuration_cannot_name_files_outside_its_folder(tables, tmp_path, configs):
    write_table(tmp_path / "secret/x.parquet", 1)
    assert "inside the folder" in problem(describe(tables, configs.format(tmp_path)))


def test_a_configuration_that_finds_nothing_is_a_one_line_error(tables):
    line = problem(describe(tables, "- config_name: a\n  data_files: nothing/*\n"))
    assert "found nothing to read" in line
    assert "left out files that the configuration a of README.md does not name (3)" in line


@pytest.mark.parametrize("text", ["# Only words\n", "---\nlicense: mit\n---\n", "---\n---\n", ""])
def test_a_readme_without_configurations_changes_nothing(tables, text):
    shutil.rmtree(tables / "tiny")
    (tables / "README.md").write_text(text)
    assert sizes(open_source(str(tables)).splits) == {"test": 3, "train": 6}


@pytest.mark.parametrize(
    "header", ["configs: [", "configs: 3", "configs:\n- data_files: x", "configs:\n- config_name: a\n  data_files: 3"]
)
def test_a_header_that_cannot_be_read_is_a_one_line_error(tables, header):
    (tables / "README.md").write_text(f"---\n{header}\n---\n")
    assert problem(tables).startswith(f"data.source: {tables}: the header of README.md cannot be read: ")


def test_a_readme_in_another_encoding_does_not_matter(tables):
    (tables / "README.md").write_bytes(f"---\nlicense: caf\xe9\nconfigs:\n{TINY}---\n".encode("latin-1"))
    assert sizes(open_source(str(tables)).splits) == {"train": 2}


def test_a_plain_yaml_file_counts_too(tables):
    (tables / ".huggingface.yaml").write_text(f"configs:\n{TINY}")
    assert sizes(open_source(str(tables)).splits) == {"train": 2}


CLASSES = "dataset_info:\n  features:\n  - name: label\n    dtype:\n      class_label:\n        names:\n"
CLASSES += "          '0': cat\n          '1': dog\n"


def labelled(root, labels, kind: str = "parquet"):
    """A copy of a dataset whose README.md names the classes cat and dog, and whose file does not."""
    root.mkdir(exist_ok=True)
    (root / "README.md").write_text(f"---\n{CLASSES}---\n")
    images = [{"bytes": png(seed=seed), "path": None} for seed in range(len(labels))]
    if kind == "csv":
        names = [f"{number}.png" for number in range(len(labels))]
        write_files(root, *names)
        rows = "".join(f"{name},{label}\n" for name, label in zip(names, labels, strict=True))
        (root / "metadata.csv").write_text(f"file_name,label\n{rows}")
    elif kind == "parquet":
        pq.write_table(pa.table({"image": images, "label": labels}), root / "train-0.parquet")
    else:
        table = pa.table({"image": images, "label": labels})
        with pa.ipc.new_stream(str(root / "train-0.arrow"), table.schema) as writer:
            writer.write_table(table)
    return root


@pytest.mark.parametrize("kind", ["parquet", "arrow", "csv"])
@pytest.mark.parametrize("labels", [[1, 0, 1], ["dog", "cat", "dog"]])
def test_class_names_of_the_readme_are_kept(tmp_path, kind, labels):
    split = open_source(str(labelled(tmp_path, labels, kind))).splits["train"]
    assert split.features["label"].names == ["cat", "dog"]
    assert split["label"][:] == [1, 0, 1]


def test_class_names_of_the_chosen_configuration_and_of_older_datasets(tmp_path):
    root = labelled(tmp_path, [1, 0])
    info = CLASSES.replace("  features", "  config_name: tiny\n  features")
    (root / "README.md").write_text(f"---\n{info}configs:\n- config_name: tiny\n  data_files: '*.parquet'\n---\n")
    assert open_source(str(root)).splits["train"].features["label"].names == ["cat", "dog"]
    (root / "README.md").unlink()
    names = {"features": {"label": {"names": ["emu", "fox"], "_type": "ClassLabel"}}}
    (root / "dataset_infos.json").write_text(json.dumps({"default": names}))
    assert open_source(str(root)).splits["train"].features["label"].names == ["emu", "fox"]


@pytest.mark.parametrize("kind", ["parquet", "arrow", "csv"])
@pytest.mark.parametrize(
    ("labels", "reason"), [([0, 5], "found 5 in 'label' of"), (["cat", "emu"], "found 'emu' in 'label' of")]
)
def test_labels_that_the_readme_does_not_name_are_refused(tmp_path, labels, reason, kind):
    config = DataConfig(source=str(labelled(tmp_path, labels, kind)), validation_fraction=0.0)
    with pytest.raises(UserError, match=reason) as caught:
        load_data(config, ImageFormat(1, 8), 0)
    assert len(caught.value.problems) == 1


def test_other_class_names_than_the_files_own_are_refused(tmp_path):
    root = labelled(tmp_path, [0, 1])
    features = datasets.Features(label=datasets.ClassLabel(names=["emu", "fox"]))
    pq.write_table(
        datasets.Dataset.from_dict({"label": [0, 1]}, features=features).data.table, root / "train-0.parquet"
    )
    assert "found the classes emu, fox in 'label' of" in problem(root)
    assert "and cat, dog in README.md" in problem(root)


def labelled_tar(root, labels):
    """WebDataset rows of a picture and a label: a number in .cls, a text in .txt."""
    kind = "cls" if isinstance(labels[0], int) else "txt"
    rows = {
        f"{number}.{name}": content
        for number, label in enumerate(labels)
        for name, content in (("png", png(seed=number)), (kind, str(label).encode()))
    }
    tar(root / "x.tar", rows)
    (root / "README.md").write_text(f"---\n{CLASSES.replace('name: label', f'name: {kind}')}---\n")
    return kind


@pytest.mark.parametrize("labels", [[1, 0, 1, -1], ["dog", "cat", "dog"]])
def test_class_names_of_the_readme_are_kept_for_tar_files(tmp_path, labels):
    column = labelled_tar(tmp_path, labels)
    split = open_source(str(tmp_path)).splits["train"]
    assert split.features[column] == datasets.ClassLabel(names=["cat", "dog"])
    assert split[column][:] == [1, 0, 1, -1][: len(labels)]
    config = DataConfig(source=str(tmp_path), label_column=column, labels=("dog",), validation_fraction=0.0)
    images, _ = load_data(config, ImageFormat(1, 8), 0)
    assert images.class_names == ["dog"]
    for index, row in enumerate((0, 2)):
        expected = np.asarray(Image.open(io.BytesIO(png(seed=row))))
        assert (images[index][..., 0] == expected).all()


@pytest.mark.parametrize(("labels", "found"), [([0, 5], "5"), ([-2, 0], "-2"), (["cat", "emu"], "'emu'")])
def test_labels_of_tar_files_that_the_readme_does_not_name_are_refused(tmp_path, labels, found):
    column = labelled_tar(tmp_path, labels)
    assert problem(tmp_path) == (
        f"data.source: found {found} in {column!r} of x.tar; expected one of the 2 classes that README.md names: "
        "cat, dog"
    )


def test_class_names_for_other_columns_of_tar_files_change_nothing(tmp_path):
    labelled_tar(tmp_path, [0, 5])
    (tmp_path / "README.md").write_text(f"---\n{CLASSES}---\n")
    assert open_source(str(tmp_path)).splits["train"]["cls"][:] == [0, 5]
