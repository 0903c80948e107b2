"""Whether a model can be trained as it is: its settings, and what its network predicts before any training."""

import inspect
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from diffusers import DDPMScheduler, ModelMixin

from finetune.core.errors import UserError, first_line
from finetune.core.failures import is_out_of_memory
from finetune.core.kind import Arguments, predict

SCALARS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "null"}


def check_settings(section: str, given: dict[str, Any], model_class: type) -> None:
    """Settings of a class of diffusers, which takes any value: `no`, a text in YAML 1.2, would count as true.

    Raises:
        UserError: a line for each key that is no setting, with the nearest one or all that there are, and for each
            value of another type than the class declares.
    """
    known = list(inspect.signature(model_class).parameters)
    unknown = [key for key in given if key not in known]
    if unknown:
        near = {key: get_close_matches(str(key), known, 1) for key in unknown}
        raise UserError(
            *(
                f"{section}.{key}: {model_class.__name__} has no such setting; "
                + (f"did you mean {near[key][0]}?" if near[key] else f"it has {', '.join(known)}")
                for key in unknown
            )
        )
    types = {key: _alternatives(kind) for key, kind in get_type_hints(vars(model_class)["__init__"]).items()}
    problems = [
        f"{section}.{key}: found {value!r}; expected "
        + " or ".join(dict.fromkeys(SCALARS.get(kind, "a list") for kind in types[key]))
        for key, value in given.items()
        if not _fits(value, types[key])
    ]
    if problems:
        raise UserError(*problems)


def _alternatives(declared: Any) -> list[Any]:
    """The types that a setting may have: those of SCALARS, and any other for lists, whose content is not looked at."""
    if get_origin(declared) is Literal:
        return [str]
    if declared in SCALARS or get_origin(declared) in (list, tuple):
        return [declared]
    return list(get_args(declared)) or [declared]


def _fits(value: Any, kinds: list[Any]) -> bool:
    if type(value) not in SCALARS:
        return any(kind not in SCALARS for kind in kinds)
    return type(value) in kinds or (type(value) is int and float in kinds)


@torch.no_grad()
def check_prediction(
    network: ModelMixin, noise_scheduler: DDPMScheduler, clean: torch.Tensor, conditions: Arguments, problem: str
) -> None:
    """Not all blocks that can be built fit together, some settings divide by zero, and weights may be damaged.

    Tried at the first and at the last timestep.

    Args:
        clean: one input of few pixels, with its conditions.
        problem: what a network cannot do whose blocks do not fit, the start of the error.

    Raises:
        UserError: if the network fails, or its output is of another shape than its input or not finite.
    """
    last = noise_scheduler.config.num_train_timesteps - 1
    network.eval()
    try:
        outputs = [predict(network, clean, torch.tensor([timestep]), conditions) for timestep in (0, last)]
    except Exception as error:  # whatever a block does with a tensor that it was not made for
        if is_out_of_memory(error):
            return  # the memory plan has better advice
        raise UserError(f"{problem}: {first_line(error)}") from error
    finally:
        network.train()
    for output in outputs:
        if output.shape != clean.shape:
            raise UserError(f"{problem}: it maps {tuple(clean.shape)} to {tuple(output.shape)}")
        if not output.isfinite().all():
            raise UserError(
                f"model: the network's prediction is not finite at timestep 0 or {last}, before any training; expected "
                "finite weights, and settings that do not divide by zero (freq_shift, mid_block_scale_factor, norm_eps)"
            )
