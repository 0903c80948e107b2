"""The order in blocks: each image once an epoch, a function of its key, and mixed as far as its sizes say."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.core.batch import BatchLayout, windows_per_epoch
from finetune.data import blocks
from finetune.data.blocks import BlockOrder
from finetune.data.order import FullOrder, WindowSampler, epoch_order, make_order

orders = st.builds(
    BlockOrder,
    st.integers(0, 2**63 - 1),
    st.integers(1, 300),
    span=st.integers(1, 20),
    block=st.integers(1, 5),
    stripes=st.integers(1, 40),
)


@given(order=orders, epoch=st.integers(0, 10**6))
def test_every_image_comes_once_an_epoch(order, epoch):
    assert sorted(order.images(epoch, range(order.num_images)).tolist()) == list(range(order.num_images))


@given(order=orders, epoch=st.integers(0, 5), data=st.data())
def test_an_image_is_found_at_its_position_whatever_else_is_asked_for(order, epoch, data):
    whole = order.images(epoch, range(order.num_images))
    places = data.draw(st.lists(st.integers(0, order.num_images - 1), max_size=20))
    fresh = BlockOrder(order.seed, order.num_images, order.span, order.length // order.span, order.stripes)
    assert fresh.images(epoch, places).tolist() == whole[places].tolist()


@given(order=orders, epoch=st.integers(0, 5))
def test_a_position_belongs_to_its_stripe_and_a_stripe_takes_block_after_block(order, epoch):
    spans, _, begin = order._line(epoch)
    starts = [range(span * order.span, min((span + 1) * order.span, order.num_images)) for span in spans.tolist()]
    line = np.roll(np.concatenate([np.array(span) for span in starts]), -begin)
    found, first = order.images(epoch, range(order.num_images)), 0
    for stripe in range(order.stripes):
        own = found[stripe :: order.stripes]
        for start in range(0, len(own), order.length):
            block = own[start : start + order.length]
            assert sorted(block.tolist()) == sorted(line[first + start :][: len(block)].tolist())
        first += len(own)
    assert first == order.num_images


def test_one_span_after_the_other_by_hand():
    # Spans of 1, blocks of 1 span, 1 stripe: nothing is mixed but the spans themselves, by the epoch's permutation.
    order = BlockOrder(3, 20, span=1, block=1, stripes=1)
    begin = order.images(2, range(20)).tolist().index(epoch_order(3, 2, 20)[0])
    assert np.roll(order.images(2, range(20)), -begin).tolist() == epoch_order(3, 2, 20).tolist()
    # Two stripes take the halves of that line in turn.
    halves = BlockOrder(3, 21, span=1, block=1, stripes=1).images(2, range(21))
    expected = [*np.stack([halves[:10], halves[11:]], axis=1).reshape(-1).tolist(), int(halves[10])]
    assert BlockOrder(3, 21, span=1, block=1, stripes=2).images(2, range(21)).tolist() == expected


def test_epochs_and_seeds_have_orders_of_their_own():
    found = {tuple(BlockOrder(seed, 1000).images(epoch, range(1000)).tolist()) for seed in (0, 1) for epoch in (0, 1)}
    assert len(found) == 4


def test_what_is_random_is_uniform():
    # 23 images, in spans of 3, of 2 a block and 2 stripes of 12 and 11: two blocks each, of 6 and 6, and 6 and 5.
    counts, epochs = np.zeros((23, 23)), 4600
    order = BlockOrder(0, 23, span=3, block=2, stripes=2)
    for epoch in range(epochs):
        counts[np.arange(23), order.images(epoch, range(23))] += 1
    # 200 expected in each of 529 cells, standard deviation 13.8; five of them
    assert np.abs(counts - epochs / 23).max() < 70


def test_sizes_are_those_that_runs_were_made_with():
    # To be changed with the name of the order only: a run would resume in another one without a word.
    assert (blocks.SPAN, blocks.BLOCK, blocks.STRIPES) == (64, 16, 64)
    order = BlockOrder(0, 10**6)
    assert order.mixed == 65_536
    assert order.images(1, [0, 1, 65_535, 65_536, 999_999]).tolist() == PINNED


PINNED = [589841, 440532, 4188, 492854, 164877]


def test_images_that_are_all_mixed_at_a_time_are_shuffled_fully():
    few, more = (make_order("blocks", 3, count) for count in (65_536, 65_537))
    assert isinstance(few, FullOrder)
    assert isinstance(more, BlockOrder)
    assert few.images(1, range(65_536)).tolist() == epoch_order(3, 1, 65_536).tolist()
    assert isinstance(make_order("full", 3, 65_537), FullOrder)


def test_images_of_a_span_are_far_apart():
    order = BlockOrder(0, 200_000)
    found = order.images(0, range(200_000))
    positions = np.empty(200_000, dtype=np.int64)
    positions[found] = np.arange(200_000)
    neighbours = positions.reshape(-1, 2)  # images 2i and 2i + 1 are of one span, since 64 is even
    distances = np.abs(np.diff(neighbours, axis=1))
    apart = distances % 64 == 0
    # All are of one stripe, but for at most 64 pairs at the ends of stripes.
    assert np.count_nonzero(~apart) <= 64
    # Two random places of a block of 1,024 are (1024 + 1) / 3 places apart on average, each of 64 positions: 21,867.
    # Pairs in spans across a block's end are within two blocks. The standard error over 100,000 pairs is below 100.
    assert 21_000 < distances[apart].mean() < 23_500


def test_what_is_held_does_not_grow_with_the_images():
    order = BlockOrder(0, 100_000_000)
    order.images(0, range(50_000_000, 50_000_064))
    spans, *_ = order._line(0)
    assert len(spans) == 1_562_500  # 100 million / 64
    assert len(order._blocks(0, 50_000_000 // 65_536)) == 65_536


@pytest.mark.parametrize("order", ["full", "blocks"])
@given(data=st.data(), epoch=st.integers(0, 3))
def test_windows_of_either_order_show_each_image_once_and_a_seek_is_the_rest(order, data, epoch):
    count = data.draw(st.integers(1, 60))
    layout = data.draw(st.builds(BatchLayout, st.integers(1, 5), st.integers(1, 4), st.integers(1, 3)))
    shapes = data.draw(st.none() | st.lists(st.integers(0, 3), min_size=count, max_size=count).map(np.array))
    sampler, resumed = (WindowSampler(count, 7, layout, shapes) for _ in range(2))
    if order == "blocks":
        sampler.order, resumed.order = (BlockOrder(7, count, span=3, block=2, stripes=2) for _ in range(2))
    sampler.seek(epoch, 0)
    micro_batches = list(sampler)
    assert len(sampler) == len(micro_batches)
    slots = [slot for micro_batch in micro_batches for slot in micro_batch if slot.weight > 0]
    assert sorted(slot.position for slot in slots) == list(range(count))
    expected = sampler.order.images(epoch, range(count))
    assert [slot.image for slot in slots] == expected[[slot.position for slot in slots]].tolist()
    resumed.seek(epoch, data.draw(st.integers(0, windows_per_epoch(count, layout.global_batch_size) - 1)))
    rest = list(resumed)
    assert rest == micro_batches[len(micro_batches) - len(rest) :]
    assert len(rest) == len(resumed)
