"""Captions: where they are found, who lacks one, and which of several an image is trained with."""

import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.config.inputs import DataConfig
from finetune.core import randomness
from finetune.core.errors import UserError
from finetune.core.kind import ImageFormat
from finetune.data.captions import Captions
from finetune.data.loading import load_data
from finetune.data.order import Slot
from harness.configs import png
from harness.folders import tar

TEXTS = st.lists(st.lists(st.text(max_size=3), min_size=1, max_size=4), min_size=1, max_size=6)


def load(source, captioned=True, **config):
    options = {"validation_fraction": 0.0, **config}
    return load_data(DataConfig(source=str(source), **options), ImageFormat(3, 8), 0, captioned=captioned)[0]


def texts(images):
    return [images.captions.all_of(index) for index in range(len(images))]


def problems(source, **config):
    with pytest.raises(UserError) as caught:
        load(source, **config)
    return caught.value.problems


def write_folder(root, captions):
    """A picture for each, and beside it its text file, unless it is None."""
    root.mkdir()
    for number, caption in enumerate(captions):
        (root / f"{number:03}.png").write_bytes(png((8, 8), number))
        if caption is not None:
            (root / f"{number:03}.txt").write_bytes(caption.encode())
    return root


def test_text_files_beside_pictures_are_their_captions_one_a_line(tmp_path):
    root = write_folder(tmp_path / "pictures", ["a cat", "\ufeffa  dog \r\n\r\nan old\tdog\n", "a cat", "é"])
    (root / "readme.txt").write_text("not a caption")
    images = load(root)
    assert texts(images) == [["a cat"], ["a dog", "an old dog"], ["a cat"], ["é"]]
    assert images.captions.texts == ["a cat", "a dog", "an old dog", "é"]
    assert "captions: 4 different ones from the files beside the pictures, up to 2 a picture" in images.notes
    # Those that belong to no picture are still named, and all of them where no captions are asked for.
    assert "left out other files (1): 1 .txt (readme.txt)" in images.notes
    assert "left out other files (5): 5 .txt (000.txt, 001.txt, 002.txt, ...)" in load(root, captioned=False).notes


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("one\ntwo", ["one", "two"]),
        ("one\r\ntwo", ["one", "two"]),
        ("one\rtwo", ["one", "two"]),
        # What text from the web has within a line: separators of lines and pages, which are blanks here.
        ("one\u2028two\u2029three", ["one two three"]),
        ("one\x0ctwo\x0bthree\x85four", ["one two three four"]),
    ],
)
def test_a_line_ends_where_an_editor_ends_it(tmp_path, content, expected):
    root = write_folder(tmp_path / "pictures", [None])
    (root / "000.txt").write_bytes(content.encode())
    assert texts(load(root)) == [expected]


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view"])
def test_captions_of_every_type_of_text(tmp_path, kind):
    pictures = [{"bytes": png((8, 8), 0), "path": None}]
    captions = pa.array(["a cat"], getattr(pa, kind)())
    pq.write_table(pa.table({"image": pictures, "caption": captions}), tmp_path / "x.parquet")
    assert texts(load(tmp_path / "x.parquet")) == [["a cat"]]


def rows_as(kind, root, rows):
    """Rows of captions, under the column `text` or `txt`, as a source of one kind."""
    root.mkdir()
    if kind == "metadata":
        lines = [json.dumps({"file_name": f"{i}.png", "text": row}) for i, row in enumerate(rows)]
        (root / "metadata.jsonl").write_text("\n".join(lines))
        for index in range(len(rows)):
            (root / f"{index}.png").write_bytes(png((8, 8), index))
    elif kind == "csv":
        (root / "metadata.csv").write_text("file_name,text\n" + "".join(f"{i}.png,{r}\n" for i, r in enumerate(rows)))
        for index in range(len(rows)):
            (root / f"{index}.png").write_bytes(png((8, 8), index))
    elif kind == "saved":
        pictures = [{"bytes": png((8, 8), index), "path": None} for index in range(len(rows))]
        table = datasets.Dataset.from_dict({"image": pictures, "text": rows})
        table.cast_column("image", datasets.Image()).save_to_disk(str(root))
    else:
        files = {}
        for index, row in enumerate(rows):
            files[f"{index}.png"] = png((8, 8), index)
            name, content = (f"{index}.txt", row) if kind == "txt" else (f"{index}.json", json.dumps({"caption": row}))
            files[name] = content.encode()
        return tar(root / "0.tar", files)
    return root


@pytest.mark.parametrize("kind", ["metadata", "csv", "saved", "txt", "json"])
def test_captions_are_found_in_any_source(tmp_path, kind):
    rows = ["a cat", "a dog", "a cat"]
    assert texts(load(rows_as(kind, tmp_path / "rows", rows))) == [[row] for row in rows]


@pytest.mark.parametrize("kind", ["metadata", "saved", "json"])
def test_a_row_may_have_several_captions(tmp_path, kind):
    rows = [["a cat", "a  cat", "an animal"], ["a dog"], ["a dog", None, " "]]
    found = texts(load(rows_as(kind, tmp_path / "rows", rows)))
    assert found == [["a cat", "an animal"], ["a dog"], ["a dog"]]


def test_one_caption_for_all(tmp_path):
    images = load(write_folder(tmp_path / "pictures", [None, "ignored"]), caption="a photo of sks dog")
    assert texts(images) == [["a photo of sks dog"]] * 2
    assert "caption: 'a photo of sks dog' for all pictures" in images.notes


def test_pictures_without_a_caption_are_named(tmp_path):
    root = write_folder(tmp_path / "pictures", ["a cat", None, " \n", "a dog", None])
    first, *names = problems(root)
    assert first.startswith(
        "data.caption_column: found no caption in the files beside the pictures for 3 of 5 pictures; expected one"
    )
    assert names == ["001.png", "002.png", "004.png"]


def test_of_many_pictures_without_a_caption_twenty_are_named(tmp_path):
    _, *names = problems(write_folder(tmp_path / "pictures", [None] * 23))
    assert names == [*(f"{number:03}.png" for number in range(20)), "and 3 more"]


def test_a_bad_picture_that_is_skipped_needs_no_caption(tmp_path):
    root = write_folder(tmp_path / "pictures", ["a cat", None, "a dog"])
    (root / "001.png").write_bytes(b"no picture")
    assert texts(load(root, on_bad_image="skip")) == [["a cat"], ["a dog"]]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"caf\xe9", "000.txt has a byte at 3 that is not UTF-8: save the file as UTF-8"),
        ("a cat".encode("utf-16-le"), "000.txt has a zero byte at 1, which no text in UTF-8 has: save it as UTF-8"),
        ("a cat".encode("utf-16"), "000.txt has a byte at 0 that is not UTF-8: save the file as UTF-8"),
        (b"a" * (2**20 + 1), "000.txt has more than 1,048,576 bytes; expected captions, one a line"),
    ],
)
def test_a_text_file_that_is_no_caption_is_one_line(tmp_path, content, problem):
    root = write_folder(tmp_path / "pictures", ["a cat"])
    (root / "000.txt").write_bytes(content)
    (line,) = problems(root)
    assert line.startswith("data.caption_column: ")
    assert line.endswith(problem)


def test_a_column_that_is_missing_or_holds_no_texts_is_one_line(tmp_path):
    table = datasets.Dataset.from_dict({"image": [{"bytes": png(), "path": None}], "words": ["a cat"], "count": [1]})
    table.cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "rows"))
    has = "which has image, words, count"
    (line,) = problems(tmp_path / "rows")
    assert line.startswith("data.caption_column: found no column of captions in ")
    assert line.endswith(f"{has}; set it, or data.caption for one caption for all")
    for column, found in (("word", "'word'"), ("count", "'count', which holds Value('int64')")):
        (line,) = problems(tmp_path / "rows", caption_column=column)
        assert line.startswith(f"data.caption_column: found {found}; expected a column of texts or of lists")
        assert line.endswith(has)
    assert texts(load(tmp_path / "rows", caption_column="words")) == [["a cat"]]


@pytest.mark.parametrize("key", ["caption", "caption_column"])
def test_captions_are_for_models_that_read_them(tmp_path, key):
    root = write_folder(tmp_path / "pictures", ["a cat"])
    with pytest.raises(UserError) as caught:
        load(root, captioned=False, **{key: "text"})
    assert caught.value.problems == (f"data.{key}: found 'text'; only valid for a text-to-image model",)


def test_a_changed_caption_is_other_data(tmp_path):
    root = write_folder(tmp_path / "pictures", ["a cat", "a dog"])
    before, pixels = load(root).fingerprint, load(root, captioned=False).fingerprint
    (root / "001.txt").write_text("a fox")
    assert load(root).fingerprint != before
    (root / "001.txt").write_text("a dog")
    assert load(root).fingerprint == before
    assert load(root, captioned=False).fingerprint == pixels


@given(TEXTS, st.data())
def test_a_selection_of_captions_is_that_of_its_images(several, data):
    captions = Captions.of(several)
    assert [captions.all_of(index) for index in range(len(several))] == several
    chosen = data.draw(st.lists(st.integers(0, len(several) - 1), min_size=1))
    selected = captions.select(np.array(chosen))
    assert [selected.all_of(index) for index in range(len(chosen))] == [several[index] for index in chosen]
    assert selected.texts == sorted({text for index in chosen for text in several[index]})
    assert [selected.texts[selected.first(index)] for index in range(len(chosen))] == [several[i][0] for i in chosen]


def test_one_of_several_is_drawn_by_position_alone():
    captions = Captions.of([["a"], ["b", "c", "d"]])
    seed, positions = 5, range(3000)
    drawn = [captions.drawn(seed, Slot(1, 2, position, 1.0)) for position in positions]
    assert drawn == [captions.drawn(seed, Slot(1, 2, position, 0.25)) for position in positions]
    expected = [int(3 * randomness.uniform(seed, "caption", 2, position, 1)[0]) for position in positions]
    assert [captions.texts[row] for row in drawn] == ["bcd"[place] for place in expected]
    # 3000 draws of 1/3: standard deviation 26, five of them on either side of 1000
    assert all(abs(drawn.count(row) - 1000) < 130 for row in (1, 2, 3))
    assert drawn != [captions.drawn(seed, Slot(1, 3, position, 1.0)) for position in positions]
    assert {captions.drawn(seed, Slot(0, 2, position, 1.0)) for position in positions} == {0}
