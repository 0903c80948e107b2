"""Which image goes where: orders, windows, slots and their weights, by numbers worked out by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.core.batch import BatchLayout, window_range, windows_per_epoch
from finetune.core.dealing import deal_evenly
from finetune.data.order import WindowSampler, deal, epoch_order, held_out

layouts = st.builds(BatchLayout, st.integers(1, 5), st.integers(1, 4), st.integers(1, 3))


def test_ten_images_in_windows_of_four():
    # 10 = 4 + 4 + 2
    assert windows_per_epoch(10, 4) == 3
    assert [list(window_range(w, 10, 4)) for w in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_micro_batches_of_a_full_window_are_dealt_process_by_process():
    # micro 2 x N 2 x P 2 = 8: micro-batch kP + r is of micro-step k, process r: (k0 r0) (k0 r1) (k1 r0) (k1 r1)
    micro_batches = list(deal(np.arange(8) * 10, 3, range(8), deal_evenly(8, BatchLayout(2, 2, 2))))
    assert [[slot.image for slot in micro_batch] for micro_batch in micro_batches] == [
        [0, 10],
        [20, 30],
        [40, 50],
        [60, 70],
    ]
    assert {slot.weight for micro_batch in micro_batches for slot in micro_batch} == {2 * 2 / 8}
    assert {slot.epoch for micro_batch in micro_batches for slot in micro_batch} == {3}


def test_a_tail_of_three_is_padded_with_weight_zero():
    # micro 2 x P 2 = 4 places a micro-step: 3 images take one micro-step and one padding; each weighs N P / 3 = 4 / 3
    micro_batches = list(deal(np.arange(3), 0, range(3), deal_evenly(3, BatchLayout(2, 2, 2))))
    assert [[slot.position for slot in micro_batch] for micro_batch in micro_batches] == [[0, 1], [2, 0]]
    assert [[slot.weight for slot in micro_batch] for micro_batch in micro_batches] == [[4 / 3, 4 / 3], [4 / 3, 0.0]]


@given(num_images=st.integers(1, 60), layout=layouts, seed=st.integers(0, 5), epoch=st.integers(0, 3))
def test_every_epoch_shows_each_image_once_and_each_window_weighs_one(num_images, layout, seed, epoch):
    sampler = WindowSampler(num_images, seed, layout)
    sampler.seek(epoch, 0)
    micro_batches = list(sampler)
    assert len(micro_batches) == len(sampler)
    assert len(micro_batches) % layout.num_processes == 0
    assert {len(micro_batch) for micro_batch in micro_batches} == {layout.micro_batch_size}
    real = [slot for micro_batch in micro_batches for slot in micro_batch if slot.weight > 0]
    assert sorted(slot.image for slot in real) == list(range(num_images))
    assert [slot.position for slot in real] == list(range(num_images))
    # Accelerate divides by N and DDP by P; what is left of a window's weights has to sum to 1.
    for window in range(windows_per_epoch(num_images, layout.global_batch_size)):
        inside = window_range(window, num_images, layout.global_batch_size)
        total = sum(slot.weight for slot in real if slot.position in inside)
        assert total / (layout.gradient_accumulation_steps * layout.num_processes) == pytest.approx(1, rel=1e-12)


@given(num_images=st.integers(1, 60), layout=layouts, data=st.data())
def test_a_seek_is_the_rest_of_the_epoch(num_images, layout, data):
    window = data.draw(st.integers(0, windows_per_epoch(num_images, layout.global_batch_size) - 1))
    whole, rest = WindowSampler(num_images, 7, layout), WindowSampler(num_images, 7, layout)
    whole.seek(2, 0)
    rest.seek(2, window)
    expected = list(whole)
    assert list(rest) == expected[len(expected) - len(rest) :]
    assert len(rest) <= len(expected)


def test_a_window_is_the_same_in_every_layout():
    def window_slots(layout):
        sampler = WindowSampler(11, 0, layout)
        return [(s.image, s.epoch, s.position) for micro_batch in sampler for s in micro_batch if s.weight > 0]

    assert (
        window_slots(BatchLayout(8, 1, 1)) == window_slots(BatchLayout(1, 8, 1)) == window_slots(BatchLayout(2, 2, 2))
    )


def test_orders_differ_by_epoch_and_seed_and_not_by_anything_else():
    assert sorted(epoch_order(0, 0, 20)) == list(range(20))
    np.testing.assert_array_equal(epoch_order(3, 1, 20), epoch_order(3, 1, 20))
    assert not np.array_equal(epoch_order(0, 0, 20), epoch_order(0, 1, 20))
    assert not np.array_equal(epoch_order(0, 0, 20), epoch_order(1, 0, 20))


@given(num_images=st.integers(0, 200), fraction=st.floats(0, 0.99), seed=st.integers(0, 9))
def test_held_out_images(num_images, fraction, seed):
    chosen = held_out(seed, num_images, fraction)
    assert len(set(chosen.tolist())) == len(chosen)
    assert chosen.tolist() == sorted(chosen.tolist())
    if fraction == 0 or num_images < 2:
        assert len(chosen) == 0
    else:
        assert 1 <= len(chosen) <= num_images - 1
        assert abs(len(chosen) - fraction * num_images) <= 1
