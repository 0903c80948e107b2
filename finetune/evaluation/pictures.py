"""Grids of images with their labels, drawn as PNG files."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from finetune.core.files import atomic
from finetune.data.pixels import Pixels

_SMALLEST_TILE = 64  # pixels a side: digits of 16 pixels are shown enlarged
_GAP = 2  # pixels between tiles
_BLOCK_GAP = 8  # more of them between blocks of tiles that share a label
_TEXT_SIZE = 13
_LINE = 17  # pixels from one line of a label to the next
_ROW_LABEL = 160  # pixels: a wider row label is broken into lines
_COLUMN_LINES = 3  # of a column label


def grid(
    images: Pixels,
    columns: int | None = None,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    corner: str = "",
    scale: int | None = None,
) -> Image.Image:
    """Images row by row on white, with labels beside the rows and above the columns.

    Args:
        images: uint8 (n, H, W, C), C in 1, 3, 4.
        columns: images in a row; None: roughly square.
        row_labels: one a row, or one for each block of rows, if the blocks have the same number of rows. A label that
            does not fit is broken into lines, and ends in an ellipsis where there is no room left.
        column_labels: the same for columns.
        corner: what the column labels are, written before them.
        scale: every pixel is drawn as scale x scale; None: as many as make a tile of 64 pixels.

    Raises:
        ValueError: if rows or columns cannot be divided into as many blocks as there are labels.
    """
    count, height, width, channels = images.shape
    columns = columns or int(np.ceil(np.sqrt(count)))
    scale = scale or max(-(-_SMALLEST_TILE // max(height, width)), 1)
    height, width = height * scale, width * scale
    tops, bottom = _starts(-(-count // columns), height, row_labels, "row")
    lefts, right = _starts(columns, width, column_labels, "column")

    corner_label = [corner] if corner else []
    beside = [_broken(label, _ROW_LABEL, max(height // _LINE, 1)) for label in row_labels or ()]
    span = len(lefts) // len(column_labels or [""])  # columns of a block
    label_width = lefts[span - 1] + width - lefts[0]
    above = [_broken(label, label_width, _COLUMN_LINES) for label in column_labels or ()]
    left = max((_width(line) for label in [*beside, corner_label] for line in label), default=-2 * _GAP) + 2 * _GAP
    top = max(map(len, [*above, corner_label])) * _LINE

    images = images[:, :, :, 0] if channels == 1 else images
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    canvas = Image.new(mode, (left + right, top + bottom), "white")
    for index, image in enumerate(images):
        tile = Image.fromarray(image.repeat(scale, 0).repeat(scale, 1))
        canvas.paste(tile, (left + lefts[index % columns], top + tops[index // columns]))

    draw = ImageDraw.Draw(canvas)
    for block, lines in enumerate(above):
        middle = left + lefts[block * span] + label_width / 2
        _write(draw, lines, middle, top - len(lines) * _LINE, "ma")
    rows = len(tops) // len(row_labels or [""])  # rows of a block
    for block, lines in enumerate(beside):
        first, last = tops[block * rows], tops[block * rows + rows - 1] + height
        _write(draw, lines, left - _GAP, top + (first + last - len(lines) * _LINE) / 2, "ra")
    _write(draw, corner_label, left - _GAP, top - _LINE, "ra")
    return canvas


def sample_grid(blocks: Sequence[Pixels], names: Sequence[str | None], scales: Sequence[float]) -> Image.Image:
    """Samples with a row a condition and a block of columns a guidance scale; without conditions roughly a square.

    Args:
        blocks: the samples at each scale, uint8 (rows x columns, H, W, C) in the order of the rows.
        names: the condition of each row; None for unconditional samples.
    """
    labels = [name for name in names if name is not None]
    if not labels:
        return grid(blocks[0])
    columns, shape = len(blocks[0]) // len(names), blocks[0].shape[1:]
    images = np.stack(blocks).reshape(len(blocks), len(names), columns, *shape).swapaxes(0, 1).reshape(-1, *shape)
    headings = [f"{scale:g}" for scale in scales]
    return grid(images, len(blocks) * columns, labels, headings, corner="guidance")


def beside(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of any sizes beside each other, on white."""
    first, *others = pictures
    if not others:
        return first
    width = sum(picture.width for picture in pictures) + _BLOCK_GAP * len(others)
    canvas, left = Image.new(first.mode, (width, max(picture.height for picture in pictures)), "white"), 0
    for picture in pictures:
        canvas.paste(picture, (left, 0))
        left += picture.width + _BLOCK_GAP
    return canvas


def _starts(count: int, size: int, labels: Sequence[str] | None, kind: str) -> tuple[list[int], int]:
    """Where each of `count` rows or columns of tiles begins, and where the last one ends, with the gap around them."""
    blocks = count if labels is None else len(labels)
    if not blocks or count % blocks:
        raise ValueError(f"found {blocks} {kind} labels for {count} {kind}s; expected a number that divides them")
    apart = _BLOCK_GAP if blocks < count else 0
    starts = [_GAP + index * (size + _GAP) + index // (count // blocks) * apart for index in range(count)]
    return starts, starts[-1] + size + _GAP


@cache
def _font() -> ImageFont.FreeTypeFont:
    import matplotlib  # brings a font with Latin, Greek and Cyrillic; Pillow's own has no accents

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), _TEXT_SIZE)


def _width(text: str) -> int:
    return int(np.ceil(_font().getlength(text)))


def _broken(text: str, width: int, most: int) -> list[str]:
    """A label as at most so many lines of a width in pixels: broken between words, or within one that is too long."""
    lines = [""]
    for word in text.split():
        if lines[-1] and _width(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and _width(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    if len(lines) > most:
        last = lines[most - 1]
        while last and _width(f"{last}…") > width:
            last = last[:-1]
        lines = [*lines[: most - 1], f"{last}…"]
    return lines


def _write(draw: ImageDraw.ImageDraw, lines: Sequence[str], x: float, y: float, anchor: str) -> None:
    for number, line in enumerate(lines):
        draw.text((x, y + number * _LINE), line, "black", _font(), anchor)


def save_png(picture: Image.Image, file: Path) -> None:
    """Write a PNG atomically, creating the folders above it."""
    with atomic(file) as partial:
        picture.save(partial, format="PNG")
