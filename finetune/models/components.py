"""The components of a Stable Diffusion pipeline in a folder: known classes only, loaded safely, identified by hash."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ModelMixin,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)
from transformers.utils import logging as transformers_logging

from finetune.core.errors import UserError, first_line
from finetune.models.hub import file_bytes, is_loaded, read_json, variant
from finetune.models.untrusted import check_plain

PIPELINES = {cls.__name__: cls for cls in (StableDiffusionPipeline, StableDiffusionXLPipeline)}
NETWORKS: dict[str, type[Any]] = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
    "safety_checker": StableDiffusionSafetyChecker,
}
OPTIONAL = {"safety_checker", "feature_extractor", "image_encoder"}


class Folder:
    """The folder of a Stable Diffusion pipeline.

    Attributes:
        name: as the config gives it.
        pipeline_class: StableDiffusionPipeline or StableDiffusionXLPipeline.
        index: of model_index.json.
        text_encoders, tokenizers: the names of their components.
    """

    def __init__(self, path: Path, name: str, index: dict[str, Any]):
        """Check that the pipeline's components are of the classes that are known here; loads nothing.

        Raises:
            UserError: for any other component, or one that is missing.
        """
        self.path, self.name, self.index = path, name, index
        self.pipeline_class: type[Any] = PIPELINES[index["_class_name"]]
        self.text_encoders = ["text_encoder"]
        if self.sized:
            self.text_encoders.append("text_encoder_2")
        self.tokenizers = [part.replace("text_encoder", "tokenizer") for part in self.text_encoders]
        for part in ("unet", "vae", *self.text_encoders):
            self._require(part, NETWORKS[part].__name__)
        for part in self.tokenizers:
            self._require(part, "CLIPTokenizer", "CLIPTokenizerFast")
        known = {"unet", "vae", "scheduler", *self.text_encoders, *self.tokenizers, *OPTIONAL}
        for part, value in index.items():
            if not part.startswith("_") and isinstance(value, list) and part not in known:
                raise UserError(
                    f"model.pretrained: {name}: found a component {part!r} in model_index.json; expected those of a "
                    f"{self.pipeline_class.__name__} alone: {', '.join(sorted(known))}"
                )

    @property
    def published_name(self) -> str:
        """A hub id as it is; of a local path the last part."""
        return self.path.absolute().name if os.path.isdir(self.name) else self.name

    @property
    def variant(self) -> str | None:
        """Variant, such as fp16, of components whose weights have no other."""
        found = {variant(self.path / part) or "" for part in ("unet", "vae", *self.text_encoders)}
        return " and ".join(sorted(found - {""})) or None

    @property
    def sized(self) -> bool:
        """Whether the UNet is conditioned on the size and the crop of an image, as SDXL's is."""
        return self.pipeline_class is StableDiffusionXLPipeline

    @property
    def zeros_for_no_prompt(self) -> bool:
        """Whether the pipeline takes zeros where there is no prompt, and not the empty text."""
        return self.sized and bool(self.index.get("force_zeros_for_empty_prompt", True))

    def has(self, part: str) -> bool:
        """Whether the pipeline comes with a component."""
        value = self.index.get(part)
        return isinstance(value, list) and None not in value

    def config(self, part: str, file: str = "config.json") -> dict[str, Any]:
        """The config of a component."""
        return read_json(self.path / part / file, self.name, f"the config of the pipeline's {part}")

    def load(self, part: str, dtype: torch.dtype = torch.float32) -> Any:
        """A component with weights, in evaluation mode and without gradients.

        Raises:
            UserError: if the weights cannot be loaded safely, or do not fit the config.
        """
        folder = self.path / part
        check_plain(folder, self.config(part))
        options: dict[str, Any] = {"dtype": dtype, "local_files_only": True, "output_loading_info": True}
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call] # a bar for each component
        try:
            with without_warnings():  # that weights are missing: it is an error here
                network, report = NETWORKS[part].from_pretrained(folder, variant=variant(folder), **options)
        except Exception as error:  # diffusers, transformers, safetensors and torch each raise their own
            raise UserError(
                f"model.pretrained: {folder}: the weights cannot be loaded safely ({first_line(error)}); expected "
                "safetensors, or a .bin of plain tensors, that fit config.json"
            ) from error
        fatal = {"missing_keys", "mismatched_keys", "error_msgs"}
        if isinstance(network, ModelMixin):
            fatal.add("unexpected_keys")  # of transformers' models: buffers that older versions saved
        wrong = [f"{len(report[kind])} {kind.replace('_', ' ')}" for kind in sorted(fatal) if report.get(kind)]
        if any("lora_" in name for name in report["unexpected_keys"]):
            raise UserError(
                f"model.pretrained: {folder}: found adapters (LoRA) among the weights; expected a pipeline without: "
                "load it with diffusers, call fuse_lora() and unload_lora_weights(), and save it again"
            )
        if wrong:  # there would be random numbers in their place
            raise UserError(f"model.pretrained: {folder}: the weights do not fit config.json: {', '.join(wrong)}")
        return network.requires_grad_(False).eval()

    def load_tokenizer(self, part: str) -> Any:
        """A tokenizer that has a vocabulary; without its files it would be loaded with two tokens."""
        folder = self.path / part
        named = [file.name for file in folder.glob("*") if file.is_file()]
        if "tokenizer.json" not in named and not {"vocab.json", "merges.txt"} <= {*named}:
            raise UserError(
                f"model.pretrained: {folder}: found no vocabulary; expected tokenizer.json, or vocab.json and "
                "merges.txt"
            )
        tokenizer = _of_clip(CLIPTokenizer, folder, "tokenizer")
        encoder = part.replace("tokenizer", "text_encoder")
        rows, length = (self.config(encoder).get(key) for key in ("vocab_size", "max_position_embeddings"))
        if len(tokenizer) > (rows or 0) or len(tokenizer) < 3 or tokenizer.model_max_length > (length or 0):
            raise UserError(
                f"model.pretrained: {folder}: found {len(tokenizer)} tokens and texts of {tokenizer.model_max_length}; "
                f"expected at most the {rows} and {length} that the {encoder} has embeddings for"
            )
        return tokenizer

    def saved_bytes(self, part: str) -> int:
        """Bytes of a component's weights when they are saved as `load` gives them by default, in float32.

        By its config: its file may be of half precision, or a .bin.
        """
        network_class = NETWORKS[part]
        with torch.device("meta"), without_warnings():
            if issubclass(network_class, ModelMixin):
                network: Any = network_class.from_config(self.config(part))
            else:
                network = network_class(network_class.config_class.from_pretrained(self.path / part))
        return file_bytes(weight.float() for weight in network.parameters())

    @property
    def checkers(self) -> list[str]:
        """The network that looks for unsafe pictures, where the pipeline comes with all that this takes."""
        return ["safety_checker"] if self.has("safety_checker") and self.has("feature_extractor") else []

    def load_checker(self) -> dict[str, Any]:
        """The components that look for unsafe pictures, by name; none if the pipeline comes without them.

        Raises:
            UserError: if they cannot be loaded safely.
        """
        if not self.checkers:
            return {}
        extractor = _of_clip(CLIPImageProcessor, self.path / "feature_extractor", "feature extractor")
        return {"safety_checker": self.load("safety_checker"), "feature_extractor": extractor}

    def pipeline(self, **parts: Any) -> Any:
        """The pipeline's class around some of its components; the others are missing."""
        names = ["vae", "unet", "scheduler", *self.text_encoders, *self.tokenizers]
        components: dict[str, Any] = dict.fromkeys(names) | parts
        if self.sized:
            components |= {"force_zeros_for_empty_prompt": self.zeros_for_no_prompt, "add_watermarker": False}
        else:
            checker = {"safety_checker": None, "feature_extractor": None} | parts
            components |= checker | {"requires_safety_checker": bool(checker["safety_checker"])}
        return self.pipeline_class(**components)

    def digest(self, parts: Sequence[str]) -> str:
        """A hash of all files of some components that a result depends on: configs, weights, vocabularies."""
        digest = hashlib.sha256()
        for part in parts:
            chosen = variant(self.path / part)
            for file in sorted((self.path / part).iterdir()):
                if file.suffix in (".json", ".txt") or is_loaded(file.name, chosen):
                    with open(file, "rb") as content:
                        digest.update(hashlib.file_digest(content, "sha256").digest())
        return digest.hexdigest()[:32]

    def _require(self, part: str, *classes: str) -> None:
        found = self.index.get(part)
        named = found[-1] if isinstance(found, list) and len(found) == 2 else None
        if named not in classes:
            raise UserError(
                f"model.pretrained: {self.name}: found {part}: {json.dumps(found)} in model_index.json; expected a "
                f"{classes[0]}, as a {self.pipeline_class.__name__} has"
            )


def _of_clip(cls: type[Any], folder: Path, what: str) -> Any:
    """A component without weights, of one class whatever its files say."""
    try:
        return cls.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise UserError(
            f"model.pretrained: {folder}: the {what} cannot be loaded ({first_line(error)}); expected that of CLIP"
        ) from error


@contextmanager
def without_warnings() -> Iterator[None]:
    """diffusers and transformers print their errors only: what they warn of here is expected, or is in the plan."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
