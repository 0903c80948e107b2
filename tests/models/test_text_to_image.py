"""Text-to-image models: what they make of images, captions and sizes, and which pipelines are refused."""

import json
import pickle
import shutil

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler, PNDMScheduler

from finetune.config.inputs import ModelConfig
from finetune.core.errors import UserError
from finetune.core.randomness import noise
from finetune.core.shapes import Shape
from finetune.evaluation.sampling import ImageSampler
from finetune.models.load import load_kind
from harness.compare import unequal
from harness.configs import ROOT
from harness.pipelines import LENGTH, NOISE_SCHEDULER, VAE_ROUNDING, save_pipeline
from harness.processes import forget_processes

CPU = torch.device("cpu")
TEXTS = ["a cat", "a dog", "", "a very very long caption"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("pipelines")
    scheduler = PNDMScheduler(num_train_timesteps=100, skip_prk_steps=True, steps_offset=1)  # says nothing of clipping
    return {
        "sd": save_pipeline(base / "sd", scheduler=scheduler),
        "sdxl": save_pipeline(base / "sdxl", xl=True),
    }


def load(folder, resolution=None, **options):
    return load_kind(ModelConfig(pretrained=str(folder), **options), resolution, 0)


def problem(folder, resolution=None, **options):
    with pytest.raises(UserError) as caught:
        load(folder, resolution, **options)
    (line,) = caught.value.problems
    assert "\n" not in line
    return line


@pytest.fixture(params=["sd", "sdxl"])
def folder(request, folders):
    return folders[request.param]


def embedding(kind):
    """What makes embeddings of TEXTS, as a run's encodings do."""
    encoders = kind.encoders()
    encoded = encoders.texts(TEXTS, CPU)
    rows = {text: {name: encoded[name][row] for name in encoded} for row, text in enumerate(TEXTS)}
    zeros = {name: torch.zeros(shape) for name, shape in encoders.text_fields.items()}
    rows[None] = zeros if encoders.no_text is None else rows[encoders.no_text]
    return lambda texts: {name: torch.stack([rows[text][name] for text in texts]) for name in encoded}


def test_it_says_what_it_needs_of_the_data(folder):
    kind = load(folder)
    assert kind.image_format == (1, 8)  # grey, since the VAE is; 4 latents a side of 2 pixels each
    assert (kind.conditional, kind.captioned, kind.class_names, kind.made_for) == (True, True, [], 8)
    larger = load(folder, 16)
    assert larger.image_format == (1, 16)
    assert larger.pipeline().unet.config.sample_size == 8
    assert larger.example(3)["latents"].shape == (3, 4, 8, 8)


def test_texts_are_encoded_as_the_pipeline_does(folder):
    pipeline = DiffusionPipeline.from_pretrained(folder)
    found = load(folder).encoders().texts(TEXTS, CPU)
    expected = pipeline.encode_prompt(TEXTS, CPU, num_images_per_prompt=1, do_classifier_free_guidance=False) \
        if "text_encoder_2" not in pipeline.components \
        else pipeline.encode_prompt(TEXTS, device=CPU, do_classifier_free_guidance=False)  # fmt: skip
    assert torch.equal(found["text"], expected[0])
    assert found["text"].shape[1] == LENGTH
    if "pooled" in found:
        assert torch.equal(found["pooled"], expected[2])
    encoders = load(folder).encoders()
    assert {name: tuple(tensor.shape[1:]) for name, tensor in found.items()} == encoders.text_fields
    assert encoders.truncated(TEXTS) == ["a very very long caption"]
    assert encoders.truncated([]) == []


def test_images_are_encoded_and_decoded_as_the_pipeline_does(folder):
    pipeline, kind = DiffusionPipeline.from_pretrained(folder), load(folder)
    pixels = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    posterior = pipeline.vae.encode(pixels.float() / 127.5 - 1).latent_dist
    found = kind.encoders().images(pixels, CPU)
    assert torch.equal(found["mean"], posterior.mean)
    assert torch.equal(found["std"], posterior.std)
    batch = kind.example(3) | {"latents": found["mean"]}
    clean, _ = kind.inputs(batch)
    assert torch.allclose(clean, found["mean"] * 0.5)  # scaling_factor
    one_by_one = torch.cat([pipeline.vae.decode(mean[None]).sample for mean in found["mean"]])
    assert torch.allclose(kind.images(clean), one_by_one, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [Shape(8, 8), Shape(4, 16)])
def test_random_crops_are_encoded_as_the_cache_would_have_them(folder, shape, monkeypatch):
    """In chunks of at most two images, drawn with the batch's noise, and scaled."""
    kind = load_kind(ModelConfig(pretrained=str(folder)), None, 0, crops=True)
    kind.train_shapes([shape])
    generator, encoded = torch.Generator().manual_seed(0), []
    pixels = torch.randint(0, 256, (5, 1, *shape), dtype=torch.uint8, generator=generator)
    example = kind.example(5)
    assert example.keys() == {*load(folder).example(5), "images", "posterior"} - {"latents"}
    assert (example["images"].shape, example["images"].dtype) == (pixels.shape, pixels.dtype)
    assert example["posterior"].shape == example["noise"].shape
    draw = torch.randn(example["posterior"].shape, generator=generator)
    vae = kind.encoders()._loaded_vae(CPU)
    encode = vae.encode
    monkeypatch.setattr(vae, "encode", lambda part: encoded.append(len(part)) or encode(part))
    monkeypatch.setattr(kind.encoders(), "image_chunk", lambda shape: 2)
    with torch.autocast("cpu"):  # as a trial update under mixed precision has it
        clean, _ = kind.inputs(example | {"images": pixels, "posterior": draw})
    assert encoded == [2, 2, 1]
    assert clean.dtype == torch.float32
    assert not clean.requires_grad
    one_by_one = [load(folder).encoders().images(pixels[index : index + 1], CPU) for index in range(5)]
    mean, std = (torch.cat([posterior[name] for posterior in one_by_one]) for name in ("mean", "std"))
    expected = (mean + std * draw) * 0.5  # scaling_factor
    assert torch.allclose(clean, expected, rtol=0, atol=VAE_ROUNDING * float(expected.abs().max()))


def test_a_vae_that_encodes_random_crops_stays_and_the_text_encoders_go(folder):
    kind = load_kind(ModelConfig(pretrained=str(folder)), None, 0, crops=True)
    assert kind.encoders()._vae is None  # which what was tried at the start did not need
    kind.inputs(kind.example(1))
    loaded = kind.encoders()._vae
    kind.encoders().texts(["a cat"], CPU)
    kind.images(torch.zeros(1, 4, 4, 4))
    kind.encoders().free()
    assert kind.encoders()._prompter is None
    assert kind.encoders()._vae is loaded
    weights = dict(loaded.named_parameters())
    assert {name: weight.shape for name, weight in kind.crop_encoder.named_parameters()} == {
        name: weight.shape for name, weight in weights.items()
    }
    assert not any(weight.requires_grad for weight in weights.values())


def test_latents_are_shifted_where_the_vae_says_so(folders, tmp_path):
    folder = shutil.copytree(folders["sdxl"], tmp_path / "shifted")
    config = json.loads((folder / "vae/config.json").read_text())
    config |= {"latents_mean": [1.0, 2.0, 3.0, 4.0], "latents_std": [1.0, 2.0, 4.0, 8.0]}
    (folder / "vae/config.json").write_text(json.dumps(config))
    kind = load(folder)
    kind._encoders.scaled(torch.empty(1, 4, 4, 4, device="meta"))  # as when operations are counted
    clean, _ = kind.inputs(kind.example(1) | {"latents": torch.full((1, 4, 4, 4), 9.0)})
    # (9 - mean) / std x 0.5: 4, 7/4, 6/8, 5/16
    assert clean[0, :, 0, 0].tolist() == [4.0, 1.75, 0.75, 0.3125]
    decoded = []
    kind._encoders.decode = lambda latents, device: decoded.append(latents) or latents
    kind.images(clean)
    assert torch.equal(decoded[0], torch.full((1, 4, 4, 4), 9.0))


@pytest.mark.parametrize("zeros", [True, False])
def test_no_caption_is_what_the_pipeline_takes_for_no_prompt(folders, tmp_path, zeros):
    """Zeros for SDXL unless its index says otherwise; the empty text for the others."""
    folder = shutil.copytree(folders["sdxl"], tmp_path / "sdxl")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": zeros}))
    assert load(folder).encoders().no_text == (None if zeros else "")
    assert load(folders["sd"]).encoders().no_text == ""


def test_prompts_are_conditions_as_the_captions_of_a_batch_are(folder):
    """A batch of images that have their shape from the start, and samples of that shape."""
    kind = load(folder)
    embed = embedding(kind)
    _, told = kind.inputs(kind.example(2) | embed(["a cat", "a dog"]))
    asked = kind.conditions(["a cat", "a dog"], CPU, embed=embed)
    assert torch.equal(asked["encoder_hidden_states"], embed(["a cat", "a dog"])["text"])
    assert torch.equal(asked["encoder_hidden_states"], told["encoder_hidden_states"])
    assert unequal(told.get("added_cond_kwargs", {}), asked.get("added_cond_kwargs", {})) == []
    if "added_cond_kwargs" in told:
        assert torch.equal(told["added_cond_kwargs"]["text_embeds"], embed(["a cat", "a dog"])["pooled"])
        assert asked["added_cond_kwargs"]["time_ids"].tolist() == [[8.0, 8.0, 0.0, 0.0, 8.0, 8.0]] * 2


def test_pictures_of_many_shapes(folder):
    """8 pixels a side are 4 latents, which the UNet halves once."""
    kind = load(folder)
    embed = embedding(kind)
    assert kind.divisor == 4
    shapes = [Shape(8, 8), Shape(4, 16), Shape(12, 8)]  # 64, 64 and 96 pixels
    kind.train_shapes(shapes)
    assert kind.shapes == shapes
    assert kind.example(2)["latents"].shape == kind.example(2)["noise"].shape == (2, 4, 6, 4)
    assert kind.example(1, Shape(4, 16))["latents"].shape == (1, 4, 2, 8)
    asked = kind.conditions(["a cat"], CPU, Shape(12, 8), embed)
    if "added_cond_kwargs" in asked:
        assert kind.example(2)["time_ids"].tolist() == [[12, 8, 0, 0, 12, 8]] * 2
        assert asked["added_cond_kwargs"]["time_ids"].tolist() == [[12.0, 8.0, 0.0, 0.0, 12.0, 8.0]]
        assert kind.conditions(["a cat"], CPU, embed=embed)["added_cond_kwargs"]["time_ids"].tolist() == [
            [8, 8, 0, 0, 8, 8]
        ]
    with pytest.raises(UserError, match=r"the UNet of .* cannot denoise the latents of images of 1 x 8 pixels"):
        kind.train_shapes([Shape(8, 8), Shape(8, 1), Shape(12, 8)])


def test_images_of_another_shape_are_encoded_and_decoded_as_the_pipeline_does(folder):
    pipeline, kind = DiffusionPipeline.from_pretrained(folder), load(folder)
    pixels, encoders = torch.randint(0, 256, (3, 1, 4, 12), dtype=torch.uint8), kind.encoders()
    posterior = pipeline.vae.encode(pixels.float() / 127.5 - 1).latent_dist
    found = encoders.images(pixels, CPU)
    assert torch.equal(found["mean"], posterior.mean)
    fields = encoders.image_fields(Shape(4, 12))
    assert fields == {name: tuple(tensor.shape[1:]) for name, tensor in found.items()}
    one_by_one = torch.cat([pipeline.vae.decode(mean[None]).sample for mean in found["mean"]])
    assert torch.allclose(kind.images(found["mean"] * 0.5), one_by_one, atol=1e-6)
    # about as many pixels at once of each shape, at least one image
    shapes = Shape(64, 64), Shape(64, 128), Shape(512, 512), Shape(512, 576)
    assert [encoders.image_chunk(shape) for shape in shapes] == [64, 32, 1, 1]


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_samples_of_a_shape_are_those_of_the_pipeline(folder, scale):
    forget_processes()
    kind, accelerator = load(folder), Accelerator(cpu=True)
    names, shapes = ["a cat", "a dog", "a cat"], [Shape(8, 16), Shape(8, 8), Shape(8, 16)]
    kind.train_shapes([Shape(8, 8), Shape(8, 16)])
    sampler = ImageSampler(kind, accelerator, lambda: None, 5, 2, embed=embedding(kind))
    drawn = sampler.sample(names, shapes, scale)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(kind.noise_scheduler.config)
    for index, (name, shape) in enumerate(zip(names, shapes, strict=True)):
        latents = noise(5, 0, index, (4, shape.height // 2, shape.width // 2), "samples")[None]
        options = {"num_inference_steps": 2, "guidance_scale": scale, "output_type": "np", "latents": latents}
        (image,) = pipeline(name, height=shape.height, width=shape.width, **options).images
        assert drawn[index].shape == (*shape, 1)
        assert abs((image * 255).round().astype(int) - drawn[index]).max() <= 1
    forget_processes()


def test_the_sampler_stays_the_one_that_it_came_with(folders):
    """The noise scheduler of training does not clip latents, although DDPM's default is to."""
    kind = load(folders["sd"], noise_scheduler={"prediction_type": "v_prediction"})
    assert kind.noise_scheduler.config.clip_sample is False
    sampler = kind.pipeline().scheduler
    assert type(sampler) is PNDMScheduler
    assert sampler.config.prediction_type == "v_prediction"
    assert sampler.config.skip_prk_steps is True


def test_the_pipeline_of_a_euler_scheduler_keeps_it(tmp_path):
    scheduler = EulerDiscreteScheduler(num_train_timesteps=100, timestep_spacing="trailing")
    kind = load(save_pipeline(tmp_path / "euler", xl=True, scheduler=scheduler))
    assert type(kind.pipeline().scheduler) is EulerDiscreteScheduler
    assert kind.pipeline().scheduler.config.timestep_spacing == "trailing"


def test_weights_of_the_encoders_are_part_of_its_identity(folders, tmp_path):
    folder = shutil.copytree(folders["sd"], tmp_path / "other")
    before = load(folder).identity()
    assert before == load(folders["sd"]).identity()
    weights = bytearray((folder / "vae/diffusion_pytorch_model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "vae/diffusion_pytorch_model.safetensors").write_bytes(weights)
    after = load(folder).identity()
    assert before["encoders"]["vae"] != after["encoders"]["vae"]
    assert before["encoders"]["text_encoders"] == after["encoders"]["text_encoders"]


def test_a_variant_in_half_precision_is_loaded_in_full(folder, tmp_path):
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    kind = load(tmp_path / "half")
    assert {weight.dtype for weight in kind.network.parameters()} == {torch.float32}
    expected = DiffusionPipeline.from_pretrained(tmp_path / "half", variant="fp16").unet.conv_in.weight
    assert torch.equal(kind.network.conv_in.weight, expected)


def test_only_the_unet_is_trained(folder):
    kind = load(folder)
    assert kind.trainable().keys() == dict(kind.network.named_parameters()).keys()
    assert kind.network.training
    encoders = kind.encoders()
    encoders.images(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), CPU)
    encoders.texts(["a cat"], CPU)
    frozen = [*encoders._vae.parameters(), *encoders._prompter.text_encoder.parameters()]
    assert not any(weight.requires_grad for weight in frozen)
    encoders.free()
    assert encoders._vae is encoders._prompter is None


CHANGED_UNETS = {
    "inpainting": ({"in_channels": 9}, "found a UNet with in_channels 9; expected 4"),
    "a learned variance": ({"out_channels": 8}, "found a UNet with out_channels 8; expected 4"),
    "classes": ({"num_class_embeds": 3}, "found a UNet with num_class_embeds 3; expected None"),
    "distilled guidance": ({"time_cond_proj_dim": 4}, "found a UNet with time_cond_proj_dim 4; expected None"),
    "another width": ({"cross_attention_dim": 12}, "found a UNet with cross_attention_dim 12; expected 8"),
}


@pytest.mark.parametrize("name", CHANGED_UNETS)
def test_a_unet_of_another_task_is_refused(tmp_path, name):
    settings, line = CHANGED_UNETS[name]
    assert line in problem(save_pipeline(tmp_path / "pipeline", unet=settings))


def test_sizes_that_cannot_be_denoised_are_refused(folder):
    # 2 pixels a latent, and the UNet halves latents once
    assert problem(folder, 10).startswith("data.resolution: found 10; expected a multiple of 4, since the VAE")
    assert problem(folder, 10).endswith("(nearest: 8)")


def test_classes_are_for_other_models(folder):
    line = problem(folder, class_conditional=True)
    assert line.startswith("model.class_conditional: found true with ")
    assert line.endswith("which is conditioned on captions; expected false")


def changed_index(folder, tmp_path, **changes):
    copied = shutil.copytree(folder, tmp_path / "changed")
    index = json.loads((copied / "model_index.json").read_text())
    (copied / "model_index.json").write_text(json.dumps(index | changes))
    return copied


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"unet": ["mine", "UNet2DConditionModel2"]}, "found unet: "),
        ({"text_encoder": ["transformers", "T5EncoderModel"]}, "expected a CLIPTextModel, as a"),
        ({"vae": None}, "found vae: null in model_index.json; expected a AutoencoderKL"),
        ({"controlnet": ["diffusers", "ControlNetModel"]}, "found a component 'controlnet' in model_index.json"),
        ({"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}, "found the noise scheduler diffusers.Flow"),
    ],
)
def test_components_of_other_pipelines_are_refused(folder, tmp_path, changes, line):
    assert line in problem(changed_index(folder, tmp_path, **changes))


def test_a_tokenizer_without_a_vocabulary_is_refused(folders, tmp_path):
    """transformers would load it with two tokens, and every caption would be the same."""
    folder = shutil.copytree(folders["sd"], tmp_path / "pipeline")
    (folder / "tokenizer/tokenizer.json").unlink()
    assert "found no vocabulary; expected tokenizer.json, or vocab.json and merges.txt" in problem(folder)


def test_a_tokenizer_of_another_encoder_is_refused(folders, tmp_path):
    folder = shutil.copytree(folders["sd"], tmp_path / "pipeline")
    config = json.loads((folder / "text_encoder/config.json").read_text())
    (folder / "text_encoder/config.json").write_text(json.dumps(config | {"vocab_size": 30}))
    assert "found 54 tokens and texts of 12; expected at most the 30 and 12" in problem(folder)


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code was run')",))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_pickle_in_place_of_weights_is_refused_and_not_run(folders, tmp_path, part):
    folder = shutil.copytree(folders["sd"], tmp_path / "pipeline")
    for file in (folder / part).glob("*.safetensors"):
        file.unlink()
        file.with_name({"text_encoder": "pytorch_model.bin"}.get(part, f"{file.stem}.bin")).write_bytes(
            pickle.dumps(Bomb())
        )
    assert "the weights cannot be loaded safely" in problem(folder)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_do_not_fit_their_config_are_refused(folders, tmp_path, part):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(folders["sd"], tmp_path / "pipeline")
    (file,) = (folder / part).glob("*.safetensors")
    weights = load_file(file)
    weights.pop(sorted(weights)[0])
    save_file(weights, file, metadata={"format": "pt"})
    assert "the weights do not fit config.json: 1 missing keys" in problem(folder)


def test_weights_that_are_not_finite_are_refused(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(folders["sd"], tmp_path / "pipeline")
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    save_file({name: tensor.fill_(torch.nan) for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    assert problem(folder).startswith("model: the network's prediction is not finite at timestep 0 or 99")


def test_pixel_models_are_loaded_as_before():
    kind = load(ROOT / "configs/digits-base")
    assert (kind.captioned, kind.encoders(), NOISE_SCHEDULER["clip_sample"]) == (False, None, False)
