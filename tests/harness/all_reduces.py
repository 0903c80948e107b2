"""Counts the all-reduces of gradients that are accumulated over N micro-steps, on two processes.

    accelerate launch --multi_gpu --num_processes 2 tests/harness/all_reduces.py [--unprepared]

The loop is train.py's in small: `accumulate` on what `prepare` returned. With --unprepared it is on the bare network
instead, a mistake that costs an all-reduce in every micro-step.
"""

import os
import sys

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

UPDATES = 12
KEPT = []  # networks whose reducers have to outlive the count


def count(steps: int, unprepared: bool) -> tuple[int, bool]:
    """All-reduces over UPDATES updates, and whether the processes' gradients were equal at each window's end alone.

    With `unprepared` they are equal in every micro-step.
    """
    GradientState._reset_state()
    AcceleratorState._reset_state()
    accelerator = Accelerator(gradient_accumulation_steps=steps)
    torch.manual_seed(0)
    bare = torch.nn.Linear(4, 1)
    network, optimizer = accelerator.prepare(bare, torch.optim.SGD(bare.parameters(), lr=0.1))
    reduced, at_the_end_alone = [], True

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
            at_the_end_alone &= torch.equal(gradients[0], gradients[1]) == accelerator.sync_gradients
            optimizer.step()
            optimizer.zero_grad()
    return len(reduced), at_the_end_alone


if __name__ == "__main__":
    outcomes = [count(steps, "--unprepared" in sys.argv) for steps in (1, 4)]
    if torch.distributed.get_rank() == 0:
        print("all-reduces:", *(reduced for reduced, _ in outcomes))
        print("gradients equal at a window's end alone:", *(alone for _, alone in outcomes))
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # a reducer that is destroyed after its Python hook sometimes aborts the process
