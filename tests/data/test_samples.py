"""Samples of many depths and layouts of channels, by values worked out by hand: as a viewer shows them, or refused."""

import io
import struct
import zlib
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from finetune.config.inputs import DataConfig
from finetune.core.kind import ImageFormat
from finetune.data.decode import decode
from finetune.data.loading import load_data
from finetune.data.pixels import BadImageError
from harness.originals import original

GREY, RGB, GREY_ALPHA, RGB_ALPHA = 0, 2, 4, 6  # PNG's colour types
RED, WHITE, BLACK = [255, 0, 0], [255] * 3, [0] * 3


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(colour: int, *sample: int, bits: int = 16, significant: tuple[int, ...] = ()) -> bytes:
    """A PNG of 2 x 2 pixels of one colour, with the chunk sBIT if asked for."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    row = struct.pack(f">{len(sample)}{'H' if bits == 16 else 'B'}", *sample) * 2
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 2, 2, bits, colour, 0, 0, 0))]
    parts += [(b"sBIT", bytes(significant))] if significant else []
    parts += [(b"IDAT", zlib.compress((b"\0" + row) * 2)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def tiff(row: bytes, bits: tuple[int, ...], photometric: int, order: str = "<", **tags: int) -> bytes:
    """An uncompressed TIFF of two equal rows of 2 pixels (TIFF 6.0, section 2); tag338 is ExtraSamples."""
    numbers = {256: 2, 257: 2, 259: 1, 262: photometric, 277: len(bits), 278: 2, 279: 2 * len(row)}
    numbers |= {int(tag.removeprefix("tag")): number for tag, number in tags.items()}
    place = 8 + 2 + 12 * (len(numbers) + 2) + 4
    depths = struct.pack(f"{order}{len(bits)}H", *bits)
    numbers[273] = place + len(depths)
    entries = {tag: struct.pack(f"{order}HHII", tag, 4, 1, number) for tag, number in numbers.items()}
    value = depths.ljust(4, b"\0") if len(depths) <= 4 else struct.pack(f"{order}I", place)
    entries[258] = struct.pack(f"{order}HHI", 258, 3, len(bits)) + value
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HIH", 42, 8, len(entries))
    return head + b"".join(entry for _, entry in sorted(entries.items())) + b"\0" * 4 + depths + row * 2


def words(*samples: int, order: str = "<") -> bytes:
    """A row of two equal pixels, of 16 bits a sample."""
    return struct.pack(f"{order}{len(samples)}H", *samples) * 2


def bytes_(*samples: int) -> bytes:
    return bytes(samples) * 2


def small(data: bytes, channels: int = 3, background: str = "white") -> list[int]:
    """The one colour of a picture of one colour."""
    pixels = decode(data, channels, 2, "center", background)
    assert (pixels == pixels[0, 0]).all()
    return pixels[0, 0].tolist()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        # 4096 / 65535 x 255 = 15.9: just bright enough to be meant as it is. Black is black on any scale.
        (png(GREY, 4096), 16),
        (png(GREY, 0), 0),
        (tiff(words(4096), (16,), 1), 16),
        # 3000 / 65535 x 255 = 11.7: the file says that white is 65535.
        (tiff(words(3000), (16,), 1, tag281=65_535), 12),
        (png(GREY, 3000, significant=(16,)), 12),
        # 12 significant bits: of a PNG they should be scaled to 16. 2048 becomes 2048 x 16 + 8 = 32776, the half.
        (png(GREY, 32_776, significant=(12,)), 128),
        # 160 is 10 x 16: scaled as it should be, and dark. 160 / 65535 x 255 = 0.6.
        (png(GREY, 160, significant=(12,)), 1),
        # 2049 is no multiple of 16, and no sample exceeds 4095: not scaled. 2049 / 4095 x 255 = 127.6.
        (png(GREY, 2049, significant=(12,)), 128),
        (png(GREY, 4095, significant=(12,)), 255),
        # 1000 / 1023 x 255 = 249.3, by 10 bits
        (png(GREY, 1001, significant=(10,)), 250),
        (png(GREY, 25_700, significant=(0,)), 100),  # which says nothing
    ],
)
def test_grey_of_16_bits_is_scaled_by_what_the_file_says_is_white(data, expected):
    assert small(data, 1) == [expected]


SAVE = "save it with white at 65535, or with samples of 8 bits"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (png(GREY, 4095), f"has 16 bits and values up to 4095 of 65535: {SAVE}"),
        (png(GREY, 255), f"has 16 bits and values up to 255 of 65535: {SAVE}"),
        (
            tiff(words(4095), (16,), 1),
            "has 16 bits and values up to 4095 of 65535: set its tag 281 (MaxSampleValue) to the value that is white, "
            f"such as 4095, or {SAVE}",
        ),
        (tiff(words(3000), (16,), 1, tag281=3000), "has 16 bits and values up to 3000 of 65535"),  # a statistic
        (png(RGB, 4095, 100, 0), f"has 16 bits and no value above 4095 of 65535: {SAVE}"),
        (png(RGB_ALPHA, 4095, 100, 0, 65_535), "has 16 bits and no value above 4095"),
        (png(GREY_ALPHA, 4095, 30_000), "has 16 bits and no value above 4095"),
        (png(RGB, 4095, 100, 0, significant=(12, 12, 12)), "has 16 bits and no value above 4095"),
        (tiff(words(4095, 100, 0), (16,) * 3, 2), "has 16 bits and no value above 4095"),
        (tiff(words(4095, 100, 0), (16,) * 3, 2, tag281=4095), "has colours of 16 bits with values up to 4095"),
    ],
)
def test_12_bits_in_16_are_refused_where_nothing_says_so(data, reason):
    """As 12 of 16 bits they would be shown 16 times too dark: a picture in which nothing can be seen."""
    with pytest.raises(BadImageError) as caught:
        small(data)
    assert str(caught.value).startswith(reason)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        # PIL keeps the upper byte of a colour: 25700 is 100 x 257.
        (png(RGB, 25_700, 65_535, 0), [100, 255, 0]),
        (png(RGB, 4096, 0, 0), [16, 0, 0]),
        (png(RGB, 2570, 0, 0, significant=(16, 16, 16)), [10, 0, 0]),
        (png(GREY_ALPHA, 25_700, 65_535), [100] * 3),
        # A drawing in black by its alpha, 64 of 255, on white: 255 x (1 - 64 / 255) = 191.
        (png(RGB_ALPHA, 0, 0, 0, 16_448), [191] * 3),
        (png(GREY_ALPHA, 0, 16_448), [191] * 3),
        (tiff(words(25_700, 65_535, 0), (16,) * 3, 2), [100, 255, 0]),
        (tiff(words(25_700, 65_535, 0, order=">"), (16,) * 3, 2, ">"), [100, 255, 0]),
        (tiff(words(0, 65_535, 65_535, 0), (16,) * 4, 5), RED),  # CMYK
    ],
)
def test_colours_of_16_bits(data, expected):
    assert small(data) == expected


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        # ExtraSamples (338): 0 is no alpha, 1 is alpha that the colours are multiplied by, 2 is alpha beside them.
        # Red 64 multiplied by alpha 64 / 255 is red 255; on white (255, 191, 191). Beside it 64 x 64 / 255 + 191 = 207.
        (tiff(bytes_(64, 0, 0, 64), (8,) * 4, 2, tag338=1), [255, 191, 191]),
        (tiff(bytes_(64, 0, 0, 64), (8,) * 4, 2, tag338=2), [207, 191, 191]),
        (tiff(bytes_(64, 0, 0, 64), (8,) * 4, 2, tag338=0), [64, 0, 0]),
        (tiff(words(16_448, 0, 0, 16_448), (16,) * 4, 2, tag338=1), [255, 191, 191]),
        # Grey 32 of alpha 64: 32 x 255 / 64 = 127.5; on white 32 + 191. Beside it 32 x 64 / 255 + 191 = 199.
        (tiff(bytes_(32, 64), (8, 8), 1, tag338=1), [223] * 3),
        (tiff(bytes_(32, 64), (8, 8), 1, tag338=2), [199] * 3),
        (tiff(bytes_(32, 64), (8, 8), 1, tag338=0), [32] * 3),
        # Photometric interpretation 0: 0 is white. 4 bits: 5 of 15 is 85, inverted 170.
        (tiff(bytes([0x00]), (1,), 0), WHITE),
        (tiff(bytes([0xC0]), (1,), 0), BLACK),
        (tiff(bytes([0xC0]), (1,), 1), WHITE),
        (tiff(bytes([0x55]), (4,), 0), [170] * 3),
        (tiff(bytes_(55), (8,), 0), [200] * 3),
        # CIE Lab: 128 of 255 is lightness 50.2, a grey of 119.5 in sRGB; a and b are signed.
        (tiff(bytes_(128, 0, 0), (8,) * 3, 8), [119] * 3),
    ],
)
def test_layouts_of_channels(data, expected):
    assert np.abs(np.array(small(data)) - expected).max() <= 1


def test_premultiplied_alpha_stays_beside_the_colours_it_belongs_to():
    assert small(tiff(bytes_(64, 0, 0, 64), (8,) * 4, 2, tag338=1), 4) == [255, 0, 0, 64]
    assert small(tiff(bytes_(32, 64), (8, 8), 1, tag338=1), 1) == [223]


@pytest.mark.parametrize(
    "data",
    [
        tiff(words(25_700, 65_535), (16, 16), 1, tag338=2),
        tiff(words(25_700, order=">"), (16,), 0, ">"),
        tiff(bytes_(128, 128, 128), (8,) * 3, 9),  # ICC Lab
    ],
)
def test_a_layout_that_pillow_does_not_read_is_named(data):
    with pytest.raises(BadImageError, match=r"^is a TIFF picture of a kind that Pillow does not decode"):
        small(data)


def test_cmyk_of_a_jpeg_is_inverted_as_adobe_does_and_so_is_ycck():
    """Inks 0, 255, 255, 0 are red. As YCCK: the inks as R, G, B are cyan, Y 179, Cb 171, Cr 1, and K stays.

    PIL writes 255 minus each value, and the marker Adobe with transform 0; 2 is YCCK.
    """
    assert small(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)) == RED
    data = bytearray(encoded(Image.new("CMYK", (8, 8), (255 - 179, 255 - 171, 255 - 1, 0)), "JPEG", quality=100))
    marker = data.index(b"Adobe")
    assert data[marker + 11] == 0
    data[marker + 11] = 2
    assert np.abs(np.array(small(bytes(data))) - RED).max() <= 2


def pages(*pictures: tuple[tuple[int, int], str, int], **tags: int) -> bytes:
    """A TIFF file of pages of a size, a colour and a subfile type (tag 254: 1 is a reduced copy)."""
    file = io.BytesIO()
    more = {int(tag.removeprefix("tag")): number for tag, number in tags.items()}
    with TiffImagePlugin.AppendingTiffWriter(file, True) as writer:
        for size, colour, kind in pictures:
            Image.new("RGB", size, colour).save(writer, "TIFF", tiffinfo={254: kind, **more})
            writer.newFrame()
    return file.getvalue()


def test_a_reduced_copy_before_the_page_itself_is_passed_over():
    assert small(pages(((2, 2), "blue", 1), ((8, 8), "red", 0))) == RED
    assert small(pages(((8, 8), "red", 0), ((2, 2), "blue", 1))) == RED
    assert small(pages(((2, 2), "red", 1), ((8, 8), "blue", 1))) == RED  # without the page itself the first
    assert small(pages(((2, 2), "blue", 1), ((8, 8), "red", 2))) == RED  # 2: a page of several
    assert original(pages(((2, 2), "blue", 1), ((8, 8), "red", 0)))[:2] == (8, 8)


def test_a_preview_of_a_raw_picture_is_refused():
    """A DNG's first page is reduced, and the picture itself in SubIFDs (tag 330), which PIL does not read."""
    with pytest.raises(BadImageError, match=r"^holds a reduced copy beside a picture that Pillow does not read"):
        small(pages(((4, 4), "blue", 1), tag330=8))
    assert small(pages(((4, 4), "red", 0), tag330=8)) == RED  # there the sub-pictures are the reduced ones


def test_a_tga_that_says_that_it_has_no_transparency_has_none(tmp_path):
    data = bytearray(encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 0)), "TGA"))
    assert small(bytes(data)) == WHITE
    data[17] &= 0xF0  # bits of transparency of a pixel
    assert small(bytes(data)) == RED
    (tmp_path / "x.tga").write_bytes(data)
    assert small(str(tmp_path / "x.tga")) == RED


def jpeg2000(value, mode: str | None = None) -> bytes:
    image = Image.new(mode, (8, 8), value) if mode else Image.fromarray(np.full((8, 8), value, np.uint16))
    return encoded(image, "JPEG2000", irreversible=False)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (jpeg2000(25_700), [100] * 3),  # of 16 bits
        (jpeg2000(65_535), WHITE),
        (jpeg2000((200, 60, 60), "RGB"), [200, 60, 60]),
        (jpeg2000((0, 64), "LA"), [191] * 3),
        (jpeg2000((0, 0, 0, 64), "RGBA"), [191] * 3),
    ],
)
def test_samples_of_jpeg_2000(data, expected):
    assert small(data) == expected


def frames(kind: str, count: int) -> bytes:
    red, *others = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")[:count])
    return encoded(red, kind, save_all=True, append_images=others)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF", "WEBP", "AVIF", "MPO"])
def test_of_several_frames_or_pages_the_first_is_used_and_it_is_known(kind):
    assert np.abs(np.array(small(frames(kind, 2))) - RED).max() <= 3
    assert original(frames(kind, 2)).several == (kind != "MPO")  # a photo, and what a phone adds to it
    assert not original(frames(kind, 1)).several


def test_reduced_pages_are_no_further_pictures():
    assert not original(pages(((8, 8), "red", 0), ((4, 4), "red", 1), ((2, 2), "red", 1))).several
    assert original(pages(((8, 8), "red", 0), ((4, 4), "red", 1), ((8, 8), "blue", 0))).several


def test_grey_is_grey_at_any_depth():
    greys = [png(GREY, 30_000), png(GREY_ALPHA, 30_000, 65_535), png(GREY, 99, bits=8), png(GREY_ALPHA, 9, 9, bits=8)]
    colours = [png(RGB, 30_000, 0, 0), png(RGB_ALPHA, 9, 9, 9, 9, bits=8)]
    assert [original(data).colour for data in greys + colours] == [False] * 4 + [True] * 2


@pytest.mark.parametrize("buckets", [None, 1])
def test_the_plan_says_which_pictures_have_several_frames(tmp_path, buckets):
    from finetune.core.shapes import Shape

    for name, count in (("a", 2), ("b", 1), ("c", 3), ("d", 2), ("e", 2)):
        (tmp_path / f"{name}.gif").write_bytes(frames("GIF", count))
    shapes = None if buckets is None else [Shape(8, 8)]
    data = DataConfig(source=str(tmp_path), validation_fraction=0.0)
    notes = load_data(data, ImageFormat(3, 8), 0, shapes=shapes)[0].notes
    assert "only the first of several frames or pages: 4 of 5 pictures (a.gif, c.gif, d.gif, ...)" in notes
    for name in "acde":
        (tmp_path / f"{name}.gif").unlink()
    assert not any("frames" in note for note in load_data(data, ImageFormat(3, 8), 0, shapes=shapes)[0].notes)


def test_darkness_grows_no_step_at_the_limit():
    """Of values above 4095 nothing is scaled: a picture that is twice as bright is shown twice as bright."""
    shown = [small(png(GREY, value), 1)[0] for value in (4096, 8192, 16_384, 32_768, 65_535)]
    assert all(abs(second - 2 * first) <= 1 for first, second in pairwise(shown))
