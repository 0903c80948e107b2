"""How an evaluation is divided over processes: every draw once, in chunks that do not depend on the processes."""

from types import SimpleNamespace

import pytest

from finetune.evaluation.rounds import CHUNK, rounds


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 8, 20, 64])
def test_every_draw_is_made_once_in_equally_many_rounds_of_each_process(count, processes):
    shares = [
        list(rounds(count, SimpleNamespace(process_index=index, num_processes=processes))) for index in range(processes)
    ]
    assert len({len(share) for share in shares}) == 1
    chunks = [chunk for share in shares for chunk in share if chunk is not None]
    assert sorted(draw for chunk in chunks for draw in chunk) == list(range(count))
    # the shapes do not depend on the number of processes, so neither do the last bits
    assert sorted(map(len, chunks)) == sorted(min(CHUNK, count - start) for start in range(0, count, CHUNK))
