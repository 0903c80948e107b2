"""Decoding: whatever a picture is, its pixels are what a viewer shows, by values worked out by hand."""

import contextlib
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageFile, PngImagePlugin

from finetune.core.errors import UserError
from finetune.data import decode as decoding
from finetune.data import loading
from finetune.data.decode import check_format, decode
from finetune.data.pixels import BadImageError
from finetune.data.sources import quiet
from harness.originals import original


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


def tiff(value: float, dtype: type, **tags: int) -> bytes:
    """A grey TIFF of one value with further tags: MaxSampleValue is 281, PhotometricInterpretation 262."""
    return values(value, dtype, tiffinfo={int(tag.removeprefix("tag")): number for tag, number in tags.items()})


def raw_tiff(value: int, bits: int, signed: bool = False) -> bytes:
    """An uncompressed TIFF of 2 x 2 samples of so many bits, which PIL reads and does not write."""
    if bits == 12:
        row = (value << 12 | value).to_bytes(3, "big")
    else:
        row = value.to_bytes(bits // 8, "little", signed=signed) * 2
    entries = [(256, 2), (257, 2), (258, bits), (259, 1), (262, 1), (273, 134), (277, 1), (278, 2), (279, 2 * len(row))]
    entries += [(339, 2 if signed else 1)]
    table = b"".join(struct.pack("<HHII", tag, 4, 1, number) for tag, number in entries)
    head = struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + table + struct.pack("<I", 0)
    return head.ljust(134, b"\0") + row * 2


def pgm(value: int, most: int) -> bytes:
    size = 2 if most > 255 else 1
    return b"P5 2 2 %d\n" % most + value.to_bytes(size, "big") * 4


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
        (values(5000, np.uint16, "PNG", transparency=5000), "red", RED),
        (values(25_700, np.int32), "red", [100, 100, 100]),
        # 32-bit integers come without a convention: 200 is of 255, as where `datasets` wrote a column of integers.
        (values(200, np.int32), "red", [200, 200, 200]),
        # 12 significant bits: 4095 is white, 2048 / 4095 x 255 = 127.5, rounded up.
        (tiff(4095, np.uint16, tag281=4095), "red", WHITE),
        (tiff(2048, np.uint16, tag281=4095), "red", [128, 128, 128]),
        # any other largest sample is a statistic of the picture, and says nothing about white
        (tiff(25_700, np.uint16, tag281=25_700), "red", [100, 100, 100]),
        (raw_tiff(4095, 12), "red", WHITE),
        (raw_tiff(2048, 12), "red", [128, 128, 128]),
        # Photometric interpretation 0: the largest value is black. 65535 - 25700 is 155 of 255, inverted 100.
        (tiff(65_535 - 25_700, np.uint16, tag262=0), "red", [100, 100, 100]),
        (tiff(65_535, np.uint16, tag262=0), "red", [0, 0, 0]),
        # Signed 16 bits reach 32767: 16384 / 32767 x 255 = 127.5, rounded up. They may also hold 0 to 255.
        (raw_tiff(16_384, 16, signed=True), "red", [128, 128, 128]),
        (raw_tiff(200, 16, signed=True), "red", [200, 200, 200]),
        (raw_tiff(255, 16, signed=True), "red", WHITE),
        # Unsigned 32 bits reach 2^32 - 1, of which 2^31 is the half.
        (raw_tiff(2**31, 32), "red", [128, 128, 128]),
        (raw_tiff(2**32 - 1, 32), "red", WHITE),
        (raw_tiff(2**31 - 1, 32), "red", [127, 127, 127]),
        (raw_tiff(2**31 - 1, 32, signed=True), "red", WHITE),
        (raw_tiff(200, 32), "red", [200, 200, 200]),
        (raw_tiff(25_700, 32), "red", [100, 100, 100]),
        # Of a PGM the header says what white is, however dark the picture: 200 / 65535 x 255 = 0.8.
        (pgm(4095, 4095), "red", WHITE),
        (pgm(200, 65_535), "red", [1, 1, 1]),
        (pgm(100, 255), "red", [100, 100, 100]),
        (values(2**31 - 1, np.int32), "red", WHITE),
        # Floats go by the smallest scale that holds them: 0 .. 1, 0 .. 255, 0 .. 65535.
        (values(0.5, np.float32), "red", [128, 128, 128]),
        (values(100, np.float32), "red", [100, 100, 100]),
        (values(25_700, np.float32), "red", [100, 100, 100]),
    ],
)
def test_any_mode_becomes_rgb_on_the_background(data, background, expected):
    assert small(data, 3, background) == expected


def png(depth: int, colour: int, samples: bytes, transparent: bytes) -> bytes:
    """A PNG of 2 x 2 pixels of any depth and colour type (0 grey, 2 RGB), with a transparent colour."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 2, 2, depth, colour, 0, 0, 0)
    parts = {b"IHDR": header, b"tRNS": transparent, b"IDAT": zlib.compress((b"\0" + samples) * 2), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts.items())


@pytest.mark.parametrize(
    ("depth", "colour", "samples", "transparent", "other"),
    [
        (2, 0, bytes([0b01010000]), struct.pack(">H", 1), struct.pack(">H", 2)),  # grey 1 of 3
        (4, 0, bytes([0x77]), struct.pack(">H", 7), struct.pack(">H", 6)),  # grey 7 of 15
        (8, 0, bytes([9, 9]), struct.pack(">H", 9), struct.pack(">H", 8)),
        (8, 2, bytes([1, 2, 3] * 2), struct.pack(">3H", 1, 2, 3), struct.pack(">3H", 1, 2, 4)),
        (
            *(16, 2, struct.pack(">3H", 5120, 10_240, 15_360) * 2),
            *(struct.pack(">3H", 5120, 10_240, 15_360), struct.pack(">3H", 0, 0, 0)),
        ),
    ],
)
def test_the_transparent_colour_of_a_png_is_of_its_own_depth(depth, colour, samples, transparent, other):
    assert small(png(depth, colour, samples, transparent), background="red") == RED
    assert small(png(depth, colour, samples, other), background="red") != RED


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (raw_tiff(-100, 8, signed=True), "has signed samples of 8 bits"),
        (plain("CMYK", (0, 255, 255, 0), kind="TIFF", tiffinfo={332: 2}), "has inks other than cyan"),
        # Between two conventions nothing says which value is white: 4095 of 65535 would be nearly black.
        (values(4095, np.int32), "has values up to 4095, and nothing says which value is white"),
        (raw_tiff(4095, 16, signed=True), "has values up to 4095, and nothing"),
        (raw_tiff(70_000, 32), "has values up to 70000, and nothing"),
        (values(1.2, np.float32), "has values up to 1.2, and nothing"),
        (raw_tiff(-1, 16, signed=True), "has values from -1 to -1, expected 0 to 32767"),
        (values(-5, np.int32), "has values from -5 to -5, expected 0 to 2147483647"),
        (values(70_000, np.float32), "has values from 70000 to 70000, expected 0 to 65535"),
        (values(np.nan, np.float32), "has values from nan to nan"),
        (tiff(4096, np.uint16, tag281=4095), "has values from 4096 to 4096, expected 0 to 4095"),
    ],
)
def test_samples_that_no_convention_makes_a_picture_are_refused_by_name(data, reason):
    with pytest.raises(BadImageError, match=reason):
        small(data)


def s15(*numbers: float) -> bytes:
    """ICC's s15Fixed16Number: a signed integer of 1/65536."""
    return b"".join(struct.pack(">i", round(number * 65536)) for number in numbers)


def profile(space: bytes, tags: dict[bytes, bytes], connection: bytes = b"XYZ ") -> bytes:
    """An ICC profile, version 2.4: the header, the table of tags, and the tags (ICC.1:2001-04, section 6)."""
    tags = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0".ljust(83, b"\0")} | tags
    tags[b"wtpt"] = b"XYZ \0\0\0\0" + s15(0.9642, 1, 0.8249)
    body, table, place = b"", b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        data = data.ljust(-(-len(data) // 4) * 4, b"\0")
        table += name + struct.pack(">II", place + len(body), len(data))
        body += data
    head = struct.pack(">I4sI4s4s4s", place + len(body), b"\0" * 4, 0x02400000, b"mntr", space, connection)
    head += b"\0" * 12 + b"acsp" + b"\0" * 28 + s15(0.9642, 1, 0.8249)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def gamma(exponent: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(exponent * 256))


def curve_of_srgb() -> bytes:
    """sRGB's transfer curve as a table of 1024 values."""
    x = np.linspace(0, 1, 1024)
    y = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    return b"curv\0\0\0\0" + struct.pack(">I1024H", 1024, *np.rint(y * 65535).astype(int))


def matrix_profile(primaries: list[tuple[float, float, float]], curve: bytes) -> bytes:
    """RGB by the XYZ of its primaries, adapted to D50, and one curve."""
    columns = {
        name: b"XYZ \0\0\0\0" + s15(*xyz) for name, xyz in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True)
    }
    return profile(b"RGB ", columns | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve))


def table_profile() -> bytes:
    """CMYK by a table of its 16 corners, in which cyan alone decides: white without it, black with it."""
    identity = bytes(range(256))
    corners = b"".join(bytes([0 if corner & 8 else 255, 128, 128]) for corner in range(16))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + s15(1, 0, 0, 0, 1, 0, 0, 0, 1) + identity * 4 + corners + identity * 3
    return profile(b"CMYK", {b"A2B0": lut}, connection=b"Lab ")


P3_PRIMARIES = [(0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407)]
DISPLAY_P3 = matrix_profile(P3_PRIMARIES, curve_of_srgb())


@pytest.mark.parametrize(
    ("mode", "value", "icc", "expected"),
    [
        # Display P3 (200, 60, 60): linear (0.578, 0.045, 0.045), by the matrices of both spaces (0.699, 0.022, 0.034).
        ("RGB", (200, 60, 60), DISPLAY_P3, [217, 42, 52]),
        ("RGBA", (200, 60, 60, 255), DISPLAY_P3, [217, 42, 52]),
        # The same primaries with a curve of 2.2, as some displays are described.
        ("RGB", (200, 60, 60), matrix_profile(P3_PRIMARIES, gamma(2.2)), [219, 37, 49]),
        # Grey stays grey between spaces of one curve and one white, also where its profile is of colour.
        ("RGB", (90, 90, 90), DISPLAY_P3, [90, 90, 90]),
        ("L", 90, DISPLAY_P3, [90, 90, 90]),
        # Linear grey of 128 / 255 = 0.502: 1.055 x 0.502^(1/2.4) - 0.055 = 0.737, 188 of 255.
        ("L", 128, profile(b"GRAY", {b"kTRC": gamma(1.0)}), [188, 188, 188]),
        ("LA", (128, 255), profile(b"GRAY", {b"kTRC": gamma(1.0)}), [188, 188, 188]),
        # Without the profile the first would be red and the second white.
        ("CMYK", (0, 255, 255, 0), table_profile(), WHITE),
        ("CMYK", (255, 0, 0, 0), table_profile(), [0, 0, 0]),
        # A broken profile counts as sRGB, and so does one of another kind of colour.
        ("RGB", (200, 60, 60), b"no profile", [200, 60, 60]),
        ("RGB", (200, 60, 60), DISPLAY_P3[:300], [200, 60, 60]),
        ("RGB", (200, 60, 60), table_profile(), [200, 60, 60]),
        ("CMYK", (0, 255, 255, 0), DISPLAY_P3, RED),
    ],
)
def test_colour_profiles_are_converted_to_srgb(mode, value, icc, expected):
    found = small(plain(mode, value, kind="TIFF", icc_profile=icc))
    assert np.abs(np.array(found) - expected).max() <= 1, found


def test_srgb_itself_is_left_as_it_is():
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert (decode(encoded(Image.fromarray(noise), icc_profile=data), 3, 16, "center", "white") == noise).all()


def named(name: bytes, icc: bytes) -> bytes:
    return icc.replace(b"test\0".ljust(83, b"\0"), name.ljust(83, b"\0"))


SRGB_PRIMARIES = [(0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.7141)]


@pytest.mark.parametrize(
    ("icc", "expected"),
    [
        (named(b"sRGB IEC61966-2.1", matrix_profile(SRGB_PRIMARIES, curve_of_srgb())), [200, 60, 60]),
        # Linear light, as of sRGB-elle-V2-g10.icc: 1.055 x (200/255)^(1/2.4) - 0.055 = 0.898, of 60/255 0.523.
        (named(b"sRGB-elle-V2-g10.icc", matrix_profile(SRGB_PRIMARIES, gamma(1.0))), [229, 133, 133]),
        (named(b"sRGB, wide", DISPLAY_P3), [217, 42, 52]),
        (named(b"sRGB of ink", table_profile()), [200, 60, 60]),  # of another kind of colour
    ],
)
def test_a_profile_is_srgb_by_what_it_does_and_not_by_its_name(icc, expected):
    found = small(plain("RGB", (200, 60, 60), icc_profile=icc))
    assert np.abs(np.array(found) - expected).max() <= 1, found


def test_transparency_survives_a_colour_profile():
    assert small(plain("RGBA", (90, 90, 90, 64), icc_profile=DISPLAY_P3), 4)[3] == 64


@pytest.mark.parametrize("megabytes", [2, 20])
@pytest.mark.parametrize("kind", ["text", "profile"])
def test_large_metadata_does_not_cost_the_picture(kind, megabytes):
    text = "x" * (megabytes * 2**20)
    if kind == "profile":
        assert small(plain("RGB", (1, 2, 3), icc_profile=text.encode())) == [1, 2, 3]
        return
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", text, zip=True)
    assert small(plain("RGB", (1, 2, 3), pnginfo=info)) == [1, 2, 3]


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


@pytest.mark.parametrize(
    ("channels", "background", "named"),
    [
        (2, "white", "model"),
        (3, "whit", "data.background"),
        (3, "#ff000080", "data.background"),  # half transparent: what should be below it?
        (3, "rgba(255, 0, 0, 128)", "data.background"),
    ],
)
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
    sizes, resized = [], decoding._resized
    data = encoded(Image.new("RGB", (width, height)), "JPEG")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "_resized", lambda image, *rest: sizes.append(image.size) or resized(image, *rest))
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
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is a PostScript file: convert it to PNG or JPEG"),
        (JPEG[: len(JPEG) // 2], "is damaged or cut off: image file is truncated"),
        (PNG[: len(PNG) // 2], "is damaged or cut off: image file is truncated"),
        # Room on the disk that was never written, as an interrupted copy leaves it.
        (JPEG[: len(JPEG) // 2].ljust(len(JPEG), b"\0"), "is damaged or cut off: it ends in zeros"),
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


@pytest.mark.parametrize("end", [b"", b"\0" * 5000, b"SEFT", b"\xff\xd9"])
def test_a_jpeg_may_have_padding_after_its_end(tmp_path, end):
    (tmp_path / "x.jpg").write_bytes(JPEG + end)
    whole = decode(JPEG, 3, 8, "center", "white")
    assert (decode(JPEG + end, 3, 8, "center", "white") == whole).all()
    assert (decode(str(tmp_path / "x.jpg"), 3, 8, "center", "white") == whole).all()


def test_an_unreadable_file_says_so(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", "x.png")

    monkeypatch.setattr(decoding.Image, "open", refuse)  # a mode of 000 does not keep root out
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


@pytest.mark.parametrize(("orientation", "expected"), [(1, (6, 4)), (3, (6, 4)), (6, (4, 6)), (8, (4, 6))])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_the_original_size_is_that_of_the_upright_picture(kind, orientation, expected):
    """Of 6 x 4 pixels; orientations 5 to 8 lie on their side."""
    exif = Image.Exif()
    exif[274] = orientation
    file = io.BytesIO()
    Image.new("RGB", (6, 4)).save(file, kind, exif=exif)
    width, height = original(file.getvalue())[:2]
    assert (width, height) == expected
    pixels = decode(file.getvalue(), 3, 4, "random", "white")
    assert (pixels.shape[1], pixels.shape[0]) == expected


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF"])
def test_a_picture_is_opened_and_its_pixels_read_once(kind, monkeypatch):
    """A PNG's orientation is known once it is loaded: asking for it apart from decoding would decode it again."""
    data, opened, open_ = encoded(Image.new("RGB", (6, 4)), kind), [], Image.open
    monkeypatch.setattr(Image, "open", lambda *args, **options: opened.append(args) or open_(*args, **options))
    row = loading._decode_row(
        {"bytes": data, "path": None}, (), channels=3, resolution=4, crop="center", background="white"
    )
    assert (row["original_width"], row["original_height"], len(opened)) == (6, 4, 1)
