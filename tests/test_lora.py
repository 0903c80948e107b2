"""Adapter runs through the script: what is saved, what is exported and verified, and what resuming demands."""

import shutil

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from finetune.models import lora_files
from finetune.models.lora import LoRA
from harness.compare import differing, history, moments, run_state, unequal, weights
from harness.configs import EVALUATED_STEPS, evaluated_config, of_kind, write_config, write_pictures
from harness.faults import at_call
from harness.processes import finish, run


def lora_config(pictures, output_dir, **changes):
    return evaluated_config(pictures, output_dir, **of_kind("lora", pictures, whole=True) | changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    base = tmp_path_factory.mktemp("lora")
    config = lora_config(write_pictures(base / "pictures", 19, (10, 8), "lora"), base / "run")
    outcome = finish("--config", write_config(base / "config.yaml", config), folder=base)
    (base / "printed").write_text(outcome.stdout)
    return base


def output(network):
    noisy = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    told = {"text_embeds": torch.ones(2, 6), "time_ids": torch.ones(2, 6)}
    network.eval()
    with torch.no_grad():
        return network(noisy, torch.tensor([1, 50]), torch.ones(2, 12, 16), added_cond_kwargs=told).sample


def test_the_adapter_is_what_the_averaged_weights_are(finished):
    """Loaded by diffusers into the pipeline as it was: the same outputs as with the checkpoint's averages put in."""
    folder = finished / "pictures-lora"
    expected = DiffusionPipeline.from_pretrained(folder)
    expected.load_lora_weights(finished / "run/lora")
    averaged = weights(finished / "run", EVALUATED_STEPS, "ema")
    by_hand = DiffusionPipeline.from_pretrained(folder)
    by_hand.load_lora_weights(finished / "run/lora", adapter_name="default")
    missing = by_hand.unet.load_state_dict(averaged, strict=False)
    assert missing.unexpected_keys == []
    for name in (None, lora_files.KOHYA):
        pipeline = DiffusionPipeline.from_pretrained(folder)
        pipeline.load_lora_weights(finished / "run/lora", **({"weight_name": name} if name else {}))
        assert torch.equal(output(pipeline.unet), output(by_hand.unet))
    assert not torch.equal(output(DiffusionPipeline.from_pretrained(folder).unet), output(by_hand.unet))


def test_a_checkpoint_holds_the_adapters_alone(finished):
    saved, averaged = (weights(finished / "run", EVALUATED_STEPS, part) for part in ("model", "ema"))
    assert saved.keys() == averaged.keys()
    assert all("lora_" in name for name in saved)
    # rank 2 beside 8 layers of attention: attn1 of 8 to 8, attn2's keys and values of 16 to 8; four such blocks, one
    # on the way down, one in the middle, two on the way up
    block = 4 * 2 * (8 + 8) + 2 * 2 * (8 + 8) + 2 * 2 * (16 + 8)
    assert sum(tensor.numel() for tensor in saved.values()) == 4 * block
    assert len(moments(finished / "run", EVALUATED_STEPS)["exp_avg"]) == len(saved)


def test_the_identity_has_the_adapters_and_a_hash_of_the_base(finished):
    state = run_state(finished / "run", EVALUATED_STEPS)
    assert state["identity"]["lora"] == {
        "rank": 2,
        "alpha": 3.0,
        "target_modules": ["attention"],
        "base_dtype": "float32",
        "dropout": 0.0,
    }
    assert len(state["identity"]["base"]) == 32


def test_at_step_0_the_loss_is_that_of_the_base(finished):
    first = history(finished / "run")[0]
    assert first["step"] == 0
    assert first["validation/loss"] == first["validation/loss_ema"]
    assert history(finished / "run")[-1]["validation/loss"] != first["validation/loss"]


def test_the_plan_and_the_results_say_what_is_trained(finished):
    printed = (finished / "printed").read_text()
    assert "0.00 M parameters trained beside 0.03 M that are frozen" in printed
    assert f"lora                       {finished / 'run/lora'}" in printed
    assert not (finished / "run/pipeline").exists()


def test_the_snippet_of_the_card_draws_with_the_adapter(finished):
    card = (finished / "run/lora/README.md").read_text()
    assert "- lora\n" in card.split("---")[1]
    assert "Rank 2, alpha 3. `kohya.safetensors` holds" in card
    assert str(finished) not in card  # no path of this machine
    snippet = card.split("```python\n")[1].split("```")[0]
    snippet = snippet.replace("PATH_OR_REPOSITORY", str(finished / "run/lora"))
    scope = {}
    exec(snippet.replace('"pictures-lora"', repr(str(finished / "pictures-lora"))), scope)
    assert scope["images"][0].size == (8, 8)


@pytest.mark.slow
def test_another_base_under_the_same_name_is_another_run(finished, tmp_path):
    pictures = shutil.copytree(finished / "pictures", tmp_path / "pictures")
    shutil.copytree(finished / "pictures-lora", tmp_path / "pictures-lora")
    file = write_config(tmp_path / "config.yaml", lora_config(pictures, tmp_path / "run", training__max_train_steps=2))
    finish("--config", file, folder=tmp_path)
    weights_file = tmp_path / "pictures-lora/unet/diffusion_pytorch_model.safetensors"
    changed = bytearray(weights_file.read_bytes())
    changed[-2] ^= 1
    weights_file.write_bytes(changed)
    outcome = run("--config", file, folder=tmp_path)
    assert outcome.returncode == 2
    assert "is of another run: base: " in outcome.errors[0]


def test_a_checkpoint_with_other_names_is_refused(finished, tmp_path):
    """As one of the same run with another rank's shapes, or with a layer of the base among its weights."""
    from safetensors.torch import save_file

    from finetune.run import manifest

    for change in ("names", "shapes"):
        folder = shutil.copytree(finished / f"run/checkpoint-{EVALUATED_STEPS}", tmp_path / change / "checkpoint-6")
        saved = load_file(folder / "model.safetensors")
        name = next(iter(saved))
        if change == "names":
            saved["conv_in.weight"] = saved.pop(name)
        else:
            saved[name] = torch.cat([saved[name], saved[name]])
        save_file(saved, folder / "model.safetensors")
        listed = list(manifest.read(folder)["files"])
        manifest.seal(folder, 6, listed)
        config = lora_config(finished / "pictures", tmp_path / change, training__max_train_steps=8)
        outcome = run("--config", write_config(tmp_path / f"{change}.yaml", config), folder=tmp_path)
        assert outcome.returncode == 2
        assert "refused: found " in outcome.error


@pytest.mark.slow
def test_an_adapter_that_does_something_else_ends_the_run_before_it_is_finished(finished, tmp_path):
    """And nothing that looks finished is left; run again without the fault, it is."""
    config = lora_config(finished / "pictures", tmp_path / "run")
    file = write_config(tmp_path / "config.yaml", config)

    def fault():
        def spoil():
            (partial,) = (tmp_path / "run").glob("lora.tmp")
            (partial / lora_files.KOHYA).unlink()

        at_call(lora_files, "verify", 1, spoil)

    outcome = run("--config", file, folder=tmp_path, before=fault)
    assert outcome.returncode == 1
    assert "kohya.safetensors: cannot be loaded again" in outcome.error
    assert "Finished" not in outcome.stdout
    assert [path.name for path in (tmp_path / "run").glob("lora*")] == []
    again = finish("--config", file, folder=tmp_path)
    assert "Finished" in again.stdout
    assert differing(finished / "run", tmp_path / "run", EVALUATED_STEPS) == []


def test_every_finished_run_was_verified(finished, tmp_path):
    file = write_config(tmp_path / "config.yaml", lora_config(finished / "pictures", tmp_path / "run"))

    def count():
        at_call(LoRA, "save", 1, lambda: (tmp_path / "saved").touch())
        at_call(lora_files, "verify", 1, lambda: (tmp_path / "verified").touch(), after=True)

    finish("--config", file, folder=tmp_path, before=count)
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "verified").exists()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_base_in_half_precision_is_trained_resumed_and_exported(finished, tmp_path, dtype):
    lora = {"rank": 2, "base_dtype": dtype, "target_modules": ["attention", "convolutions"]}
    config = lora_config(finished / "pictures", tmp_path / "whole", model__lora=lora, training__max_train_steps=4)
    config["model"]["gradient_checkpointing"] = True
    finish("--config", write_config(tmp_path / "whole.yaml", config), folder=tmp_path)
    saved = weights(tmp_path / "whole", 4)
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert any("conv1" in name for name in saved)
    config |= {"output_dir": str(tmp_path / "parts")}
    file = write_config(tmp_path / "parts.yaml", config)
    finish("--config", file, "training.max_train_steps=2", folder=tmp_path)
    finish("--config", file, folder=tmp_path)
    assert unequal(saved, weights(tmp_path / "parts", 4)) == []
    first, *_ = history(tmp_path / "whole")
    assert first["validation/loss"] == pytest.approx(history(finished / "run")[0]["validation/loss"], rel=0.01)
