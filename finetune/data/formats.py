"""The formats of pictures that are read, and the names of those that are not, told by a file's first bytes."""

from PIL import Image

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
    b"avi": "an AVIF picture, which this Pillow cannot decode",
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
    b"RIFF": "a RIFF file, such as a WebP picture that this Pillow cannot decode, a video or sound",
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "a gzip archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"Rar!": "a RAR archive",
    b"7z\xbc\xaf": "a 7z archive",
}
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
    return None
