"""Shapes of pictures: which there are in a run, which one a picture gets, and what is cut off to give it."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from diffusers.training_utils import generate_aspect_ratio_buckets

from finetune.core.errors import UserError


class Shape(NamedTuple):
    """Pixels of a picture, in the order of a tensor's dimensions."""

    height: int
    width: int

    @property
    def area(self) -> int:
        return self.height * self.width

    def __str__(self) -> str:
        return f"{self.width} x {self.height}"


def run_shapes(buckets: int | Sequence[tuple[int, int]] | None, resolution: int, divisor: int) -> list[Shape]:
    """The shapes of a run's pictures, which differ.

    Args:
        buckets: None for the square; n for the first n of diffusers' buckets, which go outwards from the square and
            have areas of about resolution^2; or each (width, height).
        resolution: pixels a side of the square.
        divisor: what the network needs both sides to be multiples of.

    Raises:
        UserError: if the network cannot take one of them, or the ladder has fewer.
    """
    if buckets is None:
        return [Shape(resolution, resolution)]
    if isinstance(buckets, int):
        ladder = [Shape(*sides) for sides in generate_aspect_ratio_buckets(resolution, divisor)]
        if buckets > len(ladder):
            raise UserError(
                f"data.buckets: found {buckets}; expected at most {len(ladder)}, the number of shapes of about "
                f"{resolution} x {resolution} pixels with sides that {divisor} divides: {', '.join(map(str, ladder))}"
            )
        return ladder[:buckets]
    shapes = [Shape(height, width) for width, height in buckets]
    if unfit := [shape for shape in shapes if shape.height % divisor or shape.width % divisor]:
        nearest = [f"[{_multiple(shape.width, divisor)}, {_multiple(shape.height, divisor)}]" for shape in unfit]
        raise UserError(
            f"data.buckets: found {', '.join(map(str, unfit))}; expected sides of multiples of {divisor}, since the "
            f"network halves them (nearest: {', '.join(nearest)})"
        )
    return shapes


def _multiple(length: int, divisor: int) -> int:
    return max(round(length / divisor), 1) * divisor


def nearest(shapes: Sequence[Shape], width: int, height: int) -> Shape:
    """The shape whose aspect ratio is nearest to a picture's, by the difference of their logarithms; of two, the first.

    So 2:1 is as far from 1:1 as 1:2 is.
    """
    aspect = math.log(width / height)
    return min(shapes, key=lambda shape: abs(math.log(shape.width / shape.height) - aspect))


def covering(width: float, height: float, shape: Shape) -> tuple[int, int]:
    """(width, height) of a picture that is scaled to cover a shape: one side is the shape's, the other at least."""
    if width * shape.height >= height * shape.width:
        return max(shape.width, round(width * shape.height / height)), shape.height
    return shape.width, max(shape.height, round(height * shape.width / width))


def cropped(width: float, height: float, shape: Shape) -> float:
    """The share of a picture's area that is cut off when it is scaled to cover a shape, from 0 to below 1."""
    picture, target = width / height, shape.width / shape.height
    return 1 - min(picture / target, target / picture)


def enlarged(width: float, height: float, shape: Shape) -> bool:
    """Whether a picture has fewer pixels along a side than the shape that it is scaled to cover."""
    return width < shape.width or height < shape.height
