"""Loading what diffusers saves, building what a config describes, and refusing the rest in one line."""

import json
import shutil

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DConditionModel, UNet2DModel
from safetensors.torch import load_file, save_file

from finetune.config.inputs import ModelConfig
from finetune.core.errors import UserError
from finetune.models.load import load_kind
from finetune.models.unconditional import Unconditional
from harness.compare import unequal
from harness.configs import UNET

# The architecture of google/ddpm-celebahq-256 and its kin, with fewer channels and pixels.
CELEBAHQ = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 2,
    "block_out_channels": (8, 8, 16, 16, 32, 32),
    "down_block_types": ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
    "norm_num_groups": 4,
    "norm_eps": 1e-6,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "attention_head_dim": None,
}


@pytest.fixture(scope="module")
def celebahq(tmp_path_factory):
    """Pipelines of that architecture as they are found: safetensors, the old .bin, and the flat layout of the first."""
    torch.manual_seed(0)
    base = tmp_path_factory.mktemp("celebahq")
    pipeline = DDPMPipeline(UNet2DModel(**CELEBAHQ), DDPMScheduler(beta_end=0.01))
    pipeline.save_pretrained(base / "safetensors")
    pipeline.save_pretrained(base / "bin", safe_serialization=False)
    (base / "flat").mkdir()
    for part in ("unet", "scheduler"):
        shutil.copytree(base / "bin" / part, base / "flat", dirs_exist_ok=True)
    shutil.copy(base / "bin" / "model_index.json", base / "flat")
    return base, pipeline


def load(resolution=None, seed=0, **config) -> Unconditional:
    return load_kind(ModelConfig(**config), resolution, seed)


@pytest.mark.parametrize("layout", ["safetensors", "bin", "flat"])
def test_pretrained_pipelines_load_as_they_were_saved(celebahq, layout):
    base, pipeline = celebahq
    kind = load(pretrained=str(base / layout))
    assert unequal(pipeline.unet.state_dict(), kind.network.state_dict()) == []
    assert kind.network.training
    assert kind.noise_scheduler.config.beta_end == 0.01
    assert type(kind.noise_scheduler) is DDPMScheduler
    assert kind.image_format == (3, 32)


@pytest.mark.parametrize(
    ("sharded", "flat"), [({}, False), ({}, True), ({"max_shard_size": "20KB"}, False)], ids=["one", "flat", "sharded"]
)
def test_a_pipeline_that_has_only_a_variant_is_loaded_from_it(celebahq, tmp_path, sharded, flat):
    half = DDPMPipeline.from_pretrained(celebahq[0] / "safetensors", torch_dtype=torch.float16)
    half.save_pretrained(tmp_path, variant="fp16", **sharded)
    if flat:
        for part in ("unet", "scheduler"):
            shutil.copytree(tmp_path / part, tmp_path, dirs_exist_ok=True)
            shutil.rmtree(tmp_path / part)
    assert not list(tmp_path.rglob("diffusion_pytorch_model.safetensors"))
    found = load(pretrained=str(tmp_path)).trainable()
    assert unequal(found, {name: weight.float() for name, weight in half.unet.named_parameters()}) == []


def test_full_weights_are_preferred_to_a_variant(celebahq, tmp_path):
    shutil.copytree(celebahq[0] / "safetensors", tmp_path, dirs_exist_ok=True)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in celebahq[1].unet.state_dict().items()}
    save_file(zeros, tmp_path / "unet/diffusion_pytorch_model.fp16.safetensors")
    found = load(pretrained=str(tmp_path)).trainable()
    assert torch.equal(found["conv_in.weight"], celebahq[1].unet.conv_in.weight)


def test_half_precision_weights_become_float32(celebahq, tmp_path):
    pipeline = DDPMPipeline.from_pretrained(celebahq[0] / "safetensors", torch_dtype=torch.float16)
    pipeline.save_pretrained(tmp_path)
    assert {weight.dtype for weight in load(pretrained=str(tmp_path)).trainable().values()} == {torch.float32}


def test_config_overrides_the_pretrained_noise_scheduler(celebahq):
    kind = load(pretrained=str(celebahq[0] / "bin"), noise_scheduler={"prediction_type": "v_prediction"})
    assert kind.noise_scheduler.config.prediction_type == "v_prediction"
    assert kind.noise_scheduler.config.beta_end == 0.01


def test_initial_weights_depend_on_the_seed_alone():
    before = torch.get_rng_state()
    one, two, other = (load(unet=UNET, seed=seed).network.state_dict() for seed in (1, 1, 2))
    assert unequal(one, two) == []
    assert unequal(one, other) != []
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("resolution", "size"), [(None, 8), (16, 16)])
def test_the_trained_resolution_is_the_exported_one(resolution, size):
    kind = load(resolution, unet=UNET)
    assert kind.image_format == (1, size)
    assert kind.pipeline().unet.config.sample_size == size


def test_pixels_become_numbers_from_minus_one_to_one():
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 1, 3)
    clean, conditions = load(unet=UNET).inputs({"images": pixels, "noise": torch.zeros(1)})
    # 51 is a fifth of 255: -1 + 2 / 5
    torch.testing.assert_close(clean.flatten(), torch.tensor([-1.0, -0.6, 1.0]))
    assert conditions == {}


def test_an_example_is_a_batch_of_blank_images():
    batch = load(16, unet=UNET).example(3)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in batch.items()} == {
        "images": ((3, 1, 16, 16), torch.uint8),
        "noise": ((3, 1, 16, 16), torch.float32),
    }


def test_identity_is_json_and_changes_with_every_setting():
    def identity(**noise_scheduler):
        return json.loads(json.dumps(load(unet=UNET, noise_scheduler=noise_scheduler).identity()))

    assert identity() == identity()
    assert identity()["unet"]["block_out_channels"] == [8, 8]
    assert identity(beta_end=0.03) != identity()


@pytest.mark.parametrize(
    ("config", "resolution", "line"),
    [
        ({"unet": UNET}, 7, "data.resolution: found 7; expected a multiple of 2, since this UNet halves it 1 times"),
        ({"unet": {**UNET, "sample_size": None}}, None, "data.resolution: not given, and the model has no square"),
        ({"unet": {**UNET, "sample_size": [8, 16]}}, None, "data.resolution: not given, and the model has no square"),
        ({"unet": {**UNET, "out_channels": 2}}, None, "maps 1 channels to 2"),
        ({"unet": {**UNET, "num_class_embeds": 10}}, None, "found 10; leave it out, and set"),
        (
            {"unet": {**UNET, "norm_groups": 4}},
            None,
            "model.unet.norm_groups: UNet2DModel has no such setting; did you mean norm_num_groups?",
        ),
        ({"unet": {**UNET, "norm_num_groups": 3}}, None, "model.unet: UNet2DModel cannot be built from it"),
        ({"unet": {**UNET, "down_block_types": ["Nonsense"] * 2}}, None, "cannot be built from it: Nonsense does not"),
        (
            {"unet": UNET, "noise_scheduler": {"beta_strat": 1}},
            None,
            "model.noise_scheduler.beta_strat: DDPMScheduler has no such setting; did you mean beta_start?",
        ),
        (
            {"unet": UNET, "noise_scheduler": {"beta_schedule": "x"}},
            None,
            "model.noise_scheduler: DDPMScheduler cannot be built: x is not implemented",
        ),
        ({"unet": UNET, "noise_scheduler": {"prediction_type": "x0"}}, None, "found 'x0'; expected epsilon, v_pred"),
        # `no` is a text in YAML 1.2, which Python takes for true.
        *(
            ({"unet": UNET, "noise_scheduler": {key: value}}, None, f"model.noise_scheduler.{key}: found {problem}")
            for key, value, problem in [
                ("clip_sample", "no", "'no'; expected true or false"),
                ("thresholding", 0, "0; expected true or false"),
                ("beta_start", "1e-4", "'1e-4'; expected a number"),
                ("beta_end", True, "True; expected a number"),
                ("num_train_timesteps", 100.0, "100.0; expected a whole number"),
                ("num_train_timesteps", None, "None; expected a whole number"),
                ("trained_betas", 0.1, "0.1; expected a list or null"),
                ("beta_schedule", [1], "[1]; expected a text"),
            ]
        ),
        *(
            ({"unet": {**UNET, key: value}}, None, f"model.unet.{key}: found {problem}")
            for key, value, problem in [
                ("add_attention", "off", "'off'; expected true or false"),
                ("norm_eps", "1e-5", "'1e-5'; expected a number"),
                ("layers_per_block", True, "True; expected a whole number"),
                ("block_out_channels", 8, "8; expected a list"),
                ("sample_size", "8", "'8'; expected a whole number or a list or null"),
                ("mid_block_type", [], "[]; expected a text or null"),
            ]
        ),
    ],
)
def test_a_model_config_that_cannot_be_trained_is_refused(config, resolution, line):
    with pytest.raises(UserError) as failure:
        load(resolution, **config)
    (problem,) = failure.value.problems
    assert line in problem
    assert "\n" not in problem
    assert failure.value.exit_code == 2


def test_a_pretrained_network_of_classes_is_trained_by_class_alone(tmp_path):
    DDPMPipeline(UNet2DModel(**UNET, num_class_embeds=10), DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(UserError) as failure:
        load(pretrained=str(tmp_path))
    (problem,) = failure.value.problems
    expected = "model: the UNet is conditioned on 10 classes; set model.class_conditional=true and data.label_column"
    assert problem.startswith(expected)


def change_index(folder, part, value):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {part: value}))


def remove_every_other_weight(folder):
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    save_file(dict(list(load_file(file).items())[::2]), file)


DAMAGES = {
    "no index": (lambda folder: (folder / "model_index.json").unlink(), "model_index.json cannot be read"),
    "a conditional network": (
        lambda folder: change_index(folder, "unet", ["diffusers", UNet2DConditionModel.__name__]),
        "unet: ['diffusers', 'UNet2DConditionModel']",
    ),
    "a text encoder": (
        lambda folder: change_index(folder, "text_encoder", ["transformers", "CLIPTextModel"]),
        "text_encoder: ['transformers', 'CLIPTextModel']",
    ),
    "another noise scheduler": (
        lambda folder: change_index(folder, "scheduler", ["diffusers", "ScoreSdeVeScheduler"]),
        "found the noise scheduler diffusers.ScoreSdeVeScheduler",
    ),
    "half of the weights": (remove_every_other_weight, "missing keys"),
    "damaged weights": (
        lambda folder: (folder / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"not at all"),
        "the weights cannot be loaded safely",
    ),
    "no weights": (
        lambda folder: (folder / "unet/diffusion_pytorch_model.safetensors").unlink(),
        "the weights cannot be loaded safely",
    ),
    "a damaged scheduler config": (
        lambda folder: (folder / "scheduler/scheduler_config.json").write_text("[1"),
        "scheduler_config.json cannot be read",
    ),
    "a scheduler config without names": (
        lambda folder: (folder / "scheduler/scheduler_config.json").write_text("[1]"),
        "scheduler_config.json holds no mapping",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_folder_without_a_valid_pipeline_is_refused(celebahq, tmp_path, damage):
    act, line = DAMAGES[damage]
    folder = tmp_path / "pipeline"
    shutil.copytree(celebahq[0] / "safetensors", folder)
    act(folder)
    with pytest.raises(UserError) as failure:
        load(pretrained=str(folder))
    (problem,) = failure.value.problems
    assert problem.startswith(f"model.pretrained: {folder}")
    assert line in problem
    assert "\n" not in problem


def test_a_name_that_is_neither_a_folder_nor_on_the_hub_is_refused():
    with pytest.raises(UserError, match="'nobody/nothing' is not a local folder, and the hub cannot be reached"):
        load(pretrained="nobody/nothing")


def test_a_pipeline_with_a_weight_that_is_not_finite_is_refused(celebahq, tmp_path):
    shutil.copytree(celebahq[0] / "safetensors", tmp_path, dirs_exist_ok=True)
    file = tmp_path / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["mid_block.resnets.0.conv1.bias"][0] = torch.nan
    save_file(weights, file)
    with pytest.raises(UserError, match="the network's prediction is not finite at timestep 0 or 999, before any"):
        load(pretrained=str(tmp_path))
