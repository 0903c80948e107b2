"""The arithmetic of the batch: global batch = micro-batch x accumulation steps x processes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.core.batch import BatchLayout, divisors, resolve_layout
from finetune.core.errors import UserError

SIZE = st.integers(1, 48)


@given(micro=SIZE, steps=SIZE, processes=SIZE, left_out=st.none() | st.integers(0, 2))
def test_two_sizes_give_the_third_and_three_agree(micro, steps, processes, left_out):
    sizes = [micro * steps * processes, micro, steps]
    if left_out is not None:
        sizes[left_out] = None
    assert resolve_layout(*sizes, processes) == BatchLayout(micro, steps, processes)


@settings(max_examples=300)
@given(
    total=st.integers(1, 200),
    micro=st.integers(1, 16),
    steps=st.none() | st.integers(1, 16),
    processes=st.integers(1, 8),
)
def test_sizes_are_resolved_or_the_error_names_each_of_them(total, micro, steps, processes):
    possible = [n for n in ([steps] if steps else range(1, total + 1)) if micro * n * processes == total]
    if possible:
        assert resolve_layout(total, micro, steps, processes) == BatchLayout(micro, possible[0], processes)
        return
    with pytest.raises(UserError) as caught:
        resolve_layout(total, micro, steps, processes)
    sizes = {"global_batch_size": total, "micro_batch_size": micro, "gradient_accumulation_steps": steps}
    for key, number in {**sizes, "num_processes": processes}.items():
        assert number is None or f"{key} {number}" in str(caught.value)


@pytest.mark.parametrize(
    ("sizes", "problem"),
    [
        (
            (64, 16, 4, 2),
            "found global_batch_size 64; expected "
            "micro_batch_size 16 x gradient_accumulation_steps 4 x num_processes 2 = 128",
        ),
        (
            (64, 16, None, 3),
            "found global_batch_size 64; expected a multiple of micro_batch_size 16 x num_processes 3 = 48",
        ),
        ((10, "auto", None, 4), "found global_batch_size 10; expected a multiple of num_processes 4"),
    ],
)
def test_an_error_shows_the_arithmetic(sizes, problem):
    with pytest.raises(UserError) as caught:
        resolve_layout(*sizes)
    assert str(caught.value) == f"training: {problem}"


@given(number=st.integers(1, 5000))
def test_divisors_are_all_divisors_largest_first(number):
    assert divisors(number) == [size for size in range(number, 0, -1) if number % size == 0]


@given(share=st.integers(1, 5000), processes=SIZE)
def test_auto_starts_with_the_whole_share_of_a_process(share, processes):
    layout = resolve_layout(share * processes, "auto", None, processes)
    assert layout == BatchLayout(share, 1, processes)
    assert layout.global_batch_size == share * processes


@given(micro=SIZE, steps=SIZE, processes=SIZE)
def test_smaller_layouts_keep_the_global_batch(micro, steps, processes):
    layouts = BatchLayout(micro, steps, processes).smaller()
    assert layouts[0] == BatchLayout(micro, steps, processes)
    assert layouts[-1] == BatchLayout(1, micro * steps, processes)
    sizes = [layout.micro_batch_size for layout in layouts]
    assert sizes == [size for size in divisors(micro * steps) if size <= micro]
    assert {layout.global_batch_size for layout in layouts} == {micro * steps * processes}


def test_a_window_takes_as_few_micro_steps_as_hold_it():
    layout = BatchLayout(2, 3, 4)  # 2 x 4 = 8 images a micro-step, 24 in a full window
    assert [layout.micro_steps(images) for images in (0, 1, 8, 9, 24)] == [0, 1, 1, 2, 3]
