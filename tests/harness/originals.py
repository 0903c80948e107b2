"""What decoding tells of a picture beside its pixels."""

from finetune.core.shapes import Shape
from finetune.data.decode import decode_to_shape
from finetune.data.pixels import Original


def original(data: bytes) -> Original:
    """Size, once it is upright, and colour of an encoded picture."""
    return decode_to_shape(data, 3, [Shape(2, 2)], "center", "white").original
