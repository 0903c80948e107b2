"""How an evaluation is shared by the processes.

Work is cut into chunks of one fixed size and dealt over the processes, so that every image goes through the same shapes
and comes out the same to the last bit, whatever the number of processes and the micro-batch.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator

from finetune.data.pixels import Pixels

CHUNK = 8


def rounds(count: int, accelerator: Accelerator) -> Iterator[range | None]:
    """This process's chunks of 0 .. count-1, padded with None so that all processes make the same number of rounds."""
    chunks: list[range | None] = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    chunks += [None] * (-len(chunks) % accelerator.num_processes)
    return iter(chunks[accelerator.process_index :: accelerator.num_processes])


@contextmanager
def evaluating(network: torch.nn.Module) -> Iterator[None]:
    """The network in evaluation mode for the block."""
    network.eval()
    try:
        yield
    finally:
        network.train()


def as_pixels(images: torch.Tensor) -> Pixels:
    """From (n, C, H, W) in [-1, 1] to uint8 (n, H, W, C)."""
    return ((images / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
