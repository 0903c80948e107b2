"""When an update fails: a loss that is not finite, memory that runs out, a data worker that dies."""

import numpy as np
from torch._dynamo.exc import TorchDynamoException

from finetune.core.distributed import printed_once
from finetune.core.errors import UserError, first_line
from finetune.core.failures import is_out_of_memory
from finetune.data.workers import loader_problem
from finetune.run.run import Run
from finetune.training.memory import less_memory
from finetune.training.soundness import compiler_problem
from finetune.training.window import WindowResult

LISTED = 8  # images that an error names
SKIP_LIMIT = 25  # updates in a row that may be skipped; fp16 needs a dozen or so to find its first loss scale


def check_finite(run: Run, result: WindowResult) -> None:
    """End the run before a loss or gradient that is not finite touches the weights, unless the update may be skipped.

    Under fp16 an overflowing gradient is the loss scaler's business: it lowers its scale and skips the update.

    Raises:
        UserError: on all processes.
    """
    finite_losses = bool(np.isfinite(result.losses).all())
    if result.finite:
        return
    overflow = run.accelerator.scaler is not None and finite_losses
    tolerated = overflow or run.config.training.nonfinite_loss == "skip"
    if tolerated and run.state.skipped_in_a_row < SKIP_LIMIT:
        return
    again = f", {run.state.skipped_in_a_row + 1} updates in a row" if tolerated else ""
    advice = ["lower optimizer.learning_rate", "set training.nonfinite_loss=skip"]
    (epoch, _), positions = run.place, np.array(run.positions)
    bad = positions[~np.isfinite(result.losses)]
    where = f"{len(bad)} of {len(positions)} losses are not finite"
    if 0 < len(bad) < len(positions):
        shown = bad[:LISTED]
        images, timesteps = run.sampler.order.images(epoch, shown), run.examples.timesteps(epoch, shown)
        where += f", {'the first' if len(bad) > LISTED else 'those'} of images {images.tolist()}"
        where += f" at timesteps {timesteps.tolist()}"
        advice.insert(1, "look at these images")
    problem = (
        f"step {run.state.step + 1}: found loss {result.losses.mean()}, gradient norm {result.grad_norm}{again}, "
        f"expected finite ones; {where}. Nothing was updated, and what was saved is as it was: {', or '.join(advice)}"
    )
    raise printed_once(UserError(problem, exit_code=1))


def explain_failure(run: Run, error: RuntimeError | OSError | MemoryError) -> None:
    """Raise a UserError if the user can act on what ended the loop: a dead data worker, a compiler that fails, or
    memory in a micro-batch.

    Resuming is exact, so a window that ran out of memory is not retried here: the error names a layout of the same
    batch that needs less.
    """
    if problem := loader_problem(error):
        raise problem from error
    if isinstance(error, TorchDynamoException):  # of a shape that was not compiled at the start
        raise compiler_problem(error) from error
    if not is_out_of_memory(error) or run.window.closed:
        return
    layout = run.sampler.layout
    raise UserError(
        f"training.micro_batch_size: out of memory with {layout.micro_batch_size} at step {run.state.step + 1}; "
        f"{less_memory(layout)}, and run the same command again to resume from the newest checkpoint "
        f"({first_line(error)})",
        exit_code=1,
    ) from error
