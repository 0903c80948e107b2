"""One update's losses and gradient norms, gathered from all processes with one synchronisation."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator

from finetune.core.batch import BatchLayout


class WindowResult(NamedTuple):
    """Losses and gradient norms of one window, the same on every process."""

    losses: npt.NDArray[np.float64]  # float64 (n_w,), in the order of the window's positions
    grad_norm: float  # of the window's gradient, before clipping
    micro_grad_norm: float | None  # of a micro-batch's, root mean square over the processes' first ones
    stop: bool  # whether any process was told to stop

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.losses).all() and np.isfinite(self.grad_norm))


class Window:
    """Accumulates one update's losses on the device; closing it costs one gather of a few numbers and one
    synchronisation."""

    def __init__(self, layout: BatchLayout):
        self.layout = layout
        self.losses: list[torch.Tensor] = []
        self.first_norm: torch.Tensor | None = None
        self.closed = False  # from here on the update may have begun

    def add(self, losses: torch.Tensor, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Take in one micro-step, after its backward pass.

        Args:
            losses: of the micro-step's slots, shape (micro,), padding included.
            parameters: hold the gradient so far. After the first of several micro-steps it is that micro-batch's own.
        """
        if not self.losses and self.layout.gradient_accumulation_steps > 1:
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            self.first_norm = torch.nn.utils.get_total_norm(gradients).to(losses.dtype)
        self.losses.append(losses.detach())

    def close(
        self, accelerator: Accelerator, num_images: int, grad_norm: torch.Tensor, stop: bool = False
    ) -> WindowResult:
        """Gather the processes' parts: micro-batch kP + r of the window was micro-step k of process r."""
        self.closed = True
        layout, last = self.layout, self.losses[-1]
        norms = [grad_norm.to(last.dtype), last.new_tensor(torch.nan) if self.first_norm is None else self.first_norm]
        mine = torch.cat([*self.losses, torch.stack([*norms, last.new_tensor(float(stop))])])
        parts = accelerator.gather(mine).double().cpu().numpy().reshape(layout.num_processes, -1)
        micro_batches = parts[:, :-3].reshape(layout.num_processes, -1, layout.micro_batch_size)
        losses = micro_batches.transpose(1, 0, 2).reshape(-1)[:num_images]
        micro_grad_norm = None
        if len(self.losses) > 1 and num_images == layout.global_batch_size:
            # Weights and Accelerate's division left 1/N of the micro-batch's mean; the scaler multiplied it.
            scale = 1.0 if accelerator.scaler is None else accelerator.scaler.get_scale()
            rms = float(np.sqrt((parts[:, -2] ** 2).mean()))
            micro_grad_norm = rms * layout.gradient_accumulation_steps / scale
        return WindowResult(losses, float(parts[0, -3]), micro_grad_norm, bool(parts[:, -1].any()))
