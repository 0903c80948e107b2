"""A text-to-image pipeline from somebody else never runs code, whatever lies in its components' folders."""

import json
import shutil
from itertools import cycle

import pytest
from safetensors.torch import save_file

from harness.bombs import BOMBS, plain_pickle
from harness.configs import PIPELINES, of_kind, tiny_config, write_config, write_pictures
from harness.pipelines import add_checker
from harness.processes import run

KINDS = [*PIPELINES]  # text: Stable Diffusion; sdxl, and lora beside it: Stable Diffusion XL
WITH_WEIGHTS = {"text": ["unet", "vae", "text_encoder"]}
WITH_WEIGHTS |= {kind: [*WITH_WEIGHTS["text"], "text_encoder_2"] for kind in ("sdxl", "lora")}
NOT_LOADED = ["image_encoder", "safety_checker", "feature_extractor", "controlnet"]
FOREIGN = [
    *("pytorch_model.bin", "diffusion_pytorch_model.bin", "model.ckpt", "model.pt", "model.pkl", "model.pth"),
    *("adapter_model.bin", "pytorch_lora_weights.bin", "training_args.bin", "optimizer.pt", "scheduler.bin"),
    *("flax_model.msgpack", "vocab.pkl", "pipeline.py", "modeling.py", "tokenization.py", "__init__.py"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Pictures with captions, and a pipeline of each kind beside them."""
    base = tmp_path_factory.mktemp("base")
    pictures = write_pictures(base / "pictures", 8, kind="text")
    return pictures, {kind: of_kind(kind, pictures)["model"]["pretrained"] for kind in KINDS}


@pytest.fixture
def copied(folders, tmp_path):
    """Copies the pipeline of a kind, to be tampered with."""

    def copy(kind):
        return shutil.copytree(folders[1][kind], tmp_path / "pipeline")

    return copy


@pytest.fixture
def fine_tune(folders, tmp_path):
    def start(kind, pipeline, *overrides):
        changes = {**of_kind(kind, folders[0]), "training__max_train_steps": 1, "samples__count": 2}
        config = tiny_config(folders[0], tmp_path / "run", **changes)
        config["model"] |= {"pretrained": str(pipeline)}
        return run("--config", write_config(tmp_path / "config.yaml", config), *overrides, folder=tmp_path)

    return start


def assert_refused(outcome, tmp_path, start):
    assert outcome.returncode == 2, outcome.stderr
    assert outcome.error.startswith(start)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "bomb"), [*zip(KINDS, BOMBS, strict=True)])
def test_files_that_no_component_needs_are_not_opened(copied, fine_tune, tmp_path, kind, bomb):
    """In every folder, beside the files that are needed; a run to its end, samples and export."""
    pipeline, content = copied(kind), bomb(tmp_path / "ran")
    parts = [path for path in pipeline.iterdir() if path.is_dir()]
    for folder in (pipeline, *parts, *(pipeline / name for name in NOT_LOADED)):
        folder.mkdir(exist_ok=True)
        for name in FOREIGN:
            (folder / name).write_bytes(content)
    outcome = fine_tune(kind, pipeline)
    assert outcome.returncode == 0, outcome.stderr
    assert not (tmp_path / "ran").exists()
    exported = {path.name for path in (tmp_path / "run" / ("lora" if kind == "lora" else "pipeline")).rglob("*")}
    assert not exported & {*FOREIGN}


WEIGHTS = [(kind, part) for kind in KINDS for part in WITH_WEIGHTS[kind]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "part", "bomb"), [(*weights, bomb) for weights, bomb in zip(WEIGHTS, cycle(BOMBS), strict=False)]
)
def test_a_bomb_instead_of_safetensors_does_not_go_off(copied, fine_tune, tmp_path, kind, part, bomb):
    pipeline = copied(kind)
    (weights,) = (pipeline / part).glob("*.safetensors")
    weights.unlink()
    name = "pytorch_model.bin" if "text" in part else "diffusion_pytorch_model.bin"
    (pipeline / part / name).write_bytes(bomb(tmp_path / "ran"))
    start = f"model.pretrained: {pipeline / part}: the weights cannot be loaded safely ("
    assert_refused(fine_tune(kind, pipeline), tmp_path, start)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "sdxl"])
def test_a_bomb_in_place_of_a_file_does_not_go_off(copied, fine_tune, tmp_path, kind):
    pipeline = copied(kind)
    files = sorted(file for file in pipeline.rglob("*") if file.is_file())
    assert len(files) == {"text": 10, "sdxl": 14}[kind]
    for file in files:
        before = file.read_bytes()
        file.write_bytes(plain_pickle(tmp_path / "ran"))
        assert_refused(fine_tune(kind, pipeline), tmp_path, f"model.pretrained: {pipeline}")
        file.write_bytes(before)


def index(**changes):
    return "model_index.json", changes


EVIL = {"AutoModel": "modeling.Evil", "AutoTokenizer": ["tokenization.Evil", None]}
TRICKS = {  # a file, and what is added to it; then whether it is refused
    "a pipeline class of its own": (index(_class_name=["pipeline", "Evil"]), True),
    "a custom pipeline": (index(custom_pipeline=".", trust_remote_code=True), False),
    "a network of its own": (index(unet=["pipeline", "UNet2DConditionModel"]), False),  # the script chooses the class
    "another class of network": (index(unet=["pipeline", "Evil"]), True),
    "a text encoder of its own": (index(text_encoder=["modeling", "Evil"]), True),
    "a tokenizer of its own": (index(tokenizer=["tokenization", "Evil"]), True),
    "a scheduler of its own": (index(scheduler=["pipeline", "Evil"]), True),
    "a safety checker of its own": (index(safety_checker=["pipeline", "Evil"]), False),
    "an image encoder of its own": (index(image_encoder=["pipeline", "Evil"]), False),
    "one more component": (index(controlnet=["pipeline", "Evil"]), True),
    "auto_map of the UNet": (("unet/config.json", {"auto_map": EVIL, "trust_remote_code": True}), False),
    "auto_map of the VAE": (("vae/config.json", {"auto_map": EVIL, "_class_name": ["modeling", "Evil"]}), False),
    "auto_map of the text encoder": (
        ("text_encoder/config.json", {"auto_map": EVIL, "trust_remote_code": True, "architectures": ["Evil"]}),
        False,
    ),
    "auto_map of the tokenizer": (
        ("tokenizer/tokenizer_config.json", {"auto_map": EVIL, "trust_remote_code": True, "tokenizer_class": "Evil"}),
        False,
    ),
    "a scheduler's own class": (("scheduler/scheduler_config.json", {"_class_name": "pipeline.Evil"}), True),
    "a quantizer of the UNet": (("unet/config.json", {"quantization_config": {"quant_method": "pipeline.Evil"}}), True),
    "a quantizer of the text encoder": (
        ("text_encoder/config.json", {"quantization_config": {"quant_method": "modeling.Evil"}}),
        True,
    ),
    "attention by a kernel of the hub": (
        ("text_encoder/config.json", {"_attn_implementation": "evil/kernel", "attn_implementation": "evil/kernel"}),
        True,
    ),
    "the same, deeper": (("text_encoder/config.json", {"text_config": {"attn_implementation": "evil/kernel"}}), True),
}


@pytest.mark.slow
@pytest.mark.parametrize("trick", TRICKS)
def test_code_that_a_pipeline_names_does_not_run(copied, fine_tune, tmp_path, trick):
    (name, more), refused = TRICKS[trick]
    found = "found _attn_implementation" if "kernel" in trick else "found attn_impl" if "deeper" in trick else ""
    pipeline = copied("text")
    code = f"import os; os.mkdir({str(tmp_path / 'ran')!r})\nclass Evil: pass\nUNet2DConditionModel = Evil\n"
    for folder in (pipeline, *(path for path in pipeline.iterdir() if path.is_dir())):
        for file in ("pipeline.py", "modeling.py", "tokenization.py"):
            (folder / file).write_text(code)
    content = json.loads((pipeline / name).read_text())
    (pipeline / name).write_text(json.dumps(content | more))
    outcome = fine_tune("text", pipeline)
    assert not (tmp_path / "ran").exists()
    if refused:
        assert_refused(outcome, tmp_path, f"model.pretrained: {pipeline}")
        assert found in outcome.error  # by what it says, not because a library for it is missing here
    else:
        assert outcome.returncode == 0, outcome.stderr


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("content", ["a bomb", "weights"])
def test_an_adapter_in_a_component_is_refused(copied, fine_tune, tmp_path, kind, content):
    """transformers would load it, and nothing would say that the captions are read otherwise."""
    pipeline = copied(kind)
    part = pipeline / ("text_encoder" if kind == "text" else "text_encoder_2")
    settings = {"peft_type": "LORA", "r": 1, "target_modules": ["q_proj"], "base_model_name_or_path": "."}
    (part / "adapter_config.json").write_text(json.dumps(settings))
    if content == "a bomb":
        (part / "adapter_model.bin").write_bytes(plain_pickle(tmp_path / "ran"))
    else:
        save_file({}, part / "adapter_model.safetensors")
    assert_refused(
        fine_tune(kind, pipeline), tmp_path, f"model.pretrained: {part}: found an adapter beside the weights"
    )


@pytest.fixture
def pipeline(copied):
    """One that comes with what looks for unsafe pictures."""
    return add_checker(copied("text"))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "bomb"), [*(("text", bomb) for bomb in (None, *BOMBS)), ("lora", plain_pickle)])
def test_a_bomb_as_safety_checker_does_not_go_off(pipeline, fine_tune, tmp_path, kind, bomb):
    """It is part of what a full run exports, and so loaded before the run begins; an adapter's export has none."""
    if bomb is not None:
        (pipeline / "safety_checker/model.safetensors").unlink()
        (pipeline / "safety_checker/pytorch_model.bin").write_bytes(bomb(tmp_path / "ran"))
    outcome = fine_tune(kind, pipeline)
    if bomb is not None and kind == "text":
        assert_refused(outcome, tmp_path, f"model.pretrained: {pipeline / 'safety_checker'}: the weights cannot be")
        return
    assert outcome.returncode == 0, outcome.stderr
    assert not (tmp_path / "ran").exists()
    if kind == "text":
        assert (tmp_path / "run/pipeline/safety_checker/model.safetensors").exists()


def test_a_feature_extractor_that_cannot_be_read_is_refused(pipeline, fine_tune, tmp_path):
    (pipeline / "feature_extractor/preprocessor_config.json").write_bytes(plain_pickle(tmp_path / "ran"))
    start = f"model.pretrained: {pipeline / 'feature_extractor'}: the feature extractor cannot be loaded ("
    assert_refused(fine_tune("text", pipeline), tmp_path, start)
