"""Datasets of a hub, by the real clients from a server on this machine: the class names of their README.md are kept."""

import json
import subprocess
import sys
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harness.configs import ROOT, png
from harness.folders import tar, write_files
from harness.hub import serving

LOAD = """
import json, sys
from finetune.config.inputs import DataConfig
from finetune.core.kind import ImageFormat
from finetune.data.loading import load_data
for name, column in (argument.split("=") for argument in sys.argv[1:]):
    data = DataConfig(source=name, label_column=column, validation_fraction=0.0)
    images, _ = load_data(data, ImageFormat(1, 8), 0, labelled=True)
    print(json.dumps([name, images.label_names, images.labels.tolist(), [int(image[0, 0, 0]) for image in images]]))
"""
NAMES = "    dtype:\n      class_label:\n        names:\n          '0': cat\n          '1': dog\n"


def card(*columns: str, label: str) -> str:
    """A README.md that describes columns of pictures and one of classes."""
    pictures = "".join(f"  - name: {column}\n    dtype: image\n" for column in columns)
    return f"---\ndataset_info:\n  features:\n{pictures}  - name: {label}\n{NAMES}---\n"


@pytest.mark.slow
def test_class_names_of_datasets_on_a_hub(tmp_path):
    """Tables and tar files, whose README.md describes all columns, or the classes alone; and folders of pictures."""
    pictures = [png(seed=seed) for seed in range(3)]
    table = pa.table({"image": [{"bytes": data, "path": None} for data in pictures], "label": [1, 0, 1]})
    members = {
        f"{row}.{kind}": content
        for row, (data, label) in enumerate(zip(pictures, (b"1", b"0", b"1"), strict=True))
        for kind, content in (("png", data), ("cls", label))
    }
    cards = {"tables": card("image", label="label"), "part-tables": card(label="label")}
    cards |= {"tars": card("png", label="cls"), "part-tars": card(label="cls")}
    for name, text in cards.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(text)
        if "tables" in name:
            pq.write_table(table, tmp_path / name / "train-0.parquet")
        else:
            tar(tmp_path / name / "x.tar", members)
    write_files(tmp_path / "folders", "train/dog/0.png", "train/cat/1.png", "train/dog/2.png")
    for file, data in zip(("dog/0", "cat/1", "dog/2"), pictures, strict=True):
        (tmp_path / f"folders/train/{file}.png").write_bytes(data)
    columns = {name: "cls" if "tars" in name else "label" for name in [*cards, "folders"]}
    with serving({f"datasets/someone/{name}": tmp_path / name for name in columns}) as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", LOAD, *(f"someone/{name}={column}" for name, column in columns.items())]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {name.removeprefix("someone/"): rest for name, *rest in map(json.loads, done.stdout.splitlines())}
    assert found.keys() == columns.keys()
    corners = found["tables"][2]
    assert len(set(corners)) == 3
    in_rows = [["cat", "dog"], [1, 0, 1], corners]
    assert dict.fromkeys(cards, in_rows) == {name: found[name] for name in cards}
    assert found["folders"] == [["cat", "dog"], [0, 1, 1], [corners[1], corners[0], corners[2]]]


OPEN = """
import sys
from finetune.core.errors import UserError
from finetune.data.sources import open_source
for name in sys.argv[1:]:
    try:
        print(name, len(open_source(name).splits["train"]))
    except UserError as error:
        print(name, *error.problems)
"""


@pytest.mark.slow
def test_tar_files_of_a_hub_are_read_as_a_whole_or_refused(tmp_path):
    """As those of a folder are: tests/data/test_archives.py has all of it."""
    pictures = {f"{row}.png": png(seed=row) for row in range(3)}
    for name in ("whole", "cut", "mixed"):
        (tmp_path / name).mkdir()
        tar(tmp_path / name / "train-0.tar", pictures)
    cut = tmp_path / "cut/train-0.tar"
    with tarfile.open(cut) as archive:
        place = [member.offset for member in archive][2]
    cut.write_bytes(cut.read_bytes()[:place])
    tar(tmp_path / "mixed/train-1.tar", {**pictures, "2.txt": b"words"})
    names = "whole", "cut", "mixed"
    with serving({f"datasets/someone/{name}": tmp_path / name for name in names}) as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", OPEN, *(f"someone/{name}" for name in names)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
        assert hub.fetched == {f"someone/{file}" for file in ("whole/train-0.tar", "cut/train-0.tar")} | {
            f"someone/mixed/train-{number}.tar" for number in range(2)
        }
    whole, cut, mixed = done.stdout.splitlines()
    assert whole == "someone/whole 3"
    assert f"train-0.tar is cut off at byte {place:,}, where a file or the end of the archive" in cut
    assert "found rows with different files in train-0.tar, train-1.tar: '0' has .png and '2' has .png, .txt" in mixed
