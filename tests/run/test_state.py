"""Where a run is, and which run it is."""

import json

from hypothesis import given
from hypothesis import strategies as st

from finetune.run.state import Change, Length, RunState, differences


def test_differences_are_named_by_their_path():
    saved = {"seed": 0, "data": {"crop": "center", "flip": False}, "gone": 1}
    current = {"seed": 0, "data": {"crop": "random", "flip": False}}
    found = differences(saved, current)
    assert found == [Change("data.crop", "center", "random"), Change("gone", 1, None)]
    assert str(found[0]) == "data.crop: 'center' in the checkpoint, 'random' now"
    assert differences(saved, json.loads(json.dumps(saved))) == []


def test_skipped_steps_are_not_updates():
    assert RunState(step=7, skipped=2).updates == 5


def test_places_in_epochs_of_19_images_with_windows_of_8():
    length = Length(num_images=19, global_batch_size=8, total_steps=7)
    assert (length.steps_per_epoch, length.num_epochs) == (3, 3)  # 8 + 8 + 3 images; 7 = 3 + 3 + 1 windows
    assert [length.place(step) for step in (0, 2, 3, 6)] == [(0, 0), (0, 2), (1, 0), (2, 0)]
    assert length.positions(2) == range(16, 19)
    assert [length.images_until(step) for step in (0, 1, 3, 7)] == [0, 8, 19, 19 + 19 + 8]


@given(images=st.integers(1, 50), batch=st.integers(1, 60), step=st.integers(0, 200))
def test_images_until_a_step_is_the_sum_of_its_windows(images, batch, step):
    length = Length(images, batch, 200)
    assert length.images_until(step) == sum(len(length.positions(earlier)) for earlier in range(step))
