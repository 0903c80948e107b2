"""A config that passes --check starts, trains, samples, saves and exports; one that does not is refused in lines."""

import shutil

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch._inductor import config as inductor

from harness.compare import history, valid_checkpoints
from harness.configs import KINDS, PIPELINES, SMALLEST, UNET, of_kind, tiny_config, write_config, write_pictures
from harness.processes import run

BLOCKS = st.sampled_from(["", "Attn", "Skip", "AttnSkip", "Resnet", "K"])
NETWORKS = st.fixed_dictionaries(
    {"sample_size": st.sampled_from([8, 9, 16]), "layers_per_block": st.integers(1, 2)},
    optional={
        "time_embedding_type": st.sampled_from(["positional", "fourier", "learned"]),
        "num_train_timesteps": st.sampled_from([10, 100]),
        "resnet_time_scale_shift": st.sampled_from(["default", "scale_shift"]),
        "downsample_type": st.sampled_from(["conv", "resnet"]),
        "upsample_type": st.sampled_from(["conv", "resnet"]),
        "attention_head_dim": st.sampled_from([4, 8, 64]),
        "act_fn": st.sampled_from(["silu", "gelu", "nonsense"]),
        "dropout": st.sampled_from([0.0, 0.1]),
    },
)
NOISE_SCHEDULERS = st.fixed_dictionaries(
    {"num_train_timesteps": st.sampled_from([1, 2, 20, 100])},
    optional={
        "beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "nonsense"]),
        "prediction_type": st.sampled_from(["epsilon", "v_prediction", "sample", "flow_prediction"]),
        "timestep_spacing": st.sampled_from(["leading", "linspace", "trailing"]),
        "steps_offset": st.sampled_from([0, 1]),
        "rescale_betas_zero_snr": st.booleans(),
        "variance_type": st.sampled_from(["fixed_small", "fixed_large", "learned"]),
        "clip_sample": st.booleans(),
        "thresholding": st.booleans(),
    },
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    base = tmp_path_factory.mktemp("pictures")
    return {kind: write_pictures(base / kind, 9, (10, 9), kind) for kind in KINDS}


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(list(KINDS)),
    network=NETWORKS,
    blocks=st.tuples(BLOCKS, BLOCKS),
    noise_scheduler=NOISE_SCHEDULERS,
    inference_steps=st.sampled_from([1, 2, 20, 40]),
    changes=st.fixed_dictionaries(
        {},
        optional={
            "data__crop": st.sampled_from(["center", "random"]),
            "data__validation_fraction": st.sampled_from([0.0, 0.2]),
            "training__snr_gamma": st.sampled_from([None, 5.0]),
            "ema__enabled": st.booleans(),
            "model__gradient_checkpointing": st.booleans(),
        },
    ),
)
def test_what_passes_the_check_runs_to_its_end(
    pictures, tmp_path, kind, network, blocks, noise_scheduler, inference_steps, changes
):
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    down, up = blocks
    unet = UNET | network
    unet |= {
        "down_block_types": ["DownBlock2D", f"{down}DownBlock2D"],
        "up_block_types": [f"{up}UpBlock2D", "UpBlock2D"],
    }
    of_its_kind = {"model": {"unet": unet}, **of_kind(kind, pictures[kind], whole=kind in PIPELINES)}
    of_its_kind["model"] = of_its_kind["model"] | {"noise_scheduler": noise_scheduler}
    options = {
        "training": {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "max_train_steps": 3},
        "samples": {"every_steps": 3, "count": 2, "inference_steps": inference_steps},
    }
    config = tiny_config(pictures[kind], tmp_path / "run", **options | of_its_kind | changes)
    file = write_config(tmp_path / "config.yaml", config)
    checked = run("--config", file, "--check", folder=tmp_path / "printed")
    assert not (tmp_path / "run").exists()
    if checked.returncode != 0:
        event("refused")
        assert checked.returncode == 2, checked.stderr
        assert checked.errors
        assert "Traceback" not in checked.stderr
        return
    event("accepted")
    outcome = run("--config", file, folder=tmp_path / "printed")
    assert outcome.returncode == 0, outcome.stderr
    assert [line["step"] for line in history(tmp_path / "run") if "train/loss" in line] == [1, 2, 3]
    assert valid_checkpoints(tmp_path / "run") == [3]
    assert (tmp_path / "run/samples/step-3.png").exists()
    exported = "lora/pytorch_lora_weights.safetensors" if kind == "lora" else "pipeline/model_index.json"
    assert (tmp_path / "run" / exported).exists()


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--check",), ()], ids=["check", "run"])
def test_a_missing_compiler_is_found_before_the_start(tmp_path, flags):
    pictures = write_pictures(tmp_path / "pictures", 4)
    config = write_config(tmp_path / "config.yaml", tiny_config(pictures, tmp_path / "run", model__unet=SMALLEST))
    launch = {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}

    def without_compiler():
        inductor.cpp.cxx = (str(tmp_path / "no-compiler"),)

    refused = run("--config", config, *flags, folder=tmp_path, before=without_compiler, **launch)
    assert refused.returncode == 2
    assert refused.error.startswith("launch: --dynamo_backend inductor: the network cannot be compiled (InvalidCxx")
    assert not (tmp_path / "run").exists()
