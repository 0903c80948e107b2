"""Grids with labels."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from finetune.evaluation import pictures
from finetune.evaluation.pictures import grid


def tiles(count: int, height: int = 2, width: int = 2, channels: int = 1) -> np.ndarray:
    """Images of one colour each, the k-th of brightness k."""
    shape = (count, height, width, channels)
    return np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], shape)


def ink(picture: Image.Image) -> np.ndarray:
    """Where a picture is not white, (H, W)."""
    return np.asarray(picture.convert("L")) < 255


def test_tiles_stand_two_pixels_apart_in_rows():
    pixels = np.asarray(grid(tiles(3), 2, scale=1))
    # 2 + 2 + 2 + 2 + 2: gaps around and between two tiles of two pixels
    assert pixels.shape == (10, 10)
    expected = np.full((10, 10), 255)
    expected[2:4, 2:4], expected[2:4, 6:8], expected[6:8, 2:4] = 0, 1, 2
    assert (pixels == expected).all()


@given(
    count=st.integers(1, 12),
    columns=st.integers(1, 5),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3, 4])),
    scale=st.integers(1, 3),
)
def test_every_tile_is_in_its_place_and_all_else_is_white(count, columns, shape, scale):
    images = tiles(count, *shape)
    pixels = np.asarray(grid(images, columns, scale=scale)).reshape(-1, columns * (shape[1] * scale + 2) + 2, shape[2])
    expected = np.full_like(pixels, 255)
    height, width = shape[0] * scale, shape[1] * scale
    for index in range(count):
        top, left = 2 + index // columns * (height + 2), 2 + index % columns * (width + 2)
        expected[top : top + height, left : left + width] = index
    assert (pixels == expected).all()


@pytest.mark.parametrize(
    ("count", "shape", "size"),
    [
        (1, (16, 16), (68, 68)),  # 16 pixels are shown four times as large: 2 + 64 + 2
        (5, (64, 64), (200, 134)),  # three columns, two rows of 64 + 2, and 2
        (1, (100, 60), (64, 104)),  # larger than 64: as they are
        (1, (10, 20), (84, 44)),  # the longer side decides: 20 x 4 = 80
    ],
)
def test_small_images_are_enlarged_and_the_grid_is_roughly_square(count, shape, size):
    assert grid(tiles(count, *shape)).size == size


def test_labels_stand_beside_their_rows_and_above_their_columns():
    height, width = 40, 60
    images = np.full((6, height, width, 1), 255, np.uint8)  # white: all ink is of labels
    picture = grid(images, 2, ["first", "", "third"], ["left", ""], scale=1)
    # one line of 17 pixels above; beside, as wide as the widest label and 4 pixels more
    top, left = 17, picture.width - (2 + 2 * (width + 2))
    marks = ink(picture)
    rows = [marks[top + 2 + row * 42 : top + 2 + row * 42 + height, :left].any() for row in range(3)]
    assert rows == [True, False, True]
    columns = [marks[:top, left + 2 + column * 62 : left + 2 + column * 62 + width].any() for column in range(2)]
    assert columns == [True, False]
    assert not marks[top:, left:].any()  # nothing is written over the images
    assert not marks[:top, :left].any()  # no corner label was asked for
    assert ink(grid(images, 2, ["first", "", "third"], ["left", ""], "step", 1))[:top, :left].any()


def test_labels_do_not_touch_the_images():
    images = tiles(6, 20, 20, 3)
    bare = np.asarray(grid(images, 3, scale=1))
    labelled = np.asarray(grid(images, 3, ["a class", "another"], ["1", "2", "3"], "guidance", 1))
    assert (labelled[-bare.shape[0] :, -bare.shape[1] :] == bare).all()


def test_another_text_changes_only_its_own_label():
    images = tiles(4, 30, 30)
    one, other = (np.asarray(grid(images, 2, ["wide label", text], ["a", "b"], scale=1)) for text in ("cat", "dog"))
    changed = np.argwhere(one != other)
    second_row = 17 + 2 + 32
    assert len(changed)
    assert (changed[:, 0] >= second_row).all()
    assert (changed[:, 1] < one.shape[1] - (2 + 2 * 32)).all()


def test_blocks_of_columns_share_a_label_and_stand_apart():
    pixels = np.asarray(grid(tiles(4, 20, 20), 4, column_labels=["1.0", "3.0"], scale=1))
    # lefts: 2, 2 + 22, then 8 more: 54, 76; the last tile ends at 96, and a gap follows
    assert pixels.shape == (17 + 24, 98)
    assert [int(pixels[20, left]) for left in (2, 24, 54, 76)] == [0, 1, 2, 3]
    assert (pixels[17:, 44:54] == 255).all()
    columns = np.flatnonzero((pixels[:17] < 255).any(axis=0))
    first, second = columns[columns < 50], columns[columns >= 50]
    # in the middle of tiles 2 .. 44 and of 54 .. 96
    assert (first[0] + first[-1]) / 2 == pytest.approx(23, abs=2)
    assert (second[0] + second[-1]) / 2 == pytest.approx(75, abs=2)


def test_labels_that_do_not_divide_rows_or_columns_are_refused():
    with pytest.raises(ValueError, match="found 3 column labels for 4 columns"):
        grid(tiles(4), 4, column_labels=["a", "b", "c"])
    with pytest.raises(ValueError, match="found 0 row labels for 1 rows"):
        grid(tiles(4), 4, row_labels=[])


def test_a_long_prompt_does_not_make_the_grid_wide():
    prompt = "a watercolour of a lighthouse in a storm, seen from a small boat, at night, " * 5
    picture = grid(tiles(1, 64, 64), 1, [prompt])
    assert 64 + 4 + 120 < picture.width <= 64 + 4 + 160 + 4  # lines of at most 160 pixels
    assert picture.height == 68


@given(
    st.text(st.characters(codec="latin-1", exclude_categories=["C"]), max_size=80),
    st.integers(20, 200),
    st.integers(1, 4),
)
def test_broken_lines_fit_and_hold_the_text_until_there_is_no_room(text, width, most):
    lines = pictures._broken(text, width, most)
    assert 1 <= len(lines) <= most
    assert all(pictures._width(line) <= width for line in lines)
    held, letters = "".join(lines).replace(" ", ""), "".join(text.split())
    assert held == letters or (held[-1] == "…" and letters.startswith(held[:-1]))


def test_words_are_broken_only_where_they_are_too_long():
    assert pictures._broken("one two three", pictures._width("one two"), 3) == ["one two", "three"]
    assert pictures._broken("aaaa", pictures._width("aa"), 3) == ["aa", "aa"]


@pytest.mark.parametrize("letter", ["é", "ł", "ß", "π", "ж"])
def test_class_names_of_other_languages_have_their_letters(letter):
    missing, present = (np.asarray(grid(tiles(1, 64, 64), 1, [text])) for text in ("\uffff", letter))
    assert missing.shape != present.shape or (missing != present).any()


def test_a_picture_is_written_atomically_into_a_new_folder(tmp_path):
    file = tmp_path / "samples" / "step-3.png"
    pictures.save_png(grid(tiles(4)), file)
    assert [path.name for path in file.parent.iterdir()] == ["step-3.png"]
    with Image.open(file) as png:
        assert png.size == (134, 134)  # two tiles of 64, three gaps of 2
