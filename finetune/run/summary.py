"""The results of a run and its model card, as text."""

import glob
import os
import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from finetune.config import plain_yaml
from finetune.config.schema import Config
from finetune.core.kind import Kind
from finetune.data.remote import is_url, named
from finetune.training.compute import with_prefix


def curve(history: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, value) of each line of a history that has this scalar."""
    return [(line["step"], line[name]) for line in history if name in line]


def curves_folder(output_dir: Path) -> Path:
    """What TensorBoard is best pointed at: the folder of all runs, since it names runs by their paths below it.

    Not where that folder holds much else, which TensorBoard would search through again and again.
    """
    above = output_dir.absolute().parent
    return output_dir if above in (Path.cwd(), Path.home(), Path(above.root)) else output_dir.parent


def results(history: list[dict[str, Any]], updates: int, images: int, seconds: float, flops: int) -> dict[str, str]:
    """Results of the run by name, for the console and the model card.

    Args:
        seconds: of training, without evaluations and saves.
        flops: of one image.
    """
    rows = {"updates": f"{updates}, {images} images in {seconds:.0f} s of training, {images / seconds:.1f} images/s"}
    rows["compute"] = (
        f"{with_prefix(flops)}FLOP an image, {with_prefix(flops * images / seconds)}FLOP/s on all processes"
    )
    for title, name in {"last epoch": "train/epoch_loss", "smoothed": "train/loss_smoothed"}.items():
        if points := curve(history, name):
            rows[f"training loss, {title}"] = f"{points[-1][1]:.5f}"
    exported = curve(history, "validation/loss_ema") or curve(history, "validation/loss")
    if exported:
        step, best = min(exported, key=lambda point: point[1])
        rows["validation loss"] = f"{exported[-1][1]:.5f}, from {exported[0][1]:.5f}; best {best:.5f} at step {step}"
    if distances := curve(history, "validation/kernel_distance"):
        frechet = curve(history, "validation/frechet_distance")[-1][1]
        rows["kernel distance"] = f"{distances[-1][1]:.5f}, from {distances[0][1]:.5f}; Fréchet distance {frechet:.5f}"
    return rows


def outputs(output_dir: Path, export_name: str, total_steps: int) -> dict[str, str]:
    """Where a finished run's files lie, by name, and how to train longer, for the console. What was not written is not
    named: there are no samples with samples.count=0."""
    written = [output_dir / name for name in (export_name, "samples", "loss_curve.png")]
    rows = {path.name: str(path) for path in written if path.exists()}
    rows["curves"] = f"tensorboard --logdir {shlex.quote(str(curves_folder(output_dir)))}"
    rows["to train longer"] = f"run again with a training.max_train_steps above {total_steps}"
    return rows


def hyperparameters(config: Config, global_batch_size: int, total_steps: int) -> dict[str, float | str]:
    """Settings by which TensorBoard compares runs; one that is not set is the text "null", and not a number."""
    return {
        "global_batch_size": global_batch_size,
        "updates": total_steps,
        "learning_rate": config.optimizer.learning_rate,
        "lr_scheduler": config.lr_scheduler.name,
        "snr_gamma": "null" if config.training.snr_gamma is None else f"{config.training.snr_gamma:g}",
        "timestep_sampling": config.training.timestep_sampling,
        "seed": config.seed,
    }


def _is_local(name: str) -> bool:
    """Whether a source or a model is named by a path of this machine, and not by its id on the hub or an address."""
    path = os.path.abspath(os.path.expanduser(name))
    found = os.path.exists(path) or bool(glob.glob(path, recursive=True))
    return name != "digits" and (found or name.startswith((".", "/", "~", "file:")))


def _published(name: str) -> str:
    """A hub id as it is; of an address what is not secret; of a local path the last part."""
    if _is_local(name):
        return Path(os.path.abspath(os.path.expanduser(name))).name
    return named(name) if is_url(name) else name


def _recipe(config: Config) -> str:
    """The config as YAML, without the paths of this machine and without secrets."""
    values: dict[str, Any] = config.model_dump()
    values["output_dir"] = Path(os.path.abspath(config.output_dir)).name
    values["data"]["source"] = _published(config.data.source)
    if config.model.pretrained is not None:
        values["model"]["pretrained"] = _published(config.model.pretrained)
    if config.validation.quality is not None:
        values["validation"]["quality"]["features"] = _published(config.validation.quality.features)
    if config.checkpoint.resume not in ("auto", "never"):
        values["checkpoint"]["resume"] = Path(config.checkpoint.resume).name
    return plain_yaml.write(values)


def model_card(config: Config, kind: Kind, rows: dict[str, str], picture: str | None, prompt: str) -> str:
    """The exported pipeline's README: origin, use, results, recipe. It names no path of this machine and no secret.

    Args:
        prompt: of the example of its use, for a model of captions.
    """
    task = "text-to-image" if kind.captioned else "unconditional-image-generation"
    base, source, averaged = config.model.pretrained, config.data.source, config.ema.enabled
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag=task,
        tags=["diffusers", task, *(["lora"] if config.model.lora else [])],
        base_model=None if base is None or _is_local(base) else base,
    )
    origin = "Trained from scratch" if base is None else f"Fine-tuned from `{_published(base)}`"
    images = "a local folder" if _is_local(source) else f"`{_published(source)}`"
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {Path(os.path.abspath(config.output_dir)).name}",
        f"{origin} on the images of {images}. Holds the {'averaged (EMA)' if averaged else 'last'} weights.",
        f"![samples]({picture})" if picture else "",
        "## Use",
        kind.usage(config.samples.inference_steps, prompt),
        "## Result",
        "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items()),
        "## Recipe",
        f"```yaml\n{_recipe(config)}```",
    ]
    return str(ModelCard("\n\n".join(part for part in parts if part) + "\n"))
