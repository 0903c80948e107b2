"""Which shape a picture gets, and what is cut off: by numbers worked out by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.core.errors import UserError
from finetune.core.shapes import Shape, covering, cropped, enlarged, nearest, run_shapes

sides = st.integers(2, 3000)


def test_the_ladder_goes_outwards_from_the_square():
    assert run_shapes(None, 512, 64) == [Shape(512, 512)]
    assert run_shapes(3, 512, 64) == [Shape(512, 512), Shape(576, 448), Shape(448, 576)]
    ladder = run_shapes(7, 512, 64)
    assert all(0.97 < shape.area / 512**2 < 1.1 for shape in ladder)
    assert all(shape.height % 64 == shape.width % 64 == 0 for shape in ladder)
    with pytest.raises(UserError, match=r"data\.buckets: found 8; expected at most 7"):
        run_shapes(8, 512, 64)


def test_a_list_is_taken_as_it_is_if_the_network_can_halve_it():
    assert run_shapes([(24, 16)], 512, 8) == [Shape(height=16, width=24)]
    with pytest.raises(UserError, match=r"found 30 x 16; expected .* multiples of 8, .*\(nearest: \[32, 16\]\)"):
        run_shapes([(30, 16), (8, 8)], 512, 8)


def test_nearest_is_by_the_ratio_of_aspect_ratios():
    shapes = [Shape(1, 1), Shape(1, 2), Shape(2, 1)]
    # between 1:1 and 2:1 the border is at the square root of 2
    assert nearest(shapes, 141, 100) == Shape(1, 1)
    assert nearest(shapes, 142, 100) == Shape(1, 2)
    assert nearest(shapes, 100, 142) == Shape(2, 1)


def test_what_is_cut_off():
    # 3:2 scaled to cover a square keeps 2/3; to cover 3:2 all; 1:20 to cover 1:2 keeps a tenth
    assert cropped(3, 2, Shape(8, 8)) == pytest.approx(1 / 3)
    assert cropped(3, 2, Shape(8, 12)) == 0
    assert cropped(1, 20, Shape(16, 8)) == pytest.approx(0.9)
    assert enlarged(7, 100, Shape(8, 8))
    assert not enlarged(8, 8, Shape(8, 8))


@given(width=sides, height=sides, shape=st.builds(Shape, st.integers(1, 100), st.integers(1, 100)))
def test_a_picture_covers_its_shape_and_touches_it(width, height, shape):
    across, down = covering(width, height, shape)
    assert across >= shape.width
    assert down >= shape.height
    assert across == shape.width or down == shape.height
