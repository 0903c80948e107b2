"""One checkpoint: written atomically, verified, and loaded without trusting it.

A checkpoint is written under a temporary name by all processes, synced to disk, given its manifest last, and renamed.
Only the files below are ever listed, verified or loaded; whatever else lies in the folder is ignored.
"""

import contextlib
import json
import re
import shutil
import tempfile
from collections import ChainMap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import load as load_pickle
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.serialization import get_crc32_options, set_crc32_options

from finetune.core.distributed import together
from finetune.core.errors import UserError, first_line
from finetune.core.files import permit, writing
from finetune.core.groups import gathered
from finetune.run import manifest, shards

RUN_STATE = "run_state.json"
PARTIAL = ".checkpoint.partial"
_is_loaded = re.compile(
    r"(model|ema)\.safetensors|optimizer\.bin|scaler\.pt|random_states_\d+\.pkl|run_state\.json|" + shards.FILE.pattern
).fullmatch


def share_weights_between_setups(accelerator: Accelerator) -> None:
    """Have `save_state` name weights as the bare network does, without the prefixes of DDP and of a compiled module.

    Accelerate saves a wrapped network's names as they are, so a checkpoint of two processes would not load in one.
    Frozen weights are not saved: the run's identity has their hash.
    """

    def bare(model: torch.nn.Module) -> torch.nn.Module:
        return accelerator.unwrap_model(model, keep_torch_compile=False)

    def before_save(models: list[torch.nn.Module], weights: list[dict[str, Tensor]], output_dir: str) -> None:
        weights[:] = [_not_frozen(bare(model)) for model in models[: len(weights)]]

    def before_load(models: list[torch.nn.Module], input_dir: str) -> None:
        (model,) = map(bare, models)
        saved, expected = load_file(Path(input_dir, "model.safetensors")), _not_frozen(model)
        shards.check_names(saved, expected)
        model.load_state_dict(saved, strict=False)
        models.clear()  # Accelerate has nothing left to load

    accelerator.register_save_state_pre_hook(before_save)
    accelerator.register_load_state_pre_hook(before_load)


def _not_frozen(model: torch.nn.Module) -> dict[str, Tensor]:
    """A network's state without its frozen parameters."""
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def save(
    accelerator: Accelerator,
    output_dir: Path,
    step: int,
    run_state: dict[str, Any],
    tensors: dict[str, dict[str, Tensor]],
    parts: dict[str, Tensor] | None = None,
) -> Path:
    """Write `checkpoint-<step>`; all processes call it together.

    Args:
        run_state: JSON saved with the weights: where the run is, and which run it is.
        tensors: further named groups of tensors, each written as `<group>.safetensors`.
        parts: of a sharded run the state that `shards` writes, in place of these and of Accelerate's.

    Raises:
        UserError: if any process could not write. Existing checkpoints are untouched, nothing is left behind.
    """
    folder, temporary = output_dir / f"checkpoint-{step}", output_dir / PARTIAL

    @writing(folder)
    def write() -> dict[str, Any]:
        """Returns the manifest's entries of this process's files, so that the main one need not read them again."""
        own = {}
        if parts is not None:
            own = manifest.describe(temporary, shards.write(temporary, parts))
        else:
            with _without_crc32():
                accelerator.save_state(str(temporary))
        if accelerator.is_main_process:
            for group, named in tensors.items():
                save_file(named, temporary / f"{group}.safetensors")
            (temporary / RUN_STATE).write_text(json.dumps(run_state, indent=2), encoding="utf-8")
        return own

    @writing(folder)
    def publish() -> None:
        if accelerator.is_main_process:
            permit(temporary.glob("*.safetensors"))
            if parts is not None:
                manifest.seal(temporary, step, [RUN_STATE], described)
            else:
                manifest.seal(temporary, step, [file.name for file in temporary.iterdir() if _is_loaded(file.name)])
            if folder.exists():  # a damaged one that resuming skipped
                shutil.rmtree(folder)
            temporary.rename(folder)
            manifest.sync(output_dir)

    try:
        described = dict(ChainMap(*gathered(together(write))))
        together(publish)
    except Exception:  # among them a data worker's death, which torch raises wherever its signal arrives
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


@contextlib.contextmanager
def _without_crc32() -> Iterator[None]:
    """Disable torch.save's CRC32 for the block; the manifest has its own checksum of each file."""
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)


def flaw(folder: Path) -> str | None:
    """Why a checkpoint is not valid, in a few words; None if every file that is loaded matches its manifest."""
    return manifest.flaw(folder, _is_loaded, _lacking)


def _lacking(names: Iterable[str]) -> list[str]:
    """What a checkpoint with these files lacks: parts of the state, or files of it."""
    parts = any(map(shards.FILE.fullmatch, names))
    whole = [] if parts else ["model.safetensors", "optimizer.bin"]
    return [*shards.missing(names), *(name for name in (*whole, RUN_STATE) if name not in names)]


def step_of(folder: Path) -> int:
    """The step of a valid checkpoint, whatever its folder is called."""
    return int(manifest.read(folder)["step"])


def digest(folder: Path) -> str:
    """What identifies a valid checkpoint, wherever it is moved: the checksum of its manifest."""
    return manifest.checksum(folder / manifest.MANIFEST)


@contextlib.contextmanager
def untrusted(folder: Path) -> Iterator[Path]:
    """Read a checkpoint that may come from somebody else: errors inside become one line.

    Yields:
        A folder of links to the files that the manifest lists, so that nothing else can be loaded, not even by
        Accelerate, which loads what it finds.
    """
    try:
        with tempfile.TemporaryDirectory() as links:
            for name in filter(_is_loaded, manifest.read(folder)["files"]):
                Path(links, name).symlink_to((folder / name).absolute())
            yield Path(links)
    except UserError:
        raise
    except Exception as error:  # safetensors, torch, json and what reads their contents each raise their own
        raise UserError(
            f"{folder}: refused: found {type(error).__name__} ({first_line(error)}), expected plain tensors and "
            "numbers of this network, as this script saves them; resume from another checkpoint, or set another "
            "output_dir"
        ) from error


def read_run_state(files: Path) -> dict[str, Any]:
    """The run state of a checkpoint, from its `untrusted` files."""
    return json.loads((files / RUN_STATE).read_text(encoding="utf-8"))


def load(accelerator: Accelerator, files: Path) -> None:
    """Load Accelerate's state from `untrusted` files: network, optimizer, scaler, generators. Called by all processes.

    Accelerate's micro-step counter is set to 0, since checkpoints are made at a window's end; the saved one counts in
    the accumulation steps of the run that saved it.
    """
    for file in files.glob("random_states_*.pkl"):
        load_pickle(file)  # raises on anything but plain values; `load_state` would ignore it
    scaler = accelerator.scaler
    if scaler is not None and not (files / "scaler.pt").exists():
        accelerator.scaler = None  # saved in another precision: start with a fresh scale
    try:
        accelerator.load_state(str(files))
    finally:
        accelerator.scaler = scaler
    accelerator.step = 0
