"""A sharded run's weights, moments and average on disk: safetensors of each process, which any number of them reads.

torch.distributed.checkpoint writes and reads them. Where in its tensor a part belongs is in the header of its file, so
that nothing else has to be read, least of all a pickle, which torch's own format has.
"""

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_checkpoint
from torch.distributed.checkpoint.state_dict_saver import save as save_checkpoint

from finetune.core.errors import first_few
from finetune.core.groups import control_group, processes
from finetune.core.sharding import local, part, sharded

Weights = Mapping[str, torch.nn.Parameter]  # those that are trained, by name
FILE = re.compile(r"shard-(\d{5})-model-(\d{5})-of-(\d{5})\.safetensors")
_FILE_BYTES = 2**27  # of a file about, since torch makes a copy of all that is in it
_MOMENTS = "step", "exp_avg", "exp_avg_sq"  # AdamW's


def state_of(weights: Weights, optimizer: torch.optim.Optimizer, ema: EMAModel | None) -> dict[str, Tensor]:
    """Everything that is trained on from, by kind and name of the weight: `exp_avg.conv_in.weight`."""
    state = {}
    for index, (name, weight) in enumerate(weights.items()):
        state[f"model.{name}"] = weight.detach()
        state |= {f"{moment}.{name}": tensor for moment, tensor in optimizer.state.get(weight, {}).items()}
        if ema is not None:
            state[f"ema.{name}"] = sharded(ema.shadow_params[index], weight)
    return state


def write(folder: Path, state: dict[str, Tensor]) -> list[str]:
    """Write this process's parts; all processes call it together. Returns the names of its files.

    Raises:
        OSError: on all processes, if any of them could not write.
    """
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=_files(state), save_distributed=True)
    try:
        save_checkpoint(state, storage_writer=writer, process_group=control_group())
    except CheckpointException as error:
        raise _cause(error) from error
    own = f"shard-{processes().process_index + 1:05}-*"
    return [file.name for file in folder.glob(own) if FILE.fullmatch(file.name)]


def _files(state: dict[str, Tensor]) -> dict[str, int]:
    """The number of the file, from 1, that each tensor is in."""
    files, size = {}, 0
    for name, tensor in state.items():
        size += local(tensor).numel() * tensor.element_size()
        files[name] = 1 + size // _FILE_BYTES
    return {name: 1 + [*dict.fromkeys(files.values())].index(file) for name, file in files.items()}


def missing(names: Iterable[str]) -> list[str]:
    """Files that a checkpoint with these files lacks; none where it has none of a sharded run."""
    found = {tuple(map(int, match.groups())) for name in names if (match := FILE.fullmatch(name))}
    parts, files = (max((numbers[place] for numbers in found), default=0) for place in (0, 2))
    expected = {(one, file, files) for one in range(1, parts + 1) for file in range(1, files + 1)}
    return [
        f"shard-{one:05}-model-{file:05}-of-{count:05}.safetensors" for one, file, count in sorted(expected - found)
    ]


def written(files: Path) -> bool:
    """Whether a checkpoint is of a sharded run."""
    return any(FILE.fullmatch(file.name) for file in files.iterdir())


@torch.no_grad()
def load(files: Path, weights: Weights, optimizer: torch.optim.Optimizer, ema: EMAModel | None) -> None:
    """Load a checkpoint, of a sharded run or not, into weights, moments and average, which are sharded or not.

    Each process reads what it needs of the files, without the others.

    Raises:
        Exception: whatever a file leads to that is not of this network.
    """
    if written(files):
        _load_parts(files, weights, optimizer, ema)
    else:
        _load_whole(files, weights, optimizer, ema)


def _load_parts(files: Path, weights: Weights, optimizer: torch.optim.Optimizer, ema: EMAModel | None) -> None:
    reader = HuggingFaceStorageReader(str(files))
    saved = reader.read_metadata().state_dict_metadata
    check_names({name.removeprefix("model.") for name in saved if name.startswith("model.")}, weights)
    for name, tensor in saved.items():
        if not isinstance(tensor, TensorStorageMetadata) or not _complete(tensor):
            raise ValueError(f"{name}: parts that do not add up to it")
    target, moments = dict[str, Tensor](), dict[torch.nn.Parameter, dict[str, Tensor]]()
    for index, (name, weight) in enumerate(weights.items()):
        target[f"model.{name}"] = weight.detach()
        moments[weight] = _empty_moments(weight) if f"step.{name}" in saved else {}
        target |= {f"{moment}.{name}": tensor for moment, tensor in moments[weight].items()}
        if ema is not None:
            target[f"ema.{name}"] = sharded(ema.shadow_params[index], weight)
    with warnings.catch_warnings():  # that this process reads alone, which it does
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            load_checkpoint(target, storage_reader=reader, no_dist=True)
        except CheckpointException as error:
            raise _cause(error) from error
    _set_moments(optimizer, moments)


def _complete(tensor: TensorStorageMetadata) -> bool:
    return sum(chunk.sizes.numel() for chunk in tensor.chunks) == tensor.size.numel()


def _load_whole(files: Path, weights: Weights, optimizer: torch.optim.Optimizer, ema: EMAModel | None) -> None:
    """Load the files of a run that was not sharded, mapped into memory."""
    load_whole(files / "model.safetensors", weights, [local(weight) for weight in weights.values()])
    if ema is not None:
        load_whole(files / "ema.safetensors", weights, ema.shadow_params)
    saved = torch.load(files / "optimizer.bin", map_location="cpu", weights_only=True, mmap=True)["state"]
    moments = {weight: _empty_moments(weight) for index, weight in enumerate(weights.values()) if index in saved}
    for index, weight in enumerate(weights.values()):
        for moment, tensor in moments.get(weight, {}).items():
            full = saved[index][moment]
            local(tensor).copy_(full if moment == "step" else _part(full, weight))
    _set_moments(optimizer, moments)


def load_whole(file: Path, weights: Weights, targets: Iterable[Tensor]) -> None:
    """Copy into each weight's target what this process has of the tensor by that name in a file.

    Raises:
        ValueError: if the file's tensors have other names or shapes than the weights.
    """
    saved = load_file(file)
    check_names(saved.keys(), weights)
    for target, (name, weight) in zip(targets, weights.items(), strict=True):
        target.copy_(_part(saved[name], weight))


def check_moments(optimizer: torch.optim.Optimizer) -> None:
    """Raises ValueError unless AdamW's loaded state is as large as the weights, which its fused kernel relies on."""
    for weight, state in optimizer.state.items():
        found = {moment: tuple(tensor.shape) for moment, tensor in state.items()}
        if found != {moment: () if moment == "step" else tuple(weight.shape) for moment in _MOMENTS}:
            raise ValueError(f"{found} for a weight of {tuple(weight.shape)}")
        if not all(tensor.is_contiguous() or tensor.stride() == weight.stride() for tensor in state.values()):
            raise ValueError("moments without memory of their own")


def _part(full: Tensor, weight: torch.nn.Parameter) -> Tensor:
    if full.shape != weight.shape:
        raise ValueError(f"a tensor of {tuple(full.shape)} for a weight of {tuple(weight.shape)}")
    return part(full, weight)


def _empty_moments(weight: torch.nn.Parameter) -> dict[str, Tensor]:
    """AdamW's state of a weight before its first update."""
    step = torch.zeros((), dtype=torch.float32, device=weight.device)
    return {"step": step} | {moment: torch.zeros_like(weight, requires_grad=False) for moment in _MOMENTS[1:]}


def _set_moments(optimizer: torch.optim.Optimizer, moments: Mapping[torch.nn.Parameter, dict[str, Tensor]]) -> None:
    for weight, tensors in moments.items():
        if tensors:
            optimizer.state[weight] = tensors


def check_names(saved: Iterable[str], weights: Mapping[str, Tensor]) -> None:
    """Raises ValueError if a checkpoint's tensors have other names than the weights."""
    if different := {*saved} ^ weights.keys():
        raise ValueError(f"weights of other names: {first_few(sorted(different))}")


def _cause(error: CheckpointException) -> BaseException:
    """What failed on the first of the processes where something did."""
    return next(iter(error.failures.values()))[0]
