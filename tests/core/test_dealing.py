"""How a window is dealt out, by numbers worked out by hand and by the properties that every dealing has to have."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.core.batch import BatchLayout
from finetune.core.dealing import deal_by_shape, deal_evenly

layouts = st.builds(BatchLayout, st.integers(1, 6), st.integers(1, 5), st.integers(1, 8))


@st.composite
def windows(draw, full):
    """A layout and the shapes of a window's images; of a full window, or of a shorter one."""
    layout = draw(layouts)
    batch = layout.global_batch_size
    count = batch if full else draw(st.integers(1, batch))
    kinds = draw(st.integers(1, 9))
    return draw(st.lists(st.integers(0, kinds - 1), min_size=count, max_size=count)), layout


def places(dealing):
    """Of each process, the places of each of its micro-batches, without padding."""
    return [[one.places[: one.real].tolist() for one in process] for process in dealing.micro_batches]


def test_eight_images_of_two_shapes_on_two_processes():
    # sorted by shape: 0 2 4 6 7 | 1 3 5; shares of four: (0 2 4 6) (7 1 3 5). Micro-batches of at most 4: one of the
    # first share, two of the second (7) (1 3 5), so K = 2 and the first is halved. The longest come first.
    dealing = deal_by_shape([0, 1, 0, 1, 0, 1, 0, 0], BatchLayout(4, 1, 2))
    assert places(dealing) == [[[0, 2], [4, 6]], [[1, 3, 5], [7]]]
    assert dealing.gradient_accumulation_steps == dealing.micro_steps == 2
    assert dealing.weight == 2 * 2 / 8
    assert [one.places.tolist() for one in dealing.in_order()] == [[0, 2], [1, 3, 5], [4, 6], [7]]


def test_a_group_is_cut_evenly():
    # five of one shape in micro-batches of at most 4 are 3 + 2, not 4 + 1
    dealing = deal_by_shape([7] * 5 + [9] * 3, BatchLayout(4, 2, 1))
    assert places(dealing) == [[[0, 1, 2], [5, 6, 7], [3, 4]]]


def test_a_share_of_fewer_images_than_micro_steps_is_padded_with_single_images():
    # 3 images of 2 shapes on 2 processes: shares (0 2) of shapes 0 1, and (1) of shape 1; K = 2 and one is missing
    dealing = deal_by_shape([0, 1, 1], BatchLayout(2, 2, 2))
    assert places(dealing) == [[[0], [1]], [[2], []]]
    assert dealing.micro_batches[1][1].places.tolist() == [0]
    assert [slots.tolist() for slots in dealing.slots] == [[0, 1], [2, -1]]
    assert dealing.weight == 2 * 2 / 3
    # one image on three processes: the others go through it too, for nothing
    alone = deal_by_shape([5], BatchLayout(1, 2, 3))
    assert [slots.tolist() for slots in alone.slots] == [[0], [-1], [-1]]
    assert alone.weight == 3.0


def assert_dealt_out(shapes, layout, dealing):
    """What holds in every window: each image once, of one shape with its neighbours, the same number of steps."""
    micro_batches = [one for process in dealing.micro_batches for one in process]
    assert sorted(place for one in micro_batches for place in one.places[: one.real]) == list(range(len(shapes)))
    assert all(1 <= len(one.places) <= layout.micro_batch_size for one in micro_batches)
    assert all(len({shapes[place] for place in one.places}) == 1 for one in micro_batches)
    assert {len(process) for process in dealing.micro_batches} == {dealing.micro_steps}
    assert len(dealing.micro_batches) == layout.num_processes
    # Accelerate divides by its accumulation steps and DDP by P: what is left of the weights sums to 1
    total = sum(one.real * dealing.weight for one in micro_batches)
    assert total / (dealing.gradient_accumulation_steps * layout.num_processes) == pytest.approx(1, rel=1e-12)


@given(windows(full=True))
def test_a_full_window_of_many_shapes(window):
    shapes, layout = window
    dealing = deal_by_shape(shapes, layout)
    assert_dealt_out(shapes, layout, dealing)
    assert all(one.real == len(one.places) for process in dealing.micro_batches for one in process)  # no padding
    steps, share = layout.gradient_accumulation_steps, layout.gradient_accumulation_steps * layout.micro_batch_size
    assert steps <= dealing.micro_steps <= min(steps + len(set(shapes)) - 1, share)
    assert {sum(map(len, process)) for process in places(dealing)} == {share}
    assert dealing.gradient_accumulation_steps == dealing.micro_steps


@given(windows(full=False))
def test_a_shorter_window_of_many_shapes(window):
    shapes, layout = window
    dealing = deal_by_shape(shapes, layout)
    assert_dealt_out(shapes, layout, dealing)
    sizes = [sum(map(len, process)) for process in places(dealing)]
    assert max(sizes) - min(sizes) <= 1
    fewest = -(-max(sizes) // layout.micro_batch_size)
    assert fewest <= dealing.micro_steps <= min(fewest + len(set(shapes)) - 1, max(sizes))
    for process, size in zip(dealing.micro_batches, sizes, strict=True):  # padded only where images are missing
        assert sum(one.real == 0 for one in process) == max(dealing.micro_steps - size, 0)
        assert all(one.real in (0, len(one.places)) for one in process)


@given(windows(full=False))
def test_a_window_of_one_shape(window):
    shapes, layout = window
    dealing = deal_evenly(len(shapes), layout)
    assert_dealt_out([0] * len(shapes), layout, dealing)
    assert {len(one.places) for one in dealing.in_order()} == {layout.micro_batch_size}
    assert dealing.gradient_accumulation_steps == layout.gradient_accumulation_steps
    runs = np.concatenate([one.places[: one.real] for one in dealing.in_order()])
    assert runs.tolist() == list(range(len(shapes)))


@given(windows(full=False))
def test_the_shares_are_cut_out_of_the_places_in_the_order_of_shapes_and_the_longest_come_first(window):
    shapes, layout = window
    dealt = places(deal_by_shape(shapes, layout))
    order = lambda place: (shapes[place], place)  # noqa: E731
    shares = [sorted((place for piece in process for place in piece), key=order) for process in dealt]
    assert [place for share in shares for place in share] == sorted(range(len(shapes)), key=order)
    for process in dealt:
        assert all(piece == sorted(piece) for piece in process)
        assert [len(piece) for piece in process] == sorted(map(len, process), reverse=True)


@given(windows(full=True), st.lists(st.integers(90, 110), min_size=9, max_size=9))
def test_processes_wait_no_longer_than_for_a_share_of_the_largest_area(window, areas):
    """Shares have as many images each, so 1 - mean / largest area, which single images on each process do wait."""
    shapes, layout = window
    dealing, area = deal_by_shape(shapes, layout), np.array([areas[shape] for shape in shapes])
    shares = [sum(area[place] for piece in process for place in piece) for process in places(dealing)]
    waiting, bound = 1 - np.mean(shares) / max(shares), 1 - area.mean() / area.max()
    assert waiting <= bound + 1e-12
    if layout.micro_batch_size * layout.gradient_accumulation_steps == 1:
        assert waiting == pytest.approx(bound, abs=1e-12)
