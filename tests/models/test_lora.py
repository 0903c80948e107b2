"""Adapters: drawn from the seed and their names, nothing at first, float32 beside any base, and read by others."""

import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from finetune.config.inputs import LoRAConfig, ModelConfig
from finetune.core.errors import UserError
from finetune.models import lora_files
from finetune.models.load import load_kind, outline_kind
from finetune.models.lora import GROUPS, initial_weight
from finetune.training.memory import state_bytes
from harness.compare import unequal
from harness.configs import ROOT
from harness.pipelines import save_pipeline

EVERYTHING = [*GROUPS]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("pipelines")
    return {"sd": save_pipeline(base / "sd"), "sdxl": save_pipeline(base / "sdxl", xl=True)}


@pytest.fixture(params=["sd", "sdxl"])
def folder(request, folders):
    return folders[request.param]


def load(folder, seed=0, **options):
    return load_kind(ModelConfig(pretrained=str(folder), lora={"rank": 2, **options}), None, seed)


def output(network, kind):
    clean, conditions = kind.inputs(kind.example(2))
    noisy = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    network.eval()
    with torch.no_grad():
        return network(noisy, torch.tensor([1, 50]), **conditions).sample


def trained(kind, scale=0.3):
    """Adapters as after a training that did not spare them."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in kind.trainable().values():
            weight.copy_(scale * torch.randn(weight.shape, generator=generator))
    return kind


def test_an_untrained_adapter_changes_no_bit(folder):
    kind, plain = load(folder), load_kind(ModelConfig(pretrained=folder), None, 0)
    assert torch.equal(output(kind.network, kind), output(plain.network, plain))
    assert not torch.equal(output(trained(kind).network, kind), output(plain.network, plain))


def test_only_adapters_are_trained_and_attention_has_them_by_default(folder):
    kind = load(folder)
    names = kind.trainable()
    assert {name.rsplit(".", 2)[0].rsplit(".", 1)[1] for name in names} == {"lora_A", "lora_B"}
    layers = {name.split(".lora_")[0] for name in names}
    assert layers == {
        n for n, _ in kind.network.named_modules() if n.endswith(tuple(f".{e}" for e in GROUPS["attention"]))
    }
    # a rank of 2 beside a layer of a inputs and b outputs: 2 (a + b)
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    sizes = [names[f"{layer}.lora_{part}.default.weight"].shape for part in "AB"]
    width = 16 if kind.folder.sized else 8
    assert sizes == [(2, width), (8, 2)]


def test_weights_depend_on_seed_and_name_alone(folder):
    """Neither on the global generator, which they leave where it was, nor on what else has an adapter."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = load(folder).trainable()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    more = load(folder, target_modules=EVERYTHING).trainable()
    assert one.keys() < more.keys()
    assert unequal(one, {name: more[name] for name in one}) == []
    other = load(folder, seed=1).trainable()
    names = sorted(name for name in one if "lora_A" in name)
    assert unequal(one, other) == names  # the others are zero
    assert len({one[name].flatten()[0].item() for name in names}) == len(names)
    assert all((one[name] == 0).all() for name in one if "lora_B" in name)


@given(st.integers(1, 50), st.integers(1, 5), st.sampled_from([(), (3, 3)]))
def test_a_is_uniform_within_one_over_the_root_of_its_inputs(inputs, rank, kernel):
    weight = initial_weight(0, "a.lora_A.default.weight", torch.Size([rank, inputs, *kernel]))
    bound = (inputs * (9 if kernel else 1)) ** -0.5
    assert weight.abs().max() <= bound
    if weight.numel() > 200:  # uniform in [-b, b]: standard deviation b / sqrt 3
        assert float(weight.std()) == pytest.approx(bound / 3**0.5, rel=0.25)


@pytest.mark.parametrize("targets", [["attention"], ["feed_forward"], ["convolutions"], EVERYTHING, ["to_q", "conv1"]])
@pytest.mark.parametrize("alpha", [None, 3.0])
def test_both_files_do_what_the_trained_network_does(folder, tmp_path, targets, alpha):
    """Loaded as their users do, into the pipeline as it was, in every bit, with an alpha that is not the rank."""
    kind = trained(load(folder, target_modules=targets, alpha=alpha))
    kind.save(tmp_path / "lora")
    expected = output(kind.network, kind)
    for name in (None, lora_files.KOHYA):
        pipeline = DiffusionPipeline.from_pretrained(folder)
        pipeline.load_lora_weights(tmp_path / "lora", **({"weight_name": name} if name else {}))
        assert torch.equal(output(pipeline.unet, kind), expected)
    kohya = load_file(tmp_path / "lora" / lora_files.KOHYA)
    alphas = {name: tensor.item() for name, tensor in kohya.items() if name.endswith(".alpha")}
    assert {*alphas.values()} == {2.0 if alpha is None else alpha}
    assert 3 * len(alphas) == len(kohya)
    assert all(name.startswith("lora_unet_") for name in kohya)


def test_an_adapter_keeps_its_names_of_kohya(folders, tmp_path):
    kind = trained(load(folders["sd"]))
    kind.save(tmp_path / "lora")
    names = load_file(tmp_path / "lora" / lora_files.KOHYA).keys()
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert {f"{layer}.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")} <= names


def test_the_layers_that_are_named_in_the_file_have_an_order(folders, tmp_path):
    """peft holds them as a set, in whose own order the same adapter would be other bytes in each process."""
    kind = trained(load(folders["sd"], target_modules=EVERYTHING))
    kind.save(tmp_path / "lora")
    with safe_open(tmp_path / "lora" / lora_files.DIFFUSERS, "pt") as file:
        named = json.loads(file.metadata()["lora_adapter_metadata"])["unet.target_modules"]
    assert named == sorted({ending for group in GROUPS.values() for ending in group})


@pytest.mark.parametrize("file", [lora_files.DIFFUSERS, lora_files.KOHYA])
@pytest.mark.parametrize("fault", ["a bit", "alpha", "a layer"])
def test_a_file_that_does_something_else_is_found(folders, tmp_path, monkeypatch, file, fault):
    kind, write = trained(load(folders["sd"], alpha=3.0)), lora_files.write

    def broken(folder, *arguments):
        write(folder, *arguments)
        weights = load_file(folder / file)
        metadata = {"format": "pt"}
        up = next(name for name in weights if "lora_B" in name or "lora_up" in name)
        if fault == "a bit":
            weights[up] = weights[up] * (1 + 2**-20)
        elif fault == "a layer":
            layer = up.split(".lora")[0] + "."
            weights = {name: tensor for name, tensor in weights.items() if not name.startswith(layer)}
        elif file == lora_files.KOHYA:
            weights = {name: tensor for name, tensor in weights.items() if not name.endswith(".alpha")}
        if file == lora_files.DIFFUSERS and fault != "alpha":
            metadata = safe_open(folder / file, "pt").metadata()
        save_file(weights, folder / file, metadata)

    monkeypatch.setattr(lora_files, "write", broken)
    with pytest.raises(
        UserError, match=r"loaded afresh, the adapter's output is .* from the trained network's"
    ) as caught:
        kind.save(tmp_path / "lora")
    assert file in str(caught.value)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_base_in_half_precision_has_adapters_in_full(folder, tmp_path, dtype):
    kind = load(folder, base_dtype=dtype, target_modules=EVERYTHING, alpha=3.0)
    named = dict(kind.network.named_parameters())
    assert {weight.dtype for weight in kind.trainable().values()} == {torch.float32}
    assert {named[name].dtype for name in named.keys() - kind.trainable().keys()} == {getattr(torch, dtype)}
    predicted = output(kind.network, kind)
    assert predicted.dtype == torch.float32
    full = load(folder)
    # 8 or 11 bits of a number are kept: of outputs around 1, so many layers on, a few hundredths
    assert 0 < (predicted - output(full.network, full)).abs().max() < 0.1
    kind.network.train()
    clean, conditions = kind.inputs(kind.example(2))
    kind.network(clean, torch.tensor([1, 50]), **conditions).sample.square().mean().backward()
    assert {weight.grad.dtype for weight in kind.trainable().values()} == {torch.float32}
    assert all(named[name].grad is None for name in named.keys() - kind.trainable().keys())
    trained(kind).save(tmp_path / "lora")  # verified: raises where the files do something else


def test_shapes_without_memory_have_the_same_adapters(folder):
    kind = load(folder, target_modules=EVERYTHING)
    shapes = kind.without_memory()
    assert {name: weight.shape for name, weight in shapes.named_parameters()} == {
        name: weight.shape for name, weight in kind.network.named_parameters()
    }
    assert {name for name, weight in shapes.named_parameters() if weight.requires_grad} == kind.trainable().keys()
    assert all(weight.is_meta for weight in shapes.parameters())


def test_the_weights_of_the_base_are_part_of_its_identity(folders, tmp_path):
    folder = shutil.copytree(folders["sd"], tmp_path / "other")
    before = load(folder).identity()
    assert before == load(folders["sd"]).identity()
    assert before["lora"]["alpha"] == 2
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    weights = bytearray(file.read_bytes())
    weights[-1] ^= 1
    file.write_bytes(weights)
    assert load(folder).identity()["base"] != before["base"]
    assert load(folders["sd"], alpha=3.0).identity()["lora"] != before["lora"]
    json.dumps(before)


@pytest.mark.parametrize(
    ("targets", "line"),
    [
        (
            ["attention", "to_w"],
            "model.lora.target_modules: found 'to_w', which no layer of the UNet is called; expected",
        ),
        (
            ["norm1"],
            "model.lora.target_modules: found 'norm1', which is a LayerNorm in down_blocks.0.attentions.0."
            "transformer_blocks.0.norm1; expected",
        ),
        (
            ["to_out"],
            "model.lora.target_modules: found 'to_out', which is a ModuleList in down_blocks.0.attentions.0."
            "transformer_blocks.0.attn1.to_out; expected attention, feed_forward, convolutions or endings of the names "
            "of linear layers and convolutions, such as to_out.0",
        ),
        (["to_q", "mid_block"], "model.lora.target_modules: found 'mid_block', which is a UNetMidBlock2DCrossAttn in "),
    ],
)
def test_targets_that_cannot_have_adapters_are_refused(folder, targets, line):
    with pytest.raises(UserError) as caught:
        load(folder, target_modules=targets)
    assert caught.value.problems[0].startswith(line)


def test_layers_that_the_file_of_kohya_does_not_tell_apart_are_refused_before_the_training(folders):
    """SDXL's add_embedding has linear_1 and linear_2, of which diffusers reads one name, add.embedding.linear."""
    with pytest.raises(UserError) as caught:
        load(folders["sdxl"], target_modules=["linear_1", "add_embedding.linear_2"])
    assert caught.value.problems == (
        "model.lora.target_modules: found add_embedding.linear_1, add_embedding.linear_2, which cannot be told apart "
        "in an adapter's file of kohya's format; expected other layers",
    )


def test_every_other_layer_that_is_linear_or_a_convolution_is_exported(folder, tmp_path):
    layers = dict(load_kind(ModelConfig(pretrained=folder), None, 0).network.named_modules())
    kinds = torch.nn.Linear | torch.nn.Conv2d
    names = [name for name, layer in layers.items() if isinstance(layer, kinds) and "add_embedding" not in name]
    kind = trained(load(folder, target_modules=names), scale=0.05)
    assert len(kind.trainable()) == 2 * len(names)
    kind.save(tmp_path / "lora")  # verified


def test_a_base_with_adapters_among_its_weights_is_refused_with_what_to_do(folder, tmp_path, capfd):
    """As save_pretrained writes a pipeline that has loaded one; fused into its weights, it is taken."""
    trained(load(folder)).save(tmp_path / "lora")
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(tmp_path / "lora")
    pipeline.save_pretrained(tmp_path / "with")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(tmp_path / "fused")
    capfd.readouterr()
    with pytest.raises(UserError) as caught:
        load(tmp_path / "with")
    assert caught.value.problems == (
        f"model.pretrained: {tmp_path / 'with'}/unet: found adapters (LoRA) among the weights; expected a pipeline "
        "without: load it with diffusers, call fuse_lora() and unload_lora_weights(), and save it again",
    )
    assert "weights" not in capfd.readouterr().err  # diffusers lists a hundred that are missing
    load(tmp_path / "fused")


def test_adapters_are_for_text_to_image_models():
    base = ROOT / "configs/digits-base"
    for folder, found in ((base, "a DDPMPipeline"), (base / "unet", "which is no pipeline")):
        with pytest.raises(UserError) as refused:
            load(folder)
        assert refused.value.problems == (
            f"model.lora: found it with {folder}, {found}; expected a StableDiffusionPipeline or a "
            "StableDiffusionXLPipeline",
        )


def test_dropout_is_refused():
    with pytest.raises(ValueError, match=r"found 0\.1; expected 0: it draws from a global generator"):
        LoRAConfig(dropout=0.1)


@pytest.mark.slow
@settings(max_examples=6, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(rank=st.integers(1, 8), alpha=st.one_of(st.none(), st.floats(0.1, 20)))
def test_any_rank_and_alpha_survive_the_files(folders, tmp_path_factory, rank, alpha):
    folder = tmp_path_factory.mktemp("lora")
    trained(load(folders["sd"], rank=rank, alpha=alpha)).save(folder / "lora")  # verified
    assert {file.name for file in (folder / "lora").iterdir()} == {lora_files.DIFFUSERS, lora_files.KOHYA}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_outline_takes_as_many_bytes_as_the_network(folder, dtype):
    """What is printed before the weights are loaded: adapters in float32 beside a base of any precision."""
    config = ModelConfig(pretrained=str(folder), lora=LoRAConfig(rank=2, base_dtype=dtype))
    network, outline = load_kind(config, None, 0).network, outline_kind(config, None).network
    assert state_bytes(outline, averaged=True) == state_bytes(network, averaged=True)
    trained = sum(weight.numel() for name, weight in network.named_parameters() if "lora_" in name)
    frozen = sum(weight.numel() for weight in network.parameters()) - trained
    assert state_bytes(outline, averaged=True) == frozen * (4 if dtype == "float32" else 2) + 5 * 4 * trained
    assert all(weight.is_meta for weight in outline.parameters())
