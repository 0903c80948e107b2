"""How an evaluation is shared by the processes.

Work is cut into chunks of one fixed size and dealt over the processes, so that every image goes through the same shapes
and comes out the same to the last bit, whatever the number of processes and the micro-batch.
"""

from collections.abc import Hashable, Iterator, Sequence

from accelerate import Accelerator

CHUNK = 8


def rounds(
    count: int, accelerator: Accelerator, groups: Sequence[Hashable] | None = None
) -> Iterator[Sequence[int] | None]:
    """This process's chunks of 0 .. count-1, padded with None so that all processes make the same number of rounds.

    Args:
        groups: of each, where a chunk has to be of one group, as of one shape.
    """
    dealt: list[Sequence[int] | None] = [*chunks(count, groups)]
    dealt += [None] * (-len(dealt) % accelerator.num_processes)
    return iter(dealt[accelerator.process_index :: accelerator.num_processes])


def chunks(count: int, groups: Sequence[Hashable] | None = None) -> list[list[int]]:
    """0 .. count-1 in chunks of at most CHUNK, each of one group."""
    members: dict[Hashable, list[int]] = {}
    for index in range(count):
        members.setdefault(groups[index] if groups else None, []).append(index)
    return [group[start : start + CHUNK] for group in members.values() for start in range(0, len(group), CHUNK)]
