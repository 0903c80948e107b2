"""One update's losses and gradient norms, gathered from all processes with one synchronisation."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor

from finetune.core.dealing import Dealing
from finetune.core.sharding import whole


class WindowResult(NamedTuple):
    """Losses and gradient norms of one window, the same on every process."""

    losses: npt.NDArray[np.float64]  # float64 (n_w,), in the order of the window's positions
    grad_norm: float  # of the window's gradient, before clipping
    micro_grad_norm: float | None  # of a micro-batch's, root mean square over the processes' first ones
    stop: bool  # whether any process was told to stop
    micro_batch: float  # harmonic mean of those micro-batches' sizes; of a sharded network their sum

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.losses).all() and np.isfinite(self.grad_norm))


class Window:
    """Accumulates one update's losses on the device; closing it costs one gather of a few numbers and one
    synchronisation."""

    def __init__(self, dealing: Dealing, full: bool = True):
        """Take in a window that was dealt out like this; `full`: it has a whole global batch."""
        self.dealing, self.full = dealing, full
        self.losses: list[torch.Tensor] = []
        self.first_norm: torch.Tensor | None = None
        self.summed = False  # whether that is of all processes' first micro-batches together
        self.closed = False  # from here on the update may have begun

    @property
    def accumulation_steps(self) -> int:
        """What Accelerate has to divide each of this window's gradients by."""
        return self.dealing.gradient_accumulation_steps

    def add(self, losses: torch.Tensor, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Take in one micro-step, after its backward pass.

        Args:
            losses: of the micro-step's slots, shape (b,), padding included.
            parameters: hold the gradient so far. After the first of several micro-steps it is that micro-batch's own;
                a sharded network's is the mean over the processes' already.
        """
        if not self.losses and self.dealing.gradient_accumulation_steps > 1:
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            self.first_norm, self.summed = whole(norm).to(losses.dtype), isinstance(norm, DTensor)
        self.losses.append(losses.detach())

    def close(self, accelerator: Accelerator, grad_norm: torch.Tensor, stop: bool = False) -> WindowResult:
        """Gather the processes' parts, and put each loss at its place in the window."""
        self.closed = True
        slots, last = self.dealing.slots, self.losses[-1]
        norms = [
            whole(grad_norm).to(last.dtype),
            last.new_tensor(torch.nan) if self.first_norm is None else self.first_norm,
        ]
        # A gather takes tensors of one length, and processes may differ by an image.
        missing = max(map(len, slots)) - sum(map(len, self.losses))
        mine = torch.cat([*self.losses, last.new_zeros(missing), torch.stack([*norms, last.new_tensor(float(stop))])])
        parts = accelerator.gather(mine).double().cpu().numpy().reshape(len(slots), -1)
        losses = np.empty(self.dealing.num_images)
        for part, places in zip(parts, slots, strict=True):
            losses[places[places >= 0]] = part[: len(places)][places >= 0]
        micro_grad_norm, firsts = None, np.array([process[0].real for process in self.dealing.micro_batches])
        if len(self.losses) > 1 and self.full:
            # What weights, Accelerate's division and the scaler made of a micro-batch's mean is undone.
            scale = 1.0 if accelerator.scaler is None else accelerator.scaler.get_scale()
            if self.summed:  # the mean over n images, of which these are some
                micro_grad_norm = float(parts[0, -2]) * (self.dealing.num_images / firsts.sum()) / scale
            else:
                rms = float(np.sqrt(((parts[:, -2] * (firsts[0] / firsts)) ** 2).mean()))
                micro_grad_norm = rms * (self.dealing.num_images / (len(slots) * firsts[0])) / scale
        micro_batch = float(firsts.sum() if self.summed else 1 / np.mean(1 / np.maximum(firsts, 1)))
        return WindowResult(losses, float(parts[0, -3]), micro_grad_norm, bool(parts[:, -1].any()), micro_batch)
