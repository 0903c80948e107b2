"""A file that is no picture here is named by what it is, with what to do."""

import pytest

from finetune.data.decode import decode
from finetune.data.formats import unread_format
from finetune.data.pixels import BadImageError

CONVERT = "convert it to PNG or JPEG"
TABLE = [
    (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", f"is a HEIC picture: {CONVERT}"),
    (b"\0\0\0\x18ftypmif1\0\0\0\0", f"is a HEIF picture: {CONVERT}"),
    (b"\0\0\0\x18ftypmp42", f"is a video: {CONVERT}"),
    (b"\xff\x0a\x01", f"is a JPEG XL picture: {CONVERT}"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", f"is a JPEG XL picture: {CONVERT}"),
    (b"8BPS\0\x01", f"is a Photoshop picture: {CONVERT}"),
    (b'<?xml version="1.0"?><svg', f"is an XML file, such as an SVG drawing: {CONVERT}"),
    (b"\xef\xbb\xbf<svg xmlns", f"is an SVG drawing: {CONVERT}"),
    (b"<!DOCTYPE html><html>", "is an HTML page: download the picture again"),
    (b"PK\x03\x04", "is a zip archive: unpack it"),
    (b"%PDF-1.7", f"is a PDF file: {CONVERT}"),
    *(
        (
            start,
            f"is a {name} picture of a kind that Pillow does not decode (its bits, channels or compression), or "
            f"damaged: {CONVERT} with samples of 8 bits",
        )
        for start, name in ((b"\xff\xd8\xff", "JPEG"), (b"II*\0", "TIFF"), (b"MM\0*", "TIFF"), (b"\x89PNG", "PNG"))
    ),
]


@pytest.mark.parametrize(("head", "reason"), TABLE)
def test_a_file_in_another_format_is_named(tmp_path, head, reason):
    data = head + bytes(100)
    (tmp_path / "x.jpg").write_bytes(data)
    for source in (data, str(tmp_path / "x.jpg")):
        with pytest.raises(BadImageError) as caught:
            decode(source, 3, 8, "center", "white")
        assert str(caught.value) == reason


def test_without_a_decoder_avif_is_named(monkeypatch):
    assert unread_format(b"\0\0\0\x20ftypavif") == (
        f"is an AVIF picture that is damaged or that this Pillow cannot decode: {CONVERT}"
    )


@pytest.mark.parametrize("head", [b"", b"It says .png but it is a letter.", b"\xff\xd8"])
def test_unknown_bytes_are_not_named(head):
    assert unread_format(head) is None
