"""Colour spaces named by numbers in EXIF, PNG, JPEG 2000 and AVIF files, by values worked out by hand."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from finetune.data.decode import decode
from finetune.data.pixels import BadImageError

SIGNATURE = 8 + 25  # bytes of a PNG before the chunks that may follow its header
D65, SRGB = (0.3127, 0.329), (0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
P3 = (0.68, 0.32, 0.265, 0.69, 0.15, 0.06)


def encoded(colour, mode: str = "RGB", kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (8, 8), colour).save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def gamma(value: float) -> bytes:
    return chunk(b"gAMA", struct.pack(">I", round(value * 100_000)))


def chromaticities(*xy: float) -> bytes:
    return chunk(b"cHRM", struct.pack(">8I", *(round(value * 100_000) for value in xy)))


def with_chunks(data: bytes, *chunks: bytes) -> bytes:
    return data[:SIGNATURE] + b"".join(chunks) + data[SIGNATURE:]


def shown(data: bytes, channels: int = 3) -> np.ndarray:
    pixels = decode(data, channels, 8, "center", "white")
    assert np.ptp(pixels.reshape(-1, channels).astype(int), axis=0).max() <= 1
    return pixels[0, 0].astype(int)


def p3_profile() -> bytes:
    """Display P3, taken from what the chunk cICP means; `test_decode` checks such profiles against other numbers."""
    from finetune.data import colour_tags

    return colour_tags._coded(12, 13)


SRGB_CHUNK, CICP_P3, CICP_PQ = chunk(b"sRGB", b"\0"), chunk(b"cICP", bytes([12, 13, 0, 1])), bytes([9, 16, 0, 1])


@pytest.mark.parametrize(
    ("colour", "mode", "chunks", "expected"),
    [
        # Linear light of 128 / 255 = 0.502: 1.055 x 0.502^(1/2.4) - 0.055 = 0.737, 188 of 255.
        ((128, 128, 128), "RGB", [gamma(1.0)], [188, 188, 188]),
        (128, "L", [gamma(1.0)], [188, 188, 188]),
        ((128, 255), "LA", [gamma(1.0)], [188, 188, 188]),
        ((128, 128, 128, 255), "RGBA", [gamma(1.0)], [188, 188, 188]),
        # 1/1.8: 0.502^1.8 = 0.289, in sRGB 0.575, 147 of 255.
        ((128, 128, 128), "RGB", [gamma(1 / 1.8)], [147, 147, 147]),
        # 1/2.2 is how programs write sRGB's own curve; 0 says nothing.
        ((20, 128, 200), "RGB", [gamma(0.45455)], [20, 128, 200]),
        ((20, 128, 200), "RGB", [gamma(0)], [20, 128, 200]),
        ((20, 128, 200), "RGB", [chromaticities(*D65, *SRGB)], [20, 128, 200]),
        ((20, 128, 200), "RGB", [chromaticities(*(0.0,) * 8)], [20, 128, 200]),
        # Display P3 (200, 60, 60): linear (0.578, 0.045, 0.045), by the matrices of both spaces (0.699, 0.022, 0.034).
        ((200, 60, 60), "RGB", [gamma(0.45455), chromaticities(*D65, *P3)], [217, 42, 52]),
        ((200, 60, 60), "RGB", [chromaticities(*D65, *P3)], [217, 42, 52]),
        ((200, 60, 60), "RGB", [CICP_P3], [217, 42, 52]),
        # cICP counts before sRGB, and sRGB before gAMA and cHRM.
        ((200, 60, 60), "RGB", [SRGB_CHUNK, CICP_P3], [217, 42, 52]),
        ((200, 60, 60), "RGB", [SRGB_CHUNK, gamma(1.0), chromaticities(*D65, *P3)], [200, 60, 60]),
        ((200, 60, 60), "RGB", [chunk(b"cICP", bytes([1, 13, 0, 1]))], [200, 60, 60]),
        ((200, 60, 60), "RGB", [chunk(b"cICP", bytes([1, 1, 0, 1]))], [200, 60, 60]),
        ((128, 128, 128), "RGB", [chunk(b"cICP", bytes([1, 8, 0, 1]))], [188, 188, 188]),
    ],
)
def test_chunks_of_a_png(colour, mode, chunks, expected):
    found = shown(with_chunks(encoded(colour, mode), *chunks))
    assert np.abs(found - expected).max() <= 1, found


def test_chunks_of_a_png_in_a_file(tmp_path):
    (tmp_path / "x.png").write_bytes(with_chunks(encoded((128, 128, 128)), gamma(1.0)))
    assert np.abs(shown(str(tmp_path / "x.png")) - 188).max() <= 1


def test_a_profile_counts_before_gamma():
    data = encoded((200, 60, 60), icc_profile=p3_profile())
    assert np.abs(shown(with_chunks(data, gamma(1.0))) - [217, 42, 52]).max() <= 1


def test_alpha_is_no_colour():
    data = with_chunks(encoded((128, 128, 128, 64), "RGBA"), gamma(1.0))
    assert np.abs(shown(data, 4) - [188, 188, 188, 64]).max() <= 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (CICP_PQ, r"is of a high dynamic range \(PQ\): convert it to sRGB"),
        (bytes([9, 18, 0, 1]), r"is of a high dynamic range \(HLG\)"),
        (bytes([12, 99, 0, 1]), r"has a colour space that is not known \(primaries 12, transfer function 99\)"),
        (bytes([77, 13, 0, 1]), "has a colour space that is not known"),
        (bytes([1, 13, 1, 1]), r"has colours of video \(cICP\)"),
        (bytes([1, 13, 0, 0]), r"has colours of video \(cICP\)"),
    ],
)
def test_what_no_viewer_shows_by_its_numbers_is_refused(content, reason):
    with pytest.raises(BadImageError, match=reason):
        shown(with_chunks(encoded((1, 2, 3)), chunk(b"cICP", content)))


def jpeg2000(colour, box: bytes, mode: str = "RGB") -> bytes:
    """A JPEG 2000 file whose box colr has this content, in place of the one that PIL wrote."""
    data = encoded(colour, mode, "JPEG2000", irreversible=False)
    start = data.index(b"jp2h") - 4
    size = int.from_bytes(data[start : start + 4], "big")
    header, at = data[start : start + size], data[start : start + size].index(b"colr") - 4
    old = int.from_bytes(header[at : at + 4], "big")
    header = header[:at] + struct.pack(">I", 8 + len(box)) + b"colr" + box + header[at + old :]
    return data[:start] + struct.pack(">I", len(header)) + header[4:] + data[start + size :]


@pytest.mark.parametrize("method", [2, 3])
def test_a_profile_in_jpeg_2000(method):
    data = jpeg2000((200, 60, 60), bytes([method, 0, 0]) + p3_profile())
    assert np.abs(shown(data) - [217, 42, 52]).max() <= 1


def test_numbered_spaces_of_jpeg_2000():
    assert shown(jpeg2000((200, 60, 60), bytes([1, 0, 0]) + struct.pack(">I", 16))).tolist() == [200, 60, 60]
    assert shown(jpeg2000(90, bytes([1, 0, 0]) + struct.pack(">I", 17), "L")).tolist() == [90, 90, 90]
    assert shown(jpeg2000((200, 60, 60), bytes([2, 0, 0]) + b"no profile")).tolist() == [200, 60, 60]
    with pytest.raises(BadImageError, match=r"has a colour space of JPEG 2000 that is not known \(number 21\)"):
        shown(jpeg2000((200, 60, 60), bytes([1, 0, 0]) + struct.pack(">I", 21)))  # ROMM RGB


def avif(colour, primaries: int, transfer: int) -> bytes:
    """An AVIF file with other code points than those that PIL writes."""
    data = encoded(colour, kind="AVIF", quality=100, subsampling="4:4:4")
    at = data.index(b"colrnclx") + 8
    return data[:at] + struct.pack(">HH", primaries, transfer) + data[at + 4 :]


def test_code_points_of_avif():
    assert np.abs(shown(avif((200, 60, 60), 1, 13)) - [200, 60, 60]).max() <= 3
    assert np.abs(shown(avif((200, 60, 60), 12, 13)) - [217, 42, 52]).max() <= 4
    with pytest.raises(BadImageError, match=r"high dynamic range \(PQ\)"):
        shown(avif((200, 60, 60), 9, 16))


COLOUR_SPACE, INTEROPERABILITY = 0xA001, 0xA005  # EXIF's tags
ADOBE = {COLOUR_SPACE: 2}
ADOBE_BY_INDEX = {COLOUR_SPACE: 0xFFFF, INTEROPERABILITY: {1: "R03"}}


def exif(tags: dict, orientation: int = 1) -> Image.Exif:
    made = Image.Exif()
    made[274] = orientation
    made.get_ifd(0x8769).update(tags)
    return made


# Adobe RGB (200, 60, 60): by 563/256 linear (0.586, 0.0415, 0.0415), by the matrices of both spaces
# (1.398 x 0.586 - 0.398 x 0.0415, 0.0415, 1.043 x 0.0415 - 0.043 x 0.0415) = (0.803, 0.0415, 0.0415).
ADOBE_SHOWN = [232, 57, 57]


@pytest.mark.parametrize("kind", ["JPEG", "MPO", "TIFF", "WEBP"])
@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        (ADOBE, ADOBE_SHOWN),
        (ADOBE_BY_INDEX, ADOBE_SHOWN),
        ({COLOUR_SPACE: 1}, [200, 60, 60]),
        ({COLOUR_SPACE: 0xFFFF}, [200, 60, 60]),  # "uncalibrated", without more
        ({COLOUR_SPACE: 0xFFFF, INTEROPERABILITY: {1: "R98"}}, [200, 60, 60]),
        ({}, [200, 60, 60]),
    ],
)
def test_adobe_rgb_by_exif(kind, tags, expected):
    options = {"quality": 100, "exif": exif(tags)} | ({"lossless": True} if kind == "WEBP" else {})
    if kind == "TIFF":  # PIL writes the tags of EXIF there only so
        options = {"tiffinfo": TiffImagePlugin.ImageFileDirectory_v2()}
        options["tiffinfo"][0x8769] = tags
    found = shown(encoded((200, 60, 60), kind=kind, **options))
    assert np.abs(found - expected).max() <= 2, found


def test_adobe_rgb_by_exif_of_a_grey_picture():
    # (128 / 255)^2.199 = 0.220, in sRGB 0.506, 129 of 255
    assert np.abs(shown(encoded(128, "L", "JPEG", exif=exif(ADOBE))) - 129).max() <= 1


def test_a_profile_counts_before_exif():
    data = encoded((200, 60, 60), kind="JPEG", quality=100, exif=exif(ADOBE), icc_profile=p3_profile())
    assert np.abs(shown(data) - [217, 42, 52]).max() <= 2


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "AVIF", "TIFF", "PNG"])
def test_a_profile_is_converted_in_every_format_and_the_picture_stands_upright(kind):
    """Display P3, its upper half (200, 60, 60), its lower half black; stored as orientation 3, upside down."""
    picture = np.zeros((16, 16, 3), np.uint8)
    picture[:8] = 200, 60, 60
    file, options = io.BytesIO(), {"TIFF": {}, "PNG": {}, "AVIF": {"quality": 100, "subsampling": "4:4:4"}}
    options = options.get(kind, {"quality": 100})
    upside_down = Image.fromarray(np.ascontiguousarray(picture[::-1, ::-1]))
    upside_down.save(file, kind, exif=exif({}, orientation=3), icc_profile=p3_profile(), **options)
    pixels = decode(file.getvalue(), 3, 16, "center", "white").astype(int)
    assert np.abs(pixels[2, 8] - [217, 42, 52]).max() <= 4
    assert pixels[13, 8].max() <= 4
