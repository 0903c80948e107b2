"""Pictures that keep one of several shapes: decoded, cached, cropped and counted."""

import numpy as np
import pytest
from PIL import Image

from finetune.config.inputs import DataConfig
from finetune.core.kind import ImageFormat
from finetune.core.shapes import Shape
from finetune.data import loading
from finetune.data.decode import decode, decode_to_shape
from finetune.data.loading import load_data
from finetune.data.order import Slot
from harness.batches import batches
from harness.configs import picture

LADDER = [Shape(8, 8), Shape(8, 16), Shape(16, 8)]


def load(folder, shapes=LADDER, **options):
    config = DataConfig(source=str(folder), validation_fraction=0.0, **options)
    return load_data(config, ImageFormat(1, 8), 0, shapes=shapes)[0]


@pytest.fixture
def folder(tmp_path):
    """Wide, tall, square, wide with a tail that is cut off."""
    for index, size in enumerate([(40, 20), (20, 40), (30, 30), (50, 20)]):
        picture(size, index).save(tmp_path / f"{index}.png")
    return tmp_path


def test_each_picture_has_the_nearest_shape(folder):
    images = load(folder)
    assert [images.shape(index) for index in range(4)] == [Shape(8, 16), Shape(16, 8), Shape(8, 8), Shape(8, 16)]
    assert [images[index].shape for index in range(4)] == [(8, 16, 1), (16, 8, 1), (8, 8, 1), (8, 16, 1)]
    assert images.shapes == {Shape(8, 16): 2, Shape(8, 8): 1, Shape(16, 8): 1}
    assert images.shape_numbers.tolist() == [1, 2, 0, 1]  # by area, then height
    assert images.select(np.array([0, 3])).shape_numbers is None  # one shape: dealt as ever
    # 50:20 = 2.5 is scaled to 20 x 8, of which 16 are kept
    assert "cropped to shapes: 5.0% of a picture on average, 20.0% at most" in images.notes
    assert not any("more than half" in note for note in images.notes)


def test_a_random_crop_keeps_what_is_longer_and_cuts_the_shape_out_of_it(folder):
    images = load(folder, crop="random")
    assert images.pixels(3).shape == (8, 20, 1)
    made = batches(images, crop="random")
    seen = {made.read_images([Slot(3, epoch, 0, 1.0)]).numpy().tobytes() for epoch in range(30)}
    assert len(seen) == 5  # places for 16 of 20 columns
    assert made.__getitems__([Slot(0, 0, 0, 1.0), Slot(3, 0, 1, 1.0)])["noise"].shape == (2, 1, 8, 16)


def test_a_picture_on_its_side_is_measured_as_it_stands(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    lying = picture((40, 20), 3)  # to be turned: stands 20 wide and 40 high
    for name in ("a.jpg", "b.png", "c.tiff"):
        lying.save(tmp_path / name, exif=exif)
        made = decode_to_shape((tmp_path / name).read_bytes(), 1, LADDER, "center", "white")
        assert made.shape == Shape(16, 8)
        assert made.pixels.shape == (16, 8, 1)
        assert made.original[:2] == (20, 40)


def test_a_single_square_is_what_decode_makes(folder):
    for file in sorted(folder.glob("*.png")):
        for crop in ("center", "random"):
            made = decode_to_shape(file.read_bytes(), 1, [Shape(8, 8)], crop, "white")
            assert (made.pixels == decode(file.read_bytes(), 1, 8, crop, "white")).all()


def test_shapes_have_entries_of_their_own_in_the_cache(folder, monkeypatch):
    load(folder, None), load(folder)
    calls = []
    monkeypatch.setattr(loading, "decode_to_shape", lambda *args, **options: calls.append(args))
    load(folder, None), load(folder)
    assert calls == []


def test_a_bad_picture_is_left_out_and_a_small_one_counted(folder):
    (folder / "bad.png").write_bytes(b"nothing")
    picture((6, 12), 9).save(folder / "small.png")
    images = load(folder, on_bad_image="skip")
    assert len(images) == 5
    assert images.shape(4) == Shape(16, 8)
    assert "(1 of 5 enlarged)" in " ".join(images.notes)
