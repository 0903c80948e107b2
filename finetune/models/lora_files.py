"""An adapter's files: for diffusers, and for programs that read kohya's format. Each is loaded again to verify it."""

from pathlib import Path

import torch
from accelerate.utils import send_to_device
from diffusers import UNet2DConditionModel
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya, convert_unet_state_dict_to_peft
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from finetune.core.errors import UserError, first_line
from finetune.core.kind import Arguments
from finetune.models.components import Folder, without_warnings

DIFFUSERS, KOHYA = "pytorch_lora_weights.safetensors", "kohya.safetensors"


def write(folder: Path, base: Folder, network: UNet2DConditionModel, alpha: float) -> None:
    """Write both files. diffusers' has rank and alpha in its header, kohya's an `.alpha` beside a layer's weights."""
    folder.mkdir(parents=True, exist_ok=True)
    adapters = {name: weight.detach().cpu().contiguous() for name, weight in _adapters(network).items()}
    described = network.peft_config["default"].to_dict()
    # A set's order differs from process to process: sorted, the same adapter is the same bytes.
    metadata = {name: sorted(value) if isinstance(value, set) else value for name, value in described.items()}
    base.pipeline_class.save_lora_weights(folder, unet_lora_layers=adapters, unet_lora_adapter_metadata=metadata)
    converted = convert_state_dict_to_kohya({f"unet.{name}": weight for name, weight in adapters.items()})
    for name in converted:
        if name.endswith(".alpha"):
            converted[name] = torch.tensor(alpha, dtype=torch.float32)
    save_file({name: tensor.contiguous() for name, tensor in converted.items()}, folder / KOHYA)


def unread(base: Folder, network: UNet2DConditionModel) -> list[str]:
    """Layers with adapters that would be lost in kohya's file: diffusers finds other names in it, or none.

    The format joins the parts of a name by underscores, which names have too; diffusers knows most of them by heart.
    """
    names = [f"unet.{name}" for name in _adapters(network)]
    converted = convert_state_dict_to_kohya({name: torch.empty(1, 1) for name in names})
    read, _ = base.pipeline_class.lora_state_dict(converted, unet_config=network.config)
    found = convert_unet_state_dict_to_peft(read)
    return sorted({name.removeprefix("unet.").split(".lora_")[0] for name in names if name not in found})


@torch.no_grad()
def verify(
    folder: Path, base: Folder, network: UNet2DConditionModel, noisy: torch.Tensor, conditions: Arguments
) -> None:
    """Load each file into a fresh copy of the base, as its users do, and compare outputs with the trained network's.

    In float32. A base in half precision is compared on the CPU as a copy in float32 with the same adapters.

    Raises:
        UserError: if any output differs in any bit, or a file cannot be loaded.
    """
    dtype = network.conv_in.weight.dtype
    fresh = base.load("unet", dtype)
    if dtype == torch.get_default_dtype():
        device = network.conv_in.weight.device
        fresh.to(device)
        expected = _output(network, noisy, conditions, device)
    else:
        device = torch.device("cpu")
        torch.nn.Module.to(fresh, torch.get_default_dtype())  # diffusers' own `to` warns
        adapters = {name: weight.cpu() for name, weight in _adapters(network).items()}
        fresh.load_lora_adapter(adapters, prefix=None, metadata=network.peft_config["default"].to_dict())
        expected = _output(fresh, noisy, conditions, device)
        fresh.unload_lora()
    for name in (DIFFUSERS, KOHYA):
        found = _loaded_output(folder, name, base, fresh, noisy, conditions, device)
        if not torch.equal(found, expected):
            apart = float((found - expected).abs().max())
            raise UserError(
                f"{folder / name}: loaded afresh, the adapter's output is {apart:.3g} from the trained network's; "
                "expected the same in every bit. The checkpoints are complete: run the same command again",
                exit_code=1,
            )


def _loaded_output(
    folder: Path,
    name: str,
    base: Folder,
    fresh: UNet2DConditionModel,
    noisy: torch.Tensor,
    conditions: Arguments,
    device: torch.device,
) -> torch.Tensor:
    """The output of the base with the adapter of one file, which is removed again."""
    pipeline = base.pipeline(unet=fresh)
    try:
        with without_warnings():  # that the text encoders have no adapters
            pipeline.load_lora_weights(folder, weight_name=name, adapter_name="loaded", local_files_only=True)
    except Exception as error:  # diffusers, peft and safetensors each raise their own
        raise UserError(f"{folder / name}: cannot be loaded again ({first_line(error)})", exit_code=1) from error
    output = _output(fresh, noisy, conditions, device)
    pipeline.unload_lora_weights()
    return output


def _adapters(network: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    return get_peft_model_state_dict(network)


def _output(
    network: UNet2DConditionModel, noisy: torch.Tensor, conditions: Arguments, device: torch.device
) -> torch.Tensor:
    """The network's output in evaluation mode, without the autocast that Accelerate wraps around it."""
    was_training = network.training
    network.eval()
    inputs = send_to_device({"sample": noisy, "timestep": torch.tensor([1]), **conditions}, device)
    with torch.autocast(device.type, enabled=False):
        output = type(network).forward(network, **inputs).sample
    network.train(was_training)
    return output.cpu()
