"""The arithmetic of the batch: global batch = micro-batch x accumulation steps x processes; windows of an epoch."""

import math
from dataclasses import dataclass

from finetune.core.errors import UserError


@dataclass(frozen=True)
class BatchLayout:
    """How the images of one update are divided: micro-batch x accumulation steps x processes."""

    micro_batch_size: int
    gradient_accumulation_steps: int
    num_processes: int

    @property
    def global_batch_size(self) -> int:
        return self.micro_batch_size * self.gradient_accumulation_steps * self.num_processes

    def micro_steps(self, num_images: int) -> int:
        """Micro-steps that a window of so many images of one shape takes: N if it is full."""
        return -(-num_images // (self.micro_batch_size * self.num_processes))

    def smaller(self) -> list["BatchLayout"]:
        """Layouts of the same global batch with this micro-batch and every smaller one, the largest first."""
        share = self.micro_batch_size * self.gradient_accumulation_steps
        sizes = [size for size in divisors(share) if size <= self.micro_batch_size]
        return [BatchLayout(size, share // size, self.num_processes) for size in sizes]

    @property
    def overrides(self) -> str:
        """The layout as overrides that the command line takes."""
        return (
            f"training.micro_batch_size={self.micro_batch_size} "
            f"training.gradient_accumulation_steps={self.gradient_accumulation_steps}"
        )


def resolve_layout(total: int | None, micro: int | str | None, steps: int | None, num_processes: int) -> BatchLayout:
    """The layout that a config's two or three of global batch, micro-batch and accumulation steps come to.

    With `micro` "auto" a process takes its whole share at once; what fits is found later (see `training.memory`).

    Raises:
        UserError: if they do not divide on so many processes, with the arithmetic.
    """
    size = None if isinstance(micro, str) else micro
    if total is None:
        if size is None or steps is None:
            raise ValueError("at least two of the three are needed")  # the schema sees to it
        total = size * steps * num_processes
    if problem := uneven(total, size, steps, num_processes):
        raise UserError(f"training: {problem}")
    if size is None:
        size = total // ((steps or 1) * num_processes)
    return BatchLayout(size, steps or total // (size * num_processes), num_processes)


def uneven(total: int, micro: int | None, steps: int | None, processes: int | None = None) -> str | None:
    """Why a global batch cannot be divided like this, or None if it can. A None argument is derived from the others."""
    sizes = {"micro_batch_size": micro, "gradient_accumulation_steps": steps, "num_processes": processes}
    given = {name: size for name, size in sizes.items() if size is not None}
    product, free = math.prod(given.values()), len(given) < len(sizes)
    if total == product or (free and total % product == 0):
        return None
    factors = " x ".join(f"{name} {size}" for name, size in given.items())
    equals = f" = {product}" if len(given) > 1 else ""
    return f"found global_batch_size {total}; expected {'a multiple of ' if free else ''}{factors}{equals}"


def divisors(number: int) -> list[int]:
    """All divisors, largest first."""
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)}, reverse=True)


def windows_per_epoch(num_images: int, global_batch_size: int) -> int:
    """Updates in one epoch, the shorter last window included."""
    return -(-num_images // global_batch_size)


def window_range(window: int, num_images: int, global_batch_size: int) -> range:
    """Positions of a window within its epoch: wB .. min((w+1)B, n) - 1."""
    return range(window * global_batch_size, min((window + 1) * global_batch_size, num_images))
