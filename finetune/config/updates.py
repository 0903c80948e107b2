"""Keys of the config: how an update is made, and how many there are."""

from collections.abc import Iterator
from typing import Literal

from finetune.config.fields import Betas, Count, Decay, Flag, Fraction, Natural, NonNegative, Positive, StepRules
from finetune.config.section import Section
from finetune.core.batch import uneven
from finetune.core.errors import short


class TrainingConfig(Section):
    global_batch_size: Count | None = None
    """Images in one update, over all processes and accumulation steps."""
    micro_batch_size: Count | Literal["auto"] | None = None
    """Images in one forward and backward pass of one process; `auto`: the largest that fits in memory."""
    gradient_accumulation_steps: Count | None = None
    """Forward and backward passes of one process in one update."""
    num_epochs: Count | None = None
    """Length in passes over the training images."""
    max_train_steps: Count | None = None
    """Length in updates; overrides `num_epochs` if both are given."""
    max_grad_norm: Positive | None = 1.0
    """Norm that the gradient of an update is clipped to; null: no clipping."""
    timestep_sampling: Literal["stratified", "uniform"] = "stratified"
    """`stratified`: timesteps that cover their range evenly in each batch; `uniform`: independent draws."""
    snr_gamma: Positive | None = None
    """Gamma of min-SNR loss weighting (Hang et al. 2023), usually 5; null: every timestep weighs the same."""
    noise_offset: NonNegative = 0.0
    """Offset noise: standard deviation of what is added to the noise of a whole channel, usually 0 to 0.1."""
    condition_dropout: Fraction = 0.1
    """Share of the images trained without their class or caption, from 0 to below 1; guidance needs some."""
    nonfinite_loss: Literal["stop", "skip"] = "stop"
    """At a loss or gradient that is not finite, stop the run or skip the update."""
    shard: Flag = False
    """Spread weights, gradients, optimizer state and EMA weights over the processes, each of which holds its share."""

    def disagreements(self) -> Iterator[tuple[str, str]]:
        if self.num_epochs is None and self.max_train_steps is None:
            yield "", "found neither; expected num_epochs or max_train_steps"
        keys = "global_batch_size", "micro_batch_size", "gradient_accumulation_steps"
        total, micro, steps = sizes = [getattr(self, key) for key in keys]
        given = ", ".join(key for key, size in zip(keys, sizes, strict=True) if size is not None)
        if micro == "auto":
            if total is None or steps is not None:
                problem = f"found {given}; auto needs global_batch_size and no gradient_accumulation_steps"
                yield "micro_batch_size", problem
            if self.shard:  # a trial that runs out of memory would leave the other processes waiting for its weights
                yield "micro_batch_size", "found auto with shard; expected a number (--check tests whether it fits)"
        elif sizes.count(None) > 1:
            yield "", f"found {given or 'none'} of {', '.join(keys)}; expected at least two"
        elif total is not None and (mismatch := uneven(total, micro, steps)):
            yield "", mismatch


class OptimizerConfig(Section):
    name: Literal["adamw"] = "adamw"
    """The optimizer."""
    learning_rate: Positive = 1e-5
    """Peak learning rate, per update."""
    betas: Betas = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment, per update."""
    weight_decay: NonNegative = 0.01
    """AdamW's weight decay: each update shrinks the weights by learning_rate x weight_decay."""
    eps: Positive = 1e-8
    """AdamW's term in the denominator, without which a weight that has had no gradient yet becomes 0 / 0."""


class LRSchedulerConfig(Section):
    name: (
        Literal["constant", "constant_with_warmup", "piecewise_constant"]
        | Literal["linear", "cosine", "cosine_with_restarts", "polynomial"]
    ) = "constant"
    """Shape of the learning rate over the run, as in diffusers."""
    warmup_steps: Natural = 0
    """Updates over which the learning rate rises from 0."""
    num_cycles: Count = 1
    """Cosines of `cosine_with_restarts` over the run: 1 is no restart."""
    power: Positive = 1.0
    """Exponent of `polynomial`."""
    step_rules: StepRules | None = None
    """Of `piecewise_constant`: factors of the learning rate, each with the update that ends it."""

    def disagreements(self) -> Iterator[tuple[str, str]]:
        if self.warmup_steps and self.name in ("constant", "piecewise_constant"):
            expected = f"expected 0 with {self.name}, which has no warm-up (constant_with_warmup has one)"
            yield "warmup_steps", f"found {self.warmup_steps}; {expected}"
        for key, name in {"num_cycles": "cosine_with_restarts", "power": "polynomial"}.items():
            if getattr(self, key) != 1 and self.name != name:
                yield key, f"found {getattr(self, key)}; expected 1 with {self.name}, because only {name} uses it"
        if (self.step_rules is not None) != (self.name == "piecewise_constant"):
            expected = "expected rules for piecewise_constant and null for any other schedule"
            yield "step_rules", f"found {short(self.step_rules)} with {self.name}; {expected}"


class EMAConfig(Section):
    enabled: Flag = True
    """Keep a moving average of the weights; validation, samples and export use it."""
    decay: Decay = 0.9999
    """Largest decay of the average, per update."""
    power: Positive = 0.75
    """Exponent of the decay's warm-up, 1 - (1 + updates)^-power."""
