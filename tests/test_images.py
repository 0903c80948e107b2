import contextlib
import io
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from finetune import images
from finetune.errors import UserError
from finetune.images import BadImageError, check_format, decode, quiet


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def plain(mode: str, value, **options) -> bytes:
    return encoded(Image.new(mode, (2, 2), value), **options)


def palette(**options) -> bytes:
    """All pixels of entry 1, which is red; entry 0 is black."""
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    return encoded(image, **options)


def values(value: float, dtype: type, kind: str = "TIFF", **options) -> bytes:
    return encoded(Image.fromarray(np.full((2, 2), value, dtype=dtype)), kind, **options)


def small(data: bytes | str, channels: int = 3, background: str = "white") -> list[int]:
    """The one colour of a picture of one colour."""
    pixels = decode(data, channels, 2, "center", background)
    assert pixels.shape == (2, 2, channels)
    assert pixels.dtype == np.uint8
    assert (pixels == pixels[0, 0]).all()
    return pixels[0, 0].tolist()


RED, GREEN, BLUE, WHITE = [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]


@pytest.mark.parametrize(
    ("data", "background", "expected"),
    [
        # Black, alpha 64 of 255, on white: 255 * (1 - 64/255) = 191.
        (plain("RGBA", (0, 0, 0, 64)), "white", [191, 191, 191]),
        (plain("RGBA", (0, 0, 0, 64), kind="WEBP", lossless=True), "white", [191, 191, 191]),
        (plain("LA", (0, 64)), "white", [191, 191, 191]),
        (plain("LA", (255, 0)), "rgb(0, 255, 0)", GREEN),
        (plain("RGBA", (255, 0, 0, 255)), "blue", RED),
        (plain("RGB", (255, 0, 0)), "blue", RED),
        (plain("RGB", (255, 0, 0), transparency=(255, 0, 0)), "#0000ff", BLUE),
        (plain("RGB", (255, 0, 0), transparency=(254, 0, 0)), "#0000ff", RED),
        (plain("L", 7), "red", [7, 7, 7]),
        (plain("L", 7, transparency=7), "#f00", RED),
        (plain("1", 1), "red", WHITE),
        (plain("1", 1, transparency=1), "red", RED),
        (palette(), "blue", RED),
        (palette(transparency=1), "blue", BLUE),
        # Entry 1 is half there: red 255 * 128/255 = 128, blue 255 * 127/255 = 127.
        (palette(transparency=bytes([255, 128])), "blue", [128, 0, 127]),
        (palette(kind="GIF"), "blue", RED),
        (palette(kind="GIF", transparency=1), "blue", BLUE),
        (plain("CMYK", (0, 255, 255, 0), kind="TIFF"), "blue", RED),
        (plain("CMYK", (0, 255, 255, 0), kind="JPEG"), "blue", RED),
        (plain("YCbCr", (255, 128, 128), kind="TIFF"), "blue", WHITE),
        # 16 bits are scaled, not clipped: 257 * 100 is 100 of 255, 65535 is 255.
        (values(25_700, np.uint16, "PNG"), "red", [100, 100, 100]),
        (values(65_535, np.uint16, "PNG"), "red", WHITE),
        (values(32_768, np.uint16), "red", [128, 128, 128]),
        (values(300, np.uint16, "PNG", transparency=300), "red", RED),
        (values(25_700, np.int32), "red", [100, 100, 100]),
        (values(2**31 - 1, np.int32), "red", WHITE),
        # Floats go by the smallest scale that holds them: 0 .. 1, 0 .. 255, 0 .. 65535.
        (values(0.5, np.float32), "red", [128, 128, 128]),
        (values(100, np.float32), "red", [100, 100, 100]),
        (values(25_700, np.float32), "red", [100, 100, 100]),
    ],
)
def test_any_mode_becomes_rgb_on_the_background(data, background, expected):
    assert small(data, 3, background) == expected


def test_lab_becomes_rgb():
    # L 128 of 255 with a = b = 0 is grey of lightness 50.2, in sRGB 119.5.
    assert np.abs(np.array(small(plain("LAB", (128, 128, 128), kind="TIFF"))) - 119.5).max() <= 1


def test_channels_are_what_the_network_asks_for():
    # ITU-R 601: 0.299 * 255 = 76.2.
    assert small(plain("RGB", (255, 0, 0)), 1) == [76]
    assert small(plain("L", 9), 1) == [9]
    assert small(plain("LA", (0, 64)), 1) == [191]
    assert small(palette(transparency=1), 1, "red") == [76]
    assert small(plain("RGBA", (10, 20, 30, 64)), 4, "red") == [10, 20, 30, 64]
    assert small(plain("RGB", (10, 20, 30)), 4) == [10, 20, 30, 255]
    assert small(plain("L", 9), 4) == [9, 9, 9, 255]


@pytest.mark.parametrize(("channels", "background", "named"), [(2, "white", "model"), (3, "whit", "data.background")])
def test_what_no_picture_can_become_is_refused(channels, background, named):
    with pytest.raises(UserError, match=f"^{named}: found ") as caught:
        check_format(channels, background)
    assert len(caught.value.problems) == 1
    check_format(3, "hsl(0, 100%, 50%)")


def quadrants(width: int, height: int) -> np.ndarray:
    """Grey levels: 0 and 80 above, 160 and 240 below."""
    rows, columns = np.indices((height, width))
    return ((rows * 2 // height) * 160 + (columns * 2 // width) * 80).astype(np.uint8)


# How a camera that was held as orientation k says stores an upright picture.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.T,
    6: lambda a: np.rot90(a),
    7: lambda a: a[::-1, ::-1].T,
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", STORED)
def test_a_picture_stands_upright(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = quadrants(256, 128)
    data = encoded(Image.fromarray(np.ascontiguousarray(STORED[orientation](upright))), kind, exif=exif)
    pixels = decode(data, 1, 16, "random", "white")[..., 0]
    assert pixels.shape == (16, 32)
    corners = pixels[4::8, 8::16]  # far from the edges between quadrants
    assert np.abs(corners.astype(int) - [[0, 80], [160, 240]]).max() <= 4
    square = decode(data, 1, 16, "center", "white")[..., 0]
    assert np.abs(square[4::8, 4::8].astype(int) - [[0, 80], [160, 240]]).max() <= 4


def test_broken_metadata_does_not_cost_the_picture():
    assert small(plain("RGB", (1, 2, 3), exif=b"Exif\x00\x00garbage")) == [1, 2, 3]


@settings(max_examples=60, deadline=None)
@given(st.integers(16, 700), st.integers(16, 700), st.integers(2, 128), st.sampled_from(["center", "random"]))
def test_jpeg_is_decoded_reduced_but_never_below_the_target(width, height, resolution, crop):
    sizes, resized = [], images._resized
    data = encoded(Image.new("RGB", (width, height)), "JPEG")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "_resized", lambda image, *rest: sizes.append(image.size) or resized(image, *rest))
        pixels = decode(data, 3, resolution, crop, "white")
    side = min(width, height)
    scale = max(s for s in (1, 2, 4, 8) if s == 1 or side // s >= resolution)
    assert sizes == [(-(-width // scale), -(-height // scale))]
    assert min(sizes[0]) >= min(side, resolution)
    # The proportions are those of the whole picture: the reduced one's are off by as much as 17 / 8 rounded up to 3.
    longer = resolution if crop == "center" else max(resolution, round(max(width, height) * resolution / side))
    assert pixels.shape[:2] == ((longer, resolution) if height > width else (resolution, longer))


def test_the_reduced_picture_looks_like_the_full_one(monkeypatch):
    rows, columns = np.indices((800, 1200))
    photo = np.stack([rows * 255 // 800, columns * 255 // 1200, (rows // 100 + columns // 100) % 2 * 200], axis=2)
    data = encoded(Image.fromarray(photo.astype(np.uint8)), "JPEG", quality=95)
    reduced = decode(data, 3, 64, "random", "white").astype(int)
    monkeypatch.setattr(ImageFile.ImageFile, "draft", lambda *_: None)
    monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile.draft", lambda *_: None)
    full = decode(data, 3, 64, "random", "white").astype(int)
    assert reduced.shape == full.shape == (64, 96, 3)
    assert 0 < np.abs(reduced - full).mean() < 2  # above 0: the patch did take the reduction away


def test_fine_detail_is_averaged_and_not_sampled():
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    pixels = decode(encoded(Image.fromarray(board)), 1, 8, "center", "white")
    assert np.abs(pixels.astype(int) - 127).max() <= 2


def test_transparent_pixels_do_not_bleed_when_resized():
    """Invisible red beside opaque black: what is mixed is black and the background, never red."""
    picture = np.zeros((64, 64, 4), dtype=np.uint8)
    picture[:, :32] = 255, 0, 0, 0
    picture[:, 32:, 3] = 255
    pixels = decode(encoded(Image.fromarray(picture)), 3, 9, "center", "white")
    assert np.ptp(pixels.astype(int), axis=2).max() <= 1


def test_the_middle_square_is_kept_or_the_longer_side():
    stripes = np.repeat(np.array([[10, 20, 30]], dtype=np.uint8), 4, axis=0).repeat(4, axis=1)  # 4 x 12
    data = encoded(Image.fromarray(stripes))
    assert (decode(data, 1, 4, "center", "white") == 20).all()
    kept = decode(data, 1, 4, "random", "white")
    assert kept.shape == (4, 12, 1)
    assert (kept[..., 0] == stripes).all()
    assert decode(data, 1, 8, "random", "white").shape == (8, 24, 1)
    upright = encoded(Image.fromarray(np.ascontiguousarray(stripes.T)))
    assert (decode(upright, 1, 4, "center", "white") == 20).all()
    assert decode(upright, 1, 8, "random", "white").shape == (24, 8, 1)


def test_of_several_frames_the_first_counts():
    red, blue = (Image.new("RGB", (2, 2), colour) for colour in ("red", "blue"))
    for kind in ("GIF", "TIFF", "PNG"):
        assert small(encoded(red, kind, save_all=True, append_images=[blue])) == RED


def test_a_path_is_read_as_bytes_are(tmp_path):
    path = tmp_path / "red.png"
    path.write_bytes(plain("RGB", (255, 0, 0)))
    assert small(str(path)) == RED


NOISE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
JPEG, PNG = (encoded(Image.fromarray(NOISE), kind) for kind in ("JPEG", "PNG"))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty (0 bytes)"),
        (b"It says .png but it is a letter.", "is not a picture in any known format, or damaged at its start"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not a picture in any known format"),
        (JPEG[: len(JPEG) // 2], "is damaged or cut off: image file is truncated"),
        (PNG[: len(PNG) // 2], "is damaged or cut off: image file is truncated"),
        (encoded(Image.new("RGB", (1, 1))), "is 1 x 1 pixels, expected at least 2 a side"),
        (encoded(Image.new("RGB", (9, 1))), "is 9 x 1 pixels, expected at least 2 a side"),
        (encoded(Image.new("1", (20_000, 20_000))), "is too large: Image size (400000000 pixels) exceeds limit"),
        (values(-1, np.float32), "has values from -1 to -1, expected 0 to 65535"),
        (values(np.nan, np.float32), "has values from nan to nan"),
        (values(1e6, np.float32), "has values from 1e+06 to 1e+06"),
        (values(-5, np.int32), "has values from -5 to -5"),
        ("/nowhere/at/all.png", "does not exist"),
        ("/", "cannot be read: Is a directory"),
    ],
)
def test_a_bad_picture_says_why_and_nothing_else_is_printed(data, reason, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with quiet(), pytest.raises(BadImageError) as caught:
            decode(data, 3, 8, "random", "white")
    assert str(caught.value).startswith(reason)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_an_unreadable_file_says_so(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", "x.png")

    monkeypatch.setattr(images.Image, "open", refuse)  # a mode of 000 does not keep root out
    with pytest.raises(BadImageError, match=r"^cannot be read: Permission denied$"):
        decode("x.png", 3, 8, "center", "white")


def test_a_large_picture_is_no_bomb_and_no_warning(capfd):
    data = encoded(Image.new("L", (10_000, 10_000), 9))
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with quiet():
            assert (decode(data, 1, 8, "center", "white") == 9).all()
        assert shown == []
        decode(data, 1, 8, "center", "white")
        assert [warning.category for warning in shown] == [Image.DecompressionBombWarning]
    assert capfd.readouterr() == ("", "")


def test_a_thread_of_a_picture_cannot_fill_the_memory():
    data = encoded(Image.new("1", (60_000, 2)))
    with pytest.raises(BadImageError, match="60000 x 2 pixels: too long and narrow to become 15360000 x 512"):
        decode(data, 3, 512, "random", "white")
    assert decode(data, 3, 512, "center", "white").shape == (512, 512, 3)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([JPEG, PNG]), st.data())
def test_damage_of_any_kind_is_a_picture_or_a_reason(data, draw):
    cut = draw.draw(st.integers(0, len(data)))
    damaged = bytearray(data[:cut])
    for place in draw.draw(st.lists(st.integers(0, max(cut - 1, 0)), max_size=4)) if cut else []:
        damaged[place] = draw.draw(st.integers(0, 255))
    with contextlib.suppress(BadImageError):  # and nothing else
        assert decode(bytes(damaged), 3, 8, "center", "white").shape == (8, 8, 3)
