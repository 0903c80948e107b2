"""The plan says what decoding does to the pictures: size, crop, colour."""

import numpy as np
import pytest
from PIL import Image

from finetune.config.inputs import DataConfig
from finetune.core.kind import ImageFormat
from finetune.data.loading import load_data


def notes(folder, sizes, channels=1, resolution=8, mode="L"):
    folder.mkdir()
    for index, (width, height) in enumerate(sizes):
        pixels = np.full((height, width), index, np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / f"{index}.png")
    config = DataConfig(source=str(folder), validation_fraction=0.0)
    return load_data(config, ImageFormat(channels, resolution), 0)[0].notes[1:]  # the first counts the files


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([(8, 8), (8, 8)], ["sizes: 8 x 8 pixels, the shorter side resized to 8"]),
        ([(4, 4), (4, 4)], ["sizes: 4 x 4 pixels, the shorter side resized to 8 (2 of 2 enlarged)"]),
        # Of 20 x 10 half is lost, of 8 x 16 too, of 12 x 9 a quarter: (50 + 50 + 25) / 3 = 41.7 %.
        (
            [(20, 10), (8, 16), (12, 9)],
            [
                "sizes: 8 x 16 to 20 x 10 pixels, the shorter side resized to 8",
                "cropped to squares: 42% of a picture on average, 50% at most",
            ],
        ),
    ],
)
def test_sizes_and_crops_are_summed_up(tmp_path, sizes, expected):
    assert notes(tmp_path / "pictures", sizes) == expected


@pytest.mark.filterwarnings("error")
def test_pictures_that_are_left_out_do_not_count(tmp_path):
    """The second of three is bad; of the others, each 20 x 10 in colour, half is lost."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in "ac":
        Image.new("RGB", (20, 10)).save(folder / f"{name}.png")
    (folder / "b.png").write_bytes(b"no picture")
    config = DataConfig(source=str(folder), validation_fraction=0.0, on_bad_image="skip")
    assert load_data(config, ImageFormat(1, 16), 0)[0].notes[-3:] == [
        "sizes: 20 x 10 pixels, the shorter side resized to 16 (2 of 2 enlarged)",
        "cropped to squares: 50% of a picture on average, 50% at most",
        "colour made grey, as the model has one channel: 2 of 2",
    ]


@pytest.mark.parametrize(("mode", "channels", "grey"), [("RGB", 1, True), ("L", 1, False), ("RGB", 3, False)])
def test_colour_that_becomes_grey_is_counted(tmp_path, mode, channels, grey):
    line = "colour made grey, as the model has one channel: 2 of 2"
    assert (line in notes(tmp_path / "pictures", [(8, 8), (8, 8)], channels, mode=mode)) is grey


def test_bad_pictures_that_are_left_out_are_not_counted(tmp_path):
    notes(tmp_path / "x", [(8, 8), (16, 8)])
    (tmp_path / "x" / "0.5.png").write_bytes(b"nothing")  # between the two
    config = DataConfig(source=str(tmp_path / "x"), validation_fraction=0.0, on_bad_image="skip")
    found = load_data(config, ImageFormat(1, 8), 0)[0].notes
    assert "sizes: 8 x 8 to 16 x 8 pixels, the shorter side resized to 8" in found
    assert "cropped to squares: 25% of a picture on average, 50% at most" in found
