"""What decoding did to the pictures, in words for the plan: size, crop and colour."""

from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt

from finetune.core.errors import first_few
from finetune.core.kind import ImageFormat
from finetune.core.shapes import Shape, cropped, enlarged
from finetune.data.order import Indices

NAMED = 10  # pictures that lose more than half of themselves
Lengths = npt.NDArray[np.int32]


def changes_to_squares(table: datasets.Dataset, rows: Indices, image_format: ImageFormat) -> list[str]:
    """What decoding did to pictures that became squares, a line each: size, crop and colour."""
    resolution = image_format.resolution
    widths, heights = _originals(table, rows)
    shorter, longer = np.minimum(widths, heights), np.maximum(widths, heights)
    notes = [f"sizes: {_sizes(widths, heights)} pixels, the shorter side resized to {resolution}"]
    if enlarged := int((shorter < resolution).sum()):
        notes[0] += f" ({enlarged} of {len(rows)} enlarged)"
    lost = 1 - shorter / longer  # of a picture's area, outside of a square
    if lost.max() > 0:
        notes.append(f"cropped to squares: {lost.mean():.0%} of a picture on average, {lost.max():.0%} at most")
    return notes + _made_grey(table, rows, image_format.channels)


def changes_to_shapes(
    table: datasets.Dataset, rows: Indices, image_format: ImageFormat, name: Callable[[int], str]
) -> list[str]:
    """What decoding did to pictures that were given shapes, a line each: size, shapes, crop and colour.

    Args:
        rows: of the pictures that are used.
        name: of the picture in a row of the table.
    """
    widths, heights = _originals(table, rows)
    sides = (_column(table, rows, f"shape_{side}").tolist() for side in Shape._fields)
    shapes = [Shape(*pair) for pair in zip(*sides, strict=True)]
    pictures = list(zip(widths.tolist(), heights.tolist(), shapes, strict=True))
    notes = [f"sizes: {_sizes(widths, heights)} pixels, scaled to cover the nearest shape"]
    if count := sum(enlarged(*picture) for picture in pictures):
        notes[0] += f" ({count} of {len(rows)} enlarged)"
    lost = np.array([cropped(*picture) for picture in pictures])
    notes.append(f"cropped to shapes: {lost.mean():.1%} of a picture on average, {lost.max():.1%} at most")
    if len(extreme := np.flatnonzero(lost > 0.5)):
        named = [f"{name(int(rows[index]))} ({widths[index]} x {heights[index]})" for index in extreme[:NAMED].tolist()]
        more = f" and {len(extreme) - NAMED} more" if len(extreme) > NAMED else ""
        notes.append(f"cropped by more than half: {len(extreme)} of {len(rows)}: {', '.join(named)}{more}")
    return notes + _made_grey(table, rows, image_format.channels)


def first_frames(table: datasets.Dataset, rows: Indices, name: Callable[[int], str]) -> list[str]:
    """A line on pictures of which the first of several frames or pages is used.

    Args:
        rows, name: as for `changes_to_shapes`.
    """
    several = rows[_column(table, rows, "original_several")]
    if not len(several):
        return []
    named = first_few(map(name, several.tolist()))
    return [f"only the first of several frames or pages: {len(several)} of {len(rows)} pictures ({named})"]


def _column(table: datasets.Dataset, rows: Indices, name: str) -> npt.NDArray[Any]:
    """Some rows of a column of numbers. (Those of `table.select(rows).data` would be all rows.)"""
    return table.data.column(name).to_numpy()[rows]


def _originals(table: datasets.Dataset, rows: Indices) -> tuple[Lengths, Lengths]:
    """Widths and heights of the pictures before they were resized."""
    return _column(table, rows, "original_width"), _column(table, rows, "original_height")


def _sizes(widths: Lengths, heights: Lengths) -> str:
    """The size of the pictures, or of the smallest and the largest."""
    smallest, largest = np.minimum(widths, heights).argmin(), (widths * heights).argmax()
    sizes = f"{widths[largest]} x {heights[largest]}"
    if len({*zip(widths.tolist(), heights.tolist(), strict=True)}) > 1:
        sizes = f"{widths[smallest]} x {heights[smallest]} to {sizes}"
    return sizes


def _made_grey(table: datasets.Dataset, rows: Indices, channels: int) -> list[str]:
    grey = int(_column(table, rows, "original_colour").sum())
    if channels != 1 or not grey:
        return []
    return [f"colour made grey, as the model has one channel: {grey} of {len(rows)}"]
