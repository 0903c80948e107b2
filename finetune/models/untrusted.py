"""What transformers and diffusers would load beside a component's weights, or instead of them, because a file asks."""

import json
from pathlib import Path
from typing import Any

from finetune.core.errors import UserError

ADAPTER = "adapter_config.json"  # of peft


def check_plain(folder: Path, config: dict[str, Any]) -> None:
    """Refuse a component that is more than its weights.

    Args:
        config: of the component.

    Raises:
        UserError: for an adapter beside the weights, which would change what they do in silence; for a quantizer, whose
            library would be imported, or which would be passed over; for attention by code of a hub.
    """
    if (folder / ADAPTER).exists():
        raise UserError(
            f"model.pretrained: {folder}: found an adapter beside the weights ({ADAPTER}); expected weights alone: "
            "merge it into them, or remove it"
        )
    for key, value in config.items():
        if key == "quantization_config" or (key.endswith("attn_implementation") and "/" in str(value)):
            raise UserError(
                f"model.pretrained: {folder}: found {key}: {json.dumps(value)[:100]} in config.json; expected plain "
                "weights and attention that is built in: remove it, or give another pipeline"
            )
        if isinstance(value, dict):
            check_plain(folder, value)
