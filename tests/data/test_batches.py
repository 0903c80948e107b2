"""Micro-batches: what a slot gets does not depend on who reads it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.core import randomness
from finetune.core.batch import BatchLayout
from finetune.data.order import Slot, WindowSampler, epoch_order
from finetune.data.pixels import Images
from finetune.data.workers import make_loader
from harness.batches import SLOTS, batches, wide_images
from harness.compare import unequal


def test_a_batch_holds_pixels_noise_timesteps_and_weights_of_its_slots():
    batch = batches(wide_images(), seed=7).__getitems__(SLOTS)
    assert batch.keys() == {"images", "noise", "timesteps", "weights"}
    assert batch["images"].shape == batch["noise"].shape == (3, 3, 8, 8)
    assert batch["images"].dtype == torch.uint8
    assert all(tensor.is_contiguous() for tensor in batch.values())
    assert batch["images"][:, 2, 0, 0].tolist() == [5, 2, 5]
    assert batch["images"][0, 0, :, 0].tolist() == list(range(8))
    assert batch["images"][0, 1, 0].tolist() == list(range(3, 11))  # the middle 8 of 14 columns
    assert batch["weights"].tolist() == [1.5, 1.5, 0.0]
    for place, slot in enumerate(SLOTS):
        assert (batch["noise"][place] == randomness.noise(7, 3, slot.position, (3, 8, 8))).all()
    expected = randomness.timesteps(7, 3, [slot.position for slot in SLOTS], 1000, "stratified")
    assert batch["timesteps"].tolist() == expected.tolist()
    assert batch["timesteps"].dtype == torch.int64


def test_timesteps_are_sampled_as_the_config_says():
    drawn = [batches(wide_images(), sampling=s).__getitems__(SLOTS)["timesteps"] for s in ("stratified", "uniform")]
    assert drawn[0].tolist() != drawn[1].tolist()


def test_noise_and_weights_have_the_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        batch = batches(wide_images()).__getitems__(SLOTS)
    finally:
        torch.set_default_dtype(torch.float32)
    assert batch["noise"].dtype == batch["weights"].dtype == torch.float64


@pytest.mark.parametrize("channels", [1, 3])
def test_crops_and_flips_depend_on_epoch_and_position(channels):
    images = wide_images(channels=channels, height=8, width=11)
    read = batches(images, crop="random", flip=True)
    seen = {}
    for epoch in range(2):
        for position in range(200):
            slot = Slot(0, epoch, position, 1.0)
            (u_top, u_left), (u_flip,) = (
                randomness.uniform(0, purpose, epoch, position, count) for purpose, count in (("crop", 2), ("flip", 1))
            )
            top, left = int(u_top * 1), int(u_left * 4)  # 8 - 8 + 1 places one way, 11 - 8 + 1 the other
            expected = images.pixels(0)[top : top + 8, left : left + 8]
            expected = expected[:, ::-1] if u_flip < 0.5 else expected
            (got,) = read.__getitems__([slot])["images"].numpy()
            assert (got == expected.transpose(2, 0, 1)).all()
            seen.setdefault((left, u_flip < 0.5), []).append((epoch, position))
    assert len(seen) == 8
    # 400 draws over 8 equal cells: 50 each, standard deviation 6.6.
    assert all(25 < len(places) < 75 for places in seen.values())
    assert {epoch for epoch, _ in seen[0, True]} == {0, 1}


def test_tall_images_are_cropped_too():
    read = batches(wide_images(height=20, width=8), crop="random")
    tops = {int(read.__getitems__([Slot(0, 0, p, 1.0)])["images"][0, 0, 0, 0]) for p in range(200)}
    assert tops == set(range(13))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 11), min_size=1, max_size=12), st.integers(1, 12), st.booleans())
def test_a_sample_is_the_same_in_every_batch(positions, size, flip):
    order = epoch_order(0, 0, 12)
    slots = [Slot(int(order[position]), 0, position, 1.0) for position in positions]
    read = batches(wide_images(12), crop="random", flip=flip)
    whole = read.__getitems__(slots)
    parts = [read.__getitems__(slots[start : start + size]) for start in range(0, len(slots), size)]
    assert unequal(whole, {name: torch.cat([part[name] for part in parts]) for name in whole}) == []


def test_a_seek_does_not_read_earlier_images(monkeypatch):
    read, pixels = [], Images.pixels
    monkeypatch.setattr(Images, "pixels", lambda self, index: read.append(index) or pixels(self, index))
    sampler = WindowSampler(12, 0, BatchLayout(2, 2, 1))
    sampler.seek(epoch=3, window=2)
    loader = make_loader(batches(wide_images(12)), sampler, num_workers=0, pin_memory=False)
    shown = torch.cat([batch["images"][:, 2, 0, 0] for batch in loader]).tolist()  # where image i has the value i
    assert read == shown == epoch_order(0, 3, 12)[8:].tolist()
