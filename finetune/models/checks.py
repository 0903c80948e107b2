"""Whether a network can be trained as it is: what it makes of a batch's shapes, and whether that is finite."""

import torch
from diffusers import DDPMScheduler, ModelMixin

from finetune.core.errors import UserError, first_line
from finetune.core.failures import is_out_of_memory
from finetune.core.kind import Arguments


def check_forward(shapes: ModelMixin, clean: torch.Tensor, conditions: Arguments, problem: str) -> None:
    """Not all blocks that can be built fit together; tried on tensors without memory.

    Args:
        shapes: a copy of the network on the meta device, like the tensors.
        problem: what the network cannot do then, the start of the error.

    Raises:
        UserError: if the network fails, or its output is of another shape than its input.
    """
    with torch.device("meta"):
        try:
            output = shapes(clean, torch.zeros(len(clean), dtype=torch.long), **conditions).sample
        except Exception as error:  # whatever a block does with a tensor that it was not made for
            raise UserError(f"{problem}: {first_line(error)}") from error
    if output.shape != clean.shape:
        raise UserError(f"{problem}: it maps {tuple(clean.shape)} to {tuple(output.shape)}")


@torch.no_grad()
def check_finite(
    network: ModelMixin, noise_scheduler: DDPMScheduler, clean: torch.Tensor, conditions: Arguments
) -> None:
    """Some settings divide by zero, and weights may be damaged; tried at the first and the last timestep.

    Args:
        clean: two inputs of few pixels, with their conditions.
    """
    last = noise_scheduler.config.num_train_timesteps - 1
    network.eval()
    try:
        output = network(clean, torch.tensor([0, last]), **conditions).sample
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return  # the memory plan has better advice
    finally:
        network.train()
    if not output.isfinite().all():
        raise UserError(
            f"model: the network's prediction is not finite at timestep 0 or {last}, before any training; expected "
            "finite weights, and settings that do not divide by zero (freq_shift, mid_block_scale_factor, norm_eps)"
        )
