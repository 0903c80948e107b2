"""The formats of pictures that are read, and why a file is none of them, told by its first bytes."""

import io
import os

from PIL import Image, UnidentifiedImageError

# Plugins that only decode: EPS, for one, would start Ghostscript on an untrusted program.
FORMATS: tuple[str, ...] = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PCX")
FORMATS += ("PNG", "PPM", "QOI", "SGI", "TGA", "TIFF", "WEBP")
PICTURES = {name for name, kind in Image.registered_extensions().items() if kind in (*FORMATS, "MPO")}

HEAD = 64  # bytes that `unread_format` looks at
_CONVERT = "convert it to PNG or JPEG"
_BRANDS = {  # of ISO base media files (ISO/IEC 14496-12), which name their format after the word ftyp
    b"hei": "a HEIC picture",
    b"hev": "a HEIC picture",
    b"mif1": "a HEIF picture",
    b"msf1": "a HEIF picture",
    b"avi": "an AVIF picture that is damaged or that this Pillow cannot decode",
    b"crx": "a camera's raw picture (CR3)",
    b"jpx": "a JPEG 2000 picture",
    b"": "a video",
}
_FIRST_BYTES = {
    b"\xff\x0a": "a JPEG XL picture",
    b"\0\0\0\x0cJXL ": "a JPEG XL picture",
    b"II\xbc\x01": "a JPEG XR picture",
    b"8BPS": "a Photoshop picture",
    b"gimp xcf": "a GIMP picture",
    b"\x76\x2f\x31\x01": "an OpenEXR picture",
    b"#?RADIANCE": "a Radiance HDR picture",
    b"DDS ": "a DDS texture",
    b"icns": "an ICNS icon",
    b"FUJIFILMCCD-RAW": "a camera's raw picture (RAF)",
    b"%!PS": "a PostScript file",
    b"%PDF": "a PDF file",
    b"RIFF": "a RIFF file, such as a WebP picture that is damaged or that this Pillow cannot decode, a video or sound",
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "a gzip archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"Rar!": "a RAR archive",
    b"7z\xbc\xaf": "a 7z archive",
}
_READ = {b"II*\0": "TIFF", b"MM\0*": "TIFF", b"II+\0": "TIFF", b"MM\0+": "TIFF", b"\xff\xd8\xff": "JPEG"}
_READ |= {b"\x89PNG": "PNG", b"GIF8": "GIF", b"BM": "BMP", b"\0\0\0\x0cjP  ": "JPEG 2000"}
_TEXTS = {b"<svg": "an SVG drawing", b"<!doctype html": "an HTML page", b"<html": "an HTML page"}


def unread_format(head: bytes) -> str | None:
    """What a file is that no decoder here reads, by its first bytes, and what to do; None if they are of no format."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(b"<?xml"):
        return f"is an XML file, such as an SVG drawing: {_CONVERT}"
    for start, name in _TEXTS.items():
        if text.startswith(start):
            advice = "download the picture again" if "HTML" in name else _CONVERT
            return f"is {name}: {advice}"
    if head[4:8] == b"ftyp":
        return f"is {next(name for brand, name in _BRANDS.items() if head[8:12].startswith(brand))}: {_CONVERT}"
    for start, name in _FIRST_BYTES.items():
        if head.startswith(start):
            return f"is {name}: {'unpack it' if 'archive' in name else _CONVERT}"
    for start, name in _READ.items():
        if head.startswith(start):
            return (
                f"is a {name} picture of a kind that Pillow does not decode (its bits, channels or compression), or "
                f"damaged: {_CONVERT} with samples of 8 bits"
            )
    return None


def why_unreadable(error: Exception, source: bytes | str) -> str:
    """Why decoding a picture, its bytes or the file at a path, failed with an error; to follow its name."""
    detail = " ".join(str(error).split())[:200] or type(error).__name__
    if isinstance(error, UnidentifiedImageError):
        empty = len(source) == 0 if isinstance(source, bytes) else os.path.getsize(source) == 0
        known = unread_format(head_of(source)) or "is not a picture in any known format, or damaged at its start"
        return "is empty (0 bytes)" if empty else known
    if isinstance(error, Image.DecompressionBombError):
        return f"is too large: {detail}"
    if isinstance(error, FileNotFoundError):
        return "does not exist"
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot be read: {error.strerror}"
    if isinstance(error, MemoryError):
        return "needs more memory than there is"
    return f"is damaged or cut off: {detail}"


def head_of(source: bytes | str) -> bytes:
    """The first bytes of a picture, of the file at a path."""
    if isinstance(source, bytes):
        return source[:HEAD]
    with open(source, "rb") as file:
        return file.read(HEAD)


def ends_in_zeros(source: bytes | str) -> bool:
    """Whether a JPEG file ends in zeros and not in a marker of its end before them: room that was never written.

    Cameras pad files with zeros too, but after the marker.
    """
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - HEAD, 0))
        if any(file.read()):
            return False
        file.seek(0)
        return not file.read().rstrip(b"\0").endswith(b"\xff\xd9")
