"""Counts the gradient all-reduces of accumulation over N micro-steps, on several processes.

    accelerate launch --multi_gpu --num_processes 2 tests/reduces.py [--unprepared]

The loop is train.py's in small: `accumulate` on what `prepare` gave back. With --unprepared it is on the bare network
instead, a mistake that costs an all-reduce every micro-batch.
"""

import os
import sys

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

UPDATES = 12
KEPT = []


def count(steps: int, unprepared: bool) -> tuple[int, bool]:
    """All-reduces over UPDATES updates, and whether gradients differ between processes only inside a window."""
    GradientState._reset_state()
    AcceleratorState._reset_state()
    accelerator = Accelerator(gradient_accumulation_steps=steps)
    torch.manual_seed(0)
    bare = torch.nn.Linear(4, 1)
    network, optimizer = accelerator.prepare(bare, torch.optim.SGD(bare.parameters(), lr=0.1))
    reduced, as_it_should = [], True

    def counting(state, bucket):
        reduced.append(1)
        return allreduce_hook(state, bucket)

    network.register_comm_hook(None, counting)
    KEPT.append(network)
    torch.manual_seed(accelerator.process_index)
    for _ in range(UPDATES * steps):
        with accelerator.accumulate(bare if unprepared else network):
            accelerator.backward(network(torch.randn(2, 4)).square().mean())
            gradients = accelerator.gather(bare.weight.grad)
            together = torch.equal(gradients[0], gradients[1])
            as_it_should &= together == accelerator.sync_gradients or unprepared
            optimizer.step()
            optimizer.zero_grad()
    return len(reduced), as_it_should


if __name__ == "__main__":
    outcomes = [count(steps, "--unprepared" in sys.argv) for steps in (1, 4)]
    if torch.distributed.get_rank() == 0:
        print("reduces:", *(reduced for reduced, _ in outcomes))
        print("apart inside a window, together at its end:", all(right for _, right in outcomes))
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # a reducer that goes after its Python hook aborts the process now and then
