"""Mistakes in the config of a text-to-image model or an adapter: one line, exit code 2, nothing written."""

import shutil

import pytest

from harness.configs import ROOT, of_kind, tiny_config, write_config, write_pictures
from harness.pipelines import save_pipeline
from harness.processes import run

LORA, PROMPTS = "command line: model.lora.", "only a model conditioned on captions (text-to-image) takes it"
TABLE = [  # a kind of model, what is set, and how the line begins
    ("text", "data.caption_column=words", "data.caption_column: found 'words'; expected a column of texts or of lists"),
    ("text", "data.label_column=label", "data.label_column: found 'label'; expected a column of "),
    ("text", "data.caption=3", "command line: data.caption: found 3; expected a line of text or null"),
    ("text", "data.resolution=10", "data.resolution: found 10; expected a multiple of 4, since the VAE makes one"),
    ("text", "model.class_conditional=true", "model.class_conditional: found true with "),
    (
        "text",
        "model.noise_scheduler.prediction_type=x0",
        "model.noise_scheduler.prediction_type: found 'x0'; exp",
    ),
    ("text", "model.noise_scheduler.nope=1", "model.noise_scheduler.nope: DDPMScheduler has no such setting"),
    ("text", "training.noise_offset=-1", "command line: training.noise_offset: found -1; expected a number, 0 or more"),
    ("text", "training.condition_dropout=1", "command line: training.condition_dropout: found 1; expected a number"),
    ("text", "samples.prompts=[]", "command line: samples.prompts: found []; expected a list of texts or null"),
    ("text", "samples.prompts=a cat", "command line: samples.prompts: found 'a cat'; expected a list of texts or null"),
    ("text", "samples.prompts=[a, '']", "command line: samples.prompts: found ['a', '']; expected a list of texts"),
    ("text", "samples.labels=[cat]", "samples.labels: found ['cat']; only a model conditioned on classes"),
    ("text", "samples.negative_prompt=3", "command line: samples.negative_prompt: found 3; expected a line of text"),
    ("text", "samples.guidance_scale=[]", "command line: samples.guidance_scale: found []; expected a number, 0 or"),
    ("lora", "model.lora.rank=0", f"{LORA}rank: found 0; expected a whole number above 0"),
    ("lora", "model.lora.rank=1.5", f"{LORA}rank: found 1.5; expected a whole number above 0"),
    ("lora", "model.lora.alpha=0", f"{LORA}alpha: found 0; expected a number above 0 or null"),
    ("lora", "model.lora.alpha=1e39", f"{LORA}alpha: found 1e+39; expected a number that float32 can hold, from "),
    (
        "lora",
        "model.lora.alpha=1e-46",
        f"{LORA}alpha: found 1e-46; expected a number that float32 can hold, from 1e-37",
    ),
    ("lora", "model.lora.dropout=0.1", f"{LORA}dropout: found 0.1; expected 0: it draws from a global generator"),
    ("lora", "model.lora.base_dtype=int8", f"{LORA}base_dtype: found 'int8'; expected float32 or bfloat16 or float16"),
    ("lora", "model.lora.ranks=3", f"{LORA}ranks: unknown key; did you mean model.lora.rank?"),
    ("lora", "model.lora=true", "command line: model.lora: found true; expected a mapping with rank, alpha, "),
    ("lora", "model.lora.target_modules=[]", f"{LORA}target_modules: found []; expected a list of names"),
    ("lora", "model.lora.target_modules=attention", f"{LORA}target_modules: found 'attention'; expected a list of"),
    ("lora", "model.lora.target_modules=[to_w]", "model.lora.target_modules: found 'to_w', which no layer of the UNet"),
    ("lora", "model.lora.target_modules=[norm1]", "model.lora.target_modules: found 'norm1', which is a "),
    ("lora", f"model.pretrained={ROOT}/configs/digits-base", "model.lora: found it with "),
    ("lora", "data.caption_column=[text]", "command line: data.caption_column: found ['text']; expected a line of "),
    ("unconditional", "model.lora.rank=4", "FILE and command line: model.lora: found with model.unet; only valid with"),
    ("unconditional", "samples.prompts=[a cat]", f"samples.prompts: found ['a cat']; {PROMPTS}"),
    ("unconditional", "samples.negative_prompt=ugly", f"samples.negative_prompt: found 'ugly'; {PROMPTS}"),
    ("unconditional", "samples.guidance_scale=3", "samples.guidance_scale: found 3.0; only a model conditioned on"),
    ("unconditional", "data.caption=a cat", "data.caption: found 'a cat'; only valid for a text-to-image model"),
    (
        "unconditional",
        "data.caption_column=text",
        "data.caption_column: found 'text'; only valid for a text-to-image",
    ),
    ("classes", "samples.prompts=[cat]", f"samples.prompts: found ['cat']; {PROMPTS}"),
    ("text", "model.pretrained=/dev/null", "model.pretrained: found the file /dev/null; expected the folder of a pipe"),
    ("text", "model.pretrained=./no/such", "model.pretrained: found nothing at ./no/such; expected the folder of a "),
    ("text", f"model.pretrained={ROOT}/docs", f"model.pretrained: {ROOT}/docs: model_index.json cannot be read ("),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Pictures for each kind of model, and pipelines beside them."""
    base = tmp_path_factory.mktemp("base")
    for kind in ("unconditional", "classes", "text", "lora"):
        of_kind(kind, write_pictures(base / kind, 4, kind=kind))
    return base


def start(base, tmp_path, kind, *overrides, **changes):
    config = tiny_config(base / kind, tmp_path / "run", **of_kind(kind, base / kind) | changes)
    return run("--config", write_config(tmp_path / "config.yaml", config), *overrides, folder=tmp_path)


def assert_one_line(outcome, tmp_path, line):
    assert outcome.returncode == 2, outcome.stderr
    assert outcome.error.startswith(line.replace("FILE", str(tmp_path / "config.yaml")))
    assert "\n" not in outcome.error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("kind", "override", "line"), TABLE)
def test_a_mistake_is_one_line(base, tmp_path, kind, override, line):
    assert_one_line(start(base, tmp_path, kind, override), tmp_path, line)


@pytest.mark.parametrize("kind", ["text", "lora"])
def test_pictures_without_captions_are_named(base, tmp_path, kind):
    pictures = shutil.copytree(base / kind, tmp_path / "pictures")
    (pictures / "0001.txt").unlink()
    (pictures / "0003.txt").write_text(" \n")
    outcome = start(base, tmp_path, kind, f"data.source={pictures}")
    assert outcome.returncode == 2
    assert outcome.errors[0].startswith("data.caption_column: found no caption in the files beside the pictures for 2 ")
    assert outcome.errors[1:] == ["0001.png", "0003.png"]
    assert not (tmp_path / "run").exists()


def test_a_caption_and_a_column_of_them_contradict_each_other(base, tmp_path):
    outcome = start(base, tmp_path, "text", "data.caption=a", "data.caption_column=b")
    assert_one_line(outcome, tmp_path, "command line: data.caption: found 'a' and a caption_column; expected one of")


@pytest.mark.slow
def test_an_adapter_is_no_pipeline(base, tmp_path):
    """The folder that an adapter's run exports, given as the model to start from."""
    finished = start(base, tmp_path / "first", "lora", "training.max_train_steps=1")
    assert finished.returncode == 0, finished.stderr
    adapter = tmp_path / "first/run/lora"
    outcome = start(base, tmp_path, "lora", f"model.pretrained={adapter}")
    line = f"model.pretrained: {adapter}: found the adapter pytorch_lora_weights.safetensors; expected the pipeline "
    assert_one_line(outcome, tmp_path, line)


def test_a_pipeline_of_another_family_is_named(base, tmp_path):
    folder = shutil.copytree(save_pipeline(base / "other"), tmp_path / "other")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace('"StableDiffusionPipeline"', '"FluxPipeline"'))
    outcome = start(base, tmp_path, "text", f"model.pretrained={folder}")
    assert_one_line(outcome, tmp_path, f"model.pretrained: {folder}: found a FluxPipeline of ")
