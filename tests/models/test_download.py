"""Pipelines of a hub: what is fetched of a repository, by the hub's own client from a server on this machine."""

import shutil
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from harness.configs import ROOT, tiny_config, write_config, write_pictures
from harness.hub import serving
from harness.pipelines import save_pipeline
from harness.processes import finish, in_new_process

FOREIGN = [  # files of repositories that no component needs
    *("v1-5-pruned.ckpt", "v1-5-pruned.safetensors", "pipeline.py", "unet/modeling.py", "README.md", "preview.png"),
    *("unet/flax_model.msgpack", "unet/model.onnx", "controlnet/diffusion_pytorch_model.safetensors"),
]
CONFIGS = {
    *("model_index.json", "scheduler/scheduler_config.json", "unet/config.json", "vae/config.json"),
    *("text_encoder/config.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"),
}
WEIGHTS = {"unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"}


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return tmp_path_factory.mktemp("full") / "sd"


@pytest.fixture(scope="module")
def repositories(full, tmp_path_factory):
    """Of one pipeline: full weights and half ones side by side, half ones alone, half ones of the UNet alone."""
    save_pipeline(full)
    base = tmp_path_factory.mktemp("repositories")
    half = DiffusionPipeline.from_pretrained(full).to(torch.float16)
    half.save_pretrained(base / "half", variant="fp16")
    shutil.copytree(base / "half", base / "both")
    shutil.copytree(full, base / "both", dirs_exist_ok=True)
    shutil.copytree(base / "half", base / "mixed")
    shutil.copytree(full, base / "mixed", dirs_exist_ok=True)
    (base / "mixed/unet/diffusion_pytorch_model.safetensors").unlink()
    half.save_pretrained(base / "shards", variant="fp16", max_shard_size="20KB")
    (base / "both/unet/diffusion_pytorch_model.bin").write_bytes(b"a pickle, which safetensors make needless")
    for name in ("half", "both", "mixed", "shards"):
        for file in FOREIGN:
            (base / name / file).parent.mkdir(exist_ok=True)
            (base / name / file).write_bytes(b"raise SystemExit('was run')")
    return base


FETCH = """
import sys, time
from finetune.core.errors import UserError
from finetune.models.hub import pipeline_folder
time.sleep = lambda seconds: None  # between the client's retries
for name in map(str.strip, sys.stdin):
    try:
        print(pipeline_folder(name), flush=True)
    except UserError as error:
        print(*error.problems, flush=True)
"""


@contextmanager
def client(hub, home):
    """A client with a cache of its own, as a function from a pipeline's name to its folder or to what is wrong."""
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": ROOT}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}

    def ask(name):
        print(name, file=process.stdin, flush=True)
        return process.stdout.readline().strip()

    with subprocess.Popen([sys.executable, "-c", FETCH], env=environment, **pipes) as process:
        yield ask


def files_below(folder):
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


@pytest.mark.slow
def test_of_each_repository_the_files_are_fetched_that_are_loaded(repositories, tmp_path):
    names = {name: f"someone/{name}" for name in ("half", "both", "mixed")}
    with serving({id: repositories / name for name, id in names.items()}) as hub, client(hub, tmp_path) as fetch:
        folders = [fetch(id) for id in names.values()]
        hub.hangs_up = True
        dropped = fetch("someone/half")
        hub.stop()
        again = fetch("someone/half")
        shutil.rmtree(tmp_path / "hub")
        missing = fetch("someone/half")
    expected = {
        "half": {f"{file}.fp16.safetensors" for file in WEIGHTS},
        "both": {f"{file}.safetensors" for file in WEIGHTS},
        "mixed": {f"{file}.safetensors" for file in WEIGHTS if "unet" not in file}
        | {"unet/diffusion_pytorch_model.fp16.safetensors"},
    }
    for name, weights in expected.items():
        assert {file.removeprefix(f"someone/{name}/") for file in hub.fetched if f"/{name}/" in file} == (
            weights | CONFIGS
        )
    assert "and the download failed (" in dropped
    assert dropped.endswith("or set HF_HUB_OFFLINE=1 to use what was downloaded before")
    assert again == folders[0]
    assert "'someone/half' is not a local folder, and the hub cannot be reached" in missing


HALF = "half", "shards"


def train_each(folder):
    """train.py on each repository; what it printed."""
    return [finish("--config", folder / f"{name}.yaml", folder=folder).stdout for name in HALF]


@pytest.fixture(scope="module")
def trained(repositories, tmp_path_factory):
    """The folder of their runs, and what each printed. The hub's client reads where the hub is when it is imported."""
    base = tmp_path_factory.mktemp("trained")
    pictures = write_pictures(base / "pictures", 4, kind="text")
    for name in HALF:
        changes = {"model": {"pretrained": f"someone/{name}"}, "training__max_train_steps": 1, "ema__enabled": False}
        write_config(base / f"{name}.yaml", tiny_config(pictures, base / name, **changes))
    with serving({f"someone/{name}": repositories / name for name in HALF}) as hub:
        client = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_HOME": str(base / "home")}
        return base, dict(zip(HALF, in_new_process(train_each, base, **client), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", HALF)
def test_a_repository_that_has_only_half_weights_is_trained_and_the_plan_says_so(repositories, trained, name):
    base, printed = trained
    assert f"someone/{name} (its fp16 weights, as there are no others): 0." in printed[name]
    before = DiffusionPipeline.from_pretrained(repositories / name, variant="fp16").unet.state_dict()
    after = load_file(base / name / "pipeline/unet/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    # AdamW's first update moves a weight by about the learning rate, 1e-3
    moved = max(float((after[key] - tensor.float()).abs().max()) for key, tensor in before.items())
    assert moved == pytest.approx(1e-3, rel=0.05)
