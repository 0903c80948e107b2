"""A thumbnail is left out, and the plan says so, where the picture that it was made from is there too; nothing else
is."""

import warnings

import numpy as np
import pytest
from PIL import Image

from finetune.data.sources import open_source
from harness.configs import picture


def pictures(root, files: dict[str, tuple]):
    """Files of a size and, where given, a seed: all of one seed show the same gradient."""
    for name, (width, height, *seed) in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture((width, height), *(seed or [0])).convert("RGB").save(root / name)
    return root


LARGE, HALF, SMALL, SQUARE = (64, 48), (32, 24), (16, 12), (15, 15)
OTHER = 1  # a seed: the mean difference of 16 x 16 pixels to the picture of seed 0 is 60 of 255

TABLE = [
    ({"a.png": LARGE, "thumbs/a.png": SMALL}, ["thumbs/a.png"]),
    ({"a.png": LARGE, "Thumbnails/a.jpg": SMALL}, ["Thumbnails/a.jpg"]),
    ({"a.png": LARGE, "thumbs/tn_a.png": SMALL}, ["thumbs/tn_a.png"]),
    ({"images/a.png": LARGE, "thumbs/a.png": HALF}, ["thumbs/a.png"]),
    ({"x/a.png": LARGE, "x/thumb/a.png": SMALL, "x/thumb/b.png": SMALL}, ["x/thumb/a.png"]),
    ({"a.png": LARGE, "a-15x15.png": SQUARE, "a_thumb.png": SMALL}, ["a-15x15.png", "a_thumb.png"]),
    ({"a.png": LARGE, "a-48x36.png": (48, 36)}, ["a-48x36.png"]),  # WordPress writes sizes close to the original too
    ({"a-scaled.png": LARGE, "a-32x24.png": HALF}, ["a-32x24.png"]),
    ({"a.png": LARGE, "tn_a.png": SMALL, "thumb-a.png": SMALL}, ["thumb-a.png", "tn_a.png"]),
    ({"a.JPG": LARGE, "A_THUMB.JPG": SMALL}, ["A_THUMB.JPG"]),
    # A picture of one's own: no original, another picture, or as large.
    ({"thumbs/1.png": SMALL, "thumbs/2.png": SMALL}, []),
    ({"a.png": LARGE, "b_thumb.png": SMALL}, []),
    ({"thumb.png": LARGE, "thumbtack.png": SMALL}, []),
    ({"hand.png": LARGE, "hand_thumb.png": (*SMALL, OTHER)}, []),
    ({"up/1.png": LARGE, "thumbs/1.png": (*LARGE, OTHER)}, []),  # gestures, numbered alike
    ({"up/1.png": LARGE, "thumbs/1.png": (*SMALL, OTHER)}, []),
    ({"up/1.png": LARGE, "thumbs/1.png": LARGE}, []),
    ({"a.png": SMALL, "thumbs/a.png": LARGE}, []),
    ({"a.png": LARGE, "thumbs/a.png": (16, 50)}, []),
    ({"a.png": LARGE, "small/a.png": SMALL}, []),
    ({"x/a.png": LARGE, "y/z/thumbs/a.png": SMALL}, []),  # far from it
    ({"a-800x600.png": SMALL}, []),
]


@pytest.mark.parametrize(("files", "left_out"), TABLE)
def test_thumbnails_are_left_out_beside_their_originals(tmp_path, files, left_out):
    source = open_source(str(pictures(tmp_path, files)))
    assert len(source.splits["train"]) == len(files) - len(left_out)
    noted = [note for note in source.notes if note.startswith("left out thumbnails of pictures beside them")]
    assert len(noted) == bool(left_out)
    assert all(name in noted[0] for name in left_out)


def test_the_note_counts_and_names_them(tmp_path):
    files = {f"{name}.png": LARGE for name in "abcd"} | {f"{name}_thumb.jpg": SMALL for name in "abcd"}
    assert open_source(str(pictures(tmp_path, files))).notes == [
        "found 4 pictures: 4 .png",
        "left out thumbnails of pictures beside them (4): 4 .jpg (a_thumb.jpg, b_thumb.jpg, c_thumb.jpg, ...)",
    ]


def test_a_thumbnail_is_upright_where_its_original_says_so_in_exif(tmp_path):
    """Made from a photo that lies on its side, as cameras store those that were taken upright."""
    columns = np.tile(np.linspace(0, 255, 64, dtype=np.uint8), (48, 1))
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(columns).save(tmp_path / "a.jpg", exif=exif)
    Image.fromarray(columns).rotate(-90, expand=True).resize((12, 16)).save(tmp_path / "a_thumb.jpg")
    assert len(open_source(str(tmp_path)).splits["train"]) == 1


def test_a_thumbnail_may_show_the_middle_alone(tmp_path):
    """Of a row of four squares, black, grey, white, black, a square of the middle two halves."""
    row = np.repeat(np.array([[0, 90, 255, 0]], np.uint8), 40, axis=0).repeat(40, axis=1)
    Image.fromarray(row).save(tmp_path / "a.png")
    Image.fromarray(row[:, 60:100]).resize((15, 15)).save(tmp_path / "a-15x15.png")
    Image.fromarray(row[:, :40]).resize((15, 15)).save(
        tmp_path / "a-16x16.png"
    )  # a part at the edge is another picture
    source = open_source(str(tmp_path))
    assert source.notes[1:] == ["left out thumbnails of pictures beside them (1): 1 .png (a-15x15.png)"]


@pytest.mark.parametrize("name", ["SYNOPHOTO_THUMB_M.jpg", "SYNOFILE_THUMB_XL.png", "synophoto_thumb_s.jpg"])
def test_files_of_a_server_are_told_by_their_names(tmp_path, name):
    source = open_source(str(pictures(tmp_path, {"a.png": LARGE, f"eaDir copied/{name}": (*SMALL, OTHER)})))
    assert len(source.splits["train"]) == 1
    assert source.notes[1].startswith("left out hidden and system files (1): ")


def test_labels_are_those_of_the_folders_that_are_left(tmp_path):
    files = {"cat/a.png": LARGE, "dog/b.png": (*LARGE, OTHER), "cat/thumbs/a.png": SMALL}
    split = open_source(str(pictures(tmp_path, files))).splits["train"]
    assert split.features["label"].names == ["cat", "dog"]  # thumbs, a folder deeper, would have cost the labels


def test_metadata_may_name_thumbnails(tmp_path):
    root = pictures(tmp_path, {"a.png": LARGE, "thumbs/a.png": SMALL})
    (root / "metadata.csv").write_text("file_name\na.png\nthumbs/a.png\n")
    assert len(open_source(str(root)).splits["train"]) == 2


def test_what_cannot_be_opened_is_no_thumbnail(tmp_path):
    root = pictures(tmp_path, {"a.png": LARGE})
    (root / "a_thumb.png").write_bytes(b"")
    assert len(open_source(str(root)).splits["train"]) == 2


def test_large_pictures_are_compared_without_a_warning(tmp_path, monkeypatch):
    root = pictures(tmp_path, {"a.png": LARGE, "a_thumb.png": SMALL})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)  # of 64 x 48: PIL warns, and refuses twice as many
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(open_source(str(root)).splits["train"]) == 1
