"""Loading what diffusers saves, building what a config describes, refusing the rest in one line, averaging, export."""

import json
import shutil

import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler, UNet2DConditionModel, UNet2DModel

from finetune import model
from finetune.config import EMAConfig, ModelConfig
from finetune.errors import UserError
from tiny import UNET

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


def load(resolution=None, seed=0, **config):
    return model.load_model(ModelConfig(**config), resolution, seed)


@pytest.mark.parametrize("layout", ["safetensors", "bin", "flat"])
def test_pretrained_pipelines_load_as_they_were_saved(celebahq, layout):
    base, pipeline = celebahq
    unet, noise_scheduler = load(pretrained=str(base / layout))
    for name, tensor in pipeline.unet.state_dict().items():
        assert torch.equal(unet.state_dict()[name], tensor), name
    assert unet.training
    assert noise_scheduler.config.beta_end == 0.01
    assert type(noise_scheduler) is DDPMScheduler
    assert unet.config.sample_size == 32


def test_half_precision_weights_become_float32(celebahq, tmp_path):
    pipeline = DDPMPipeline.from_pretrained(celebahq[0] / "safetensors", torch_dtype=torch.float16)
    pipeline.save_pretrained(tmp_path)
    unet, _ = load(pretrained=str(tmp_path))
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.float32}


def test_noise_scheduler_overrides(celebahq):
    _, noise_scheduler = load(pretrained=str(celebahq[0] / "bin"), noise_scheduler={"prediction_type": "v_prediction"})
    assert noise_scheduler.config.prediction_type == "v_prediction"
    assert noise_scheduler.config.beta_end == 0.01


def test_from_scratch_is_a_function_of_the_seed():
    before = torch.get_rng_state()
    one, two, other = (load(unet=UNET, seed=seed)[0].state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(before, torch.get_rng_state())


def test_the_trained_resolution_is_the_pipelines():
    assert load(unet=UNET)[0].config.sample_size == 8
    assert load(16, unet=UNET)[0].config.sample_size == 16


@pytest.mark.parametrize(
    ("config", "resolution", "line"),
    [
        ({"unet": UNET}, 7, "data.resolution: found 7; expected a multiple of 2, since this UNet halves it 1 times"),
        ({"unet": {**UNET, "sample_size": None}}, None, "data.resolution: not given, and the model has no square"),
        ({"unet": {**UNET, "sample_size": [8, 16]}}, None, "data.resolution: not given, and the model has no square"),
        ({"unet": {**UNET, "out_channels": 2}}, None, "maps 1 channels to 2"),
        ({"unet": {**UNET, "num_class_embeds": 10}}, None, "conditioned on classes"),
        (
            {"unet": {**UNET, "norm_groups": 4}},
            None,
            "model.unet.norm_groups: UNet2DModel has no such setting; did you",
        ),
        ({"unet": {**UNET, "norm_num_groups": 3}}, None, "model.unet: UNet2DModel cannot be built from it"),
        ({"unet": {**UNET, "down_block_types": ["Nonsense"] * 2}}, None, "cannot be built from it: Nonsense does not"),
        (
            {"unet": UNET, "noise_scheduler": {"beta_strat": 1}},
            None,
            "noise_scheduler.beta_strat: DDPMScheduler has no",
        ),
        (
            {"unet": UNET, "noise_scheduler": {"beta_schedule": "x"}},
            None,
            "model.noise_scheduler: DDPMScheduler cannot",
        ),
        ({"unet": UNET, "noise_scheduler": {"prediction_type": "x0"}}, None, "found 'x0'; expected epsilon, v_pred"),
    ],
)
def test_what_cannot_be_trained_is_said_in_one_line(config, resolution, line):
    with pytest.raises(UserError) as failure:
        load(resolution, **config)
    assert len(failure.value.problems) == 1
    assert "\n" not in str(failure.value)
    assert line in str(failure.value)
    assert failure.value.exit_code == 2


def break_nothing_there(folder):
    (folder / "model_index.json").unlink()


def break_other_network(folder):
    index = json.loads((folder / "model_index.json").read_text())
    index["unet"] = ["diffusers", UNet2DConditionModel.__name__]
    (folder / "model_index.json").write_text(json.dumps(index))


def break_text_encoder(folder):
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder"] = ["transformers", "CLIPTextModel"]
    (folder / "model_index.json").write_text(json.dumps(index))


def break_scheduler(folder):
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "ScoreSdeVeScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))


def break_half_the_weights(folder):
    from safetensors.torch import load_file, save_file

    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file(dict(list(tensors.items())[::2]), file)


def break_weights(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"not at all")


def break_no_weights(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()


def break_scheduler_config(folder):
    (folder / "scheduler" / "scheduler_config.json").write_text("[1")


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (break_nothing_there, "model_index.json cannot be read"),
        (break_other_network, "unet: ['diffusers', 'UNet2DConditionModel']"),
        (break_text_encoder, "text_encoder: ['transformers', 'CLIPTextModel']"),
        (break_scheduler, "found the scheduler diffusers.ScoreSdeVeScheduler"),
        (break_half_the_weights, "missing keys"),
        (break_weights, "the weights cannot be loaded safely"),
        (break_no_weights, "the weights cannot be loaded safely"),
        (break_scheduler_config, "scheduler_config.json cannot be read"),
    ],
)
def test_a_folder_that_is_no_unet2d_pipeline(celebahq, tmp_path, damage, line):
    folder = tmp_path / "pipeline"
    shutil.copytree(celebahq[0] / "safetensors", folder)
    damage(folder)
    with pytest.raises(UserError) as failure:
        load(pretrained=str(folder))
    assert len(failure.value.problems) == 1
    assert str(failure.value).startswith(f"model.pretrained: {folder}")
    assert line in str(failure.value)
    assert "\n" not in str(failure.value)


def test_neither_a_folder_nor_on_the_hub():
    with pytest.raises(UserError, match="is no folder here, and the hub did not give it"):
        load(pretrained="nobody/nothing")


def test_the_average_warms_up_as_the_config_says():
    """decay(u) = min(1 - (1 + u)^-power, decay), counted from 0: the first update copies."""
    unet, _ = load(unet=UNET)
    ema = model.make_ema(unet, EMAConfig(decay=0.5, power=0.75))
    weight, expected = next(unet.parameters()), None
    for update in range(6):
        with torch.no_grad():
            weight.add_(1.0)
        ema.step(unet.parameters())
        decay = min(1 - (1 + update) ** -0.75, 0.5)
        current = weight.detach().double()
        expected = current if expected is None else decay * expected + (1 - decay) * current
    torch.testing.assert_close(ema.shadow_params[0].double(), expected, rtol=1e-6, atol=0)
    assert model.make_ema(unet, EMAConfig(enabled=False)) is None


def test_averaged_weights_are_there_inside_and_gone_after():
    unet, _ = load(unet=UNET)
    ema = model.make_ema(unet, EMAConfig())
    ema.step(unet.parameters())
    with torch.no_grad():
        next(unet.parameters()).add_(1.0)
    own = next(unet.parameters()).detach().clone()

    def fail_inside():
        with model.averaged_weights(unet, ema):
            torch.testing.assert_close(next(unet.parameters()).detach(), own - 1.0)
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert torch.equal(next(unet.parameters()), own)


def test_layers_that_break_split_invariance_are_found():
    assert model.split_dependent_layers(load(unet=UNET)[0]) == []
    found = model.split_dependent_layers(load(unet={**UNET, "dropout": 0.1})[0])
    assert found
    assert all("(Dropout)" in layer for layer in found)
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1), torch.nn.BatchNorm2d(1))
    assert model.split_dependent_layers(network) == ["1 (BatchNorm2d)"]


@pytest.mark.parametrize("pipeline_class", [DDPMPipeline, DDIMPipeline])
def test_an_exported_pipeline_generates(tmp_path, pipeline_class):
    unet, noise_scheduler = load(16, unet=UNET)
    folder = tmp_path / "pipeline"
    folder.mkdir()
    (folder / "of a run before").write_text("")
    model.save_pipeline(unet, noise_scheduler, folder, "# card", [])
    assert not (folder / "of a run before").exists()
    assert (folder / "README.md").read_text() == "# card"
    pipeline = pipeline_class.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=2, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 16, 16, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]


def test_an_upload_goes_where_the_config_says(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(model, "create_repo", lambda repository, exist_ok: calls.append((repository, exist_ok)))
    monkeypatch.setattr(model, "upload_folder", lambda **arguments: calls.append(arguments))
    assert model.push(tmp_path, "somebody/digits") == "https://huggingface.co/somebody/digits"
    assert calls[0] == ("somebody/digits", True)
    assert (calls[1]["repo_id"], calls[1]["folder_path"]) == ("somebody/digits", tmp_path)


def test_an_upload_that_fails_says_what_to_do(tmp_path):
    with pytest.raises(
        UserError, match=r"export.push_to_hub: somebody/digits: the hub did not take .*hf auth"
    ) as failure:
        model.push(tmp_path, "somebody/digits")
    assert failure.value.exit_code == 1
    assert "\n" not in str(failure.value)
