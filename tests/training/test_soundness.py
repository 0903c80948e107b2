"""Layers that depend on the batch layout are named at the start, and wrong compiled gradients are not trained on."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from accelerate.utils import DynamoBackend
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.testing import CompileCounter
from torch._inductor import config as inductor

from finetune.config.inputs import ModelConfig
from finetune.core.errors import UserError
from finetune.core.shapes import Shape
from finetune.models import unconditional
from finetune.models.load import load_kind
from finetune.training import soundness
from finetune.training.soundness import check_compiled, layout_dependent_layers
from finetune.training.window import Window
from harness.compare import relative_difference, weights
from harness.configs import SMALLEST, UNET, tiny_config, write_config, write_pictures
from harness.faults import at_call, skip_the_export
from harness.processes import finish, run

NOTE = "Note: the result of this run depends on its batch layout"
STEPS = 2


def test_an_ordinary_network_has_no_such_layers():
    assert layout_dependent_layers(load_kind(ModelConfig(unet=UNET), None, 0).network) == []


def test_dropout_is_found_in_every_block():
    # one in each of the resnets: 2 x 1 on the way down, 2 in the middle, 2 x 2 on the way up
    unet = load_kind(ModelConfig(unet={**UNET, "dropout": 0.1}), None, 0).network
    found = layout_dependent_layers(unet)
    assert found[0] == "down_blocks.0.resnets.0.dropout (Dropout)"
    assert len(found) == 8
    assert all(layer.endswith("dropout (Dropout)") for layer in found)


def test_normalisation_over_the_batch_is_found_and_other_normalisation_is_not():
    network = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.GroupNorm(1, 1), nn.InstanceNorm2d(1))
    assert layout_dependent_layers(network) == ["1 (BatchNorm2d)"]


def normalise_over_the_batch() -> None:
    """The network's own layers, but the last normalisation is one over the batch."""
    build = unconditional.build_unet

    def built(*arguments):
        unet = build(*arguments)
        unet.conv_norm_out = nn.BatchNorm2d(8)
        return unet

    unconditional.build_unet = built


@pytest.mark.slow
@pytest.mark.parametrize(
    ("unet", "change", "layers"),
    [
        ({}, lambda: None, None),
        ({"dropout": 0.1}, lambda: None, "(Dropout) and 5 more"),
        ({}, normalise_over_the_batch, ": conv_norm_out (BatchNorm2d)"),
    ],
    ids=["ordinary", "dropout", "batch normalisation"],
)
def test_the_note_is_printed_where_two_layouts_differ_and_nowhere_else(tmp_path, unet, change, layers):
    pictures = write_pictures(tmp_path / "pictures", 8)

    def before():
        change()
        skip_the_export()

    for micro in (4, 2):
        batch = {"global_batch_size": 4, "micro_batch_size": micro, "num_epochs": 1}
        config = tiny_config(pictures, tmp_path / str(micro), model__unet=UNET | unet, training=batch)
        file = write_config(tmp_path / "config.yaml", config)
        printed = finish("--config", file, folder=tmp_path, before=before).stdout.splitlines()
        notes = [line for line in printed if line.startswith(NOTE)]
        assert len(notes) == (layers is not None)
        assert layers is None or notes[0].endswith(layers)
    apart = relative_difference(weights(tmp_path / "4", STEPS), weights(tmp_path / "2", STEPS))
    assert (apart > 1e-4) == (layers is not None)


class Compiled(nn.Module):
    """A network whose gradients are off by a factor, as compiled ones might be; `passes` are its inputs' shapes."""

    def __init__(self, network, factor):
        super().__init__()
        self.network, self.factor, self.passes = network, factor, []

    def forward(self, images, *arguments):
        self.passes.append(tuple(images.shape))
        output = self.network(images, *arguments)
        output.sample.register_hook(lambda gradient: gradient * self.factor())
        return output


def accelerator_of(backend):
    state = SimpleNamespace(dynamo_plugin=SimpleNamespace(backend=backend))
    return SimpleNamespace(state=state, device=torch.device("cpu"))


def check(factor=lambda: 1.0, backend=DynamoBackend.INDUCTOR, unet=UNET):
    """What is printed about a network whose compiled gradients are off by a factor."""
    kind = load_kind(ModelConfig(unet=unet), None, 0)
    printed = []
    with mock.patch.object(soundness, "say", printed.append):
        check_compiled(accelerator_of(backend), Compiled(kind.network, factor), kind, 4)
    assert kind.network.training
    assert all(weight.grad is None for weight in kind.trainable().values())
    return printed


@pytest.fixture
def _layout_optimization():
    with inductor.patch(layout_optimization=True):
        yield


def test_without_compilation_nothing_is_compared():
    assert check(backend=DynamoBackend.NO) == []


@pytest.mark.parametrize("unet", [UNET, {**UNET, "dropout": 0.5}], ids=["ordinary", "dropout"])
def test_right_compiled_gradients_are_accepted(unet):
    (line,) = check(unet=unet)
    compiled, plain = (float(word) for word in line.replace(",", "").split() if "e-" in word)
    assert compiled == plain < 2e-6  # a few dozen roundings of 2^-24, one a layer


@pytest.mark.usefixtures("_layout_optimization")
def test_compiled_gradients_within_rounding_are_accepted():
    # those of the uncompiled network are about 5e-7 off, and ten times as much is accepted
    assert len(check(lambda: 1 + 2e-6)) == 1


@pytest.mark.usefixtures("_layout_optimization")
def test_wrong_compiled_gradients_are_refused():
    with pytest.raises(UserError) as failure:
        check(lambda: 1 + 1e-4)
    (problem,) = failure.value.problems
    found = "found a relative error of the gradients against float64 of 1.0e-04, uncompiled "
    assert problem.startswith(f"launch: --dynamo_backend inductor: {found}")
    assert problem.endswith("set --dynamo_backend no")


@pytest.mark.usefixtures("_layout_optimization")
def test_the_setting_that_cures_inductor_is_made_and_printed():
    note, result = check(lambda: 1.3 if inductor.layout_optimization else 1.0)
    assert note.startswith("Note: relative error of the gradients against float64: 3.0e-01 compiled, ")
    assert note.endswith("torch._inductor.config.layout_optimization is turned off")
    assert result.startswith("Relative error of the gradients against float64: ")
    assert not inductor.layout_optimization


@pytest.mark.usefixtures("_layout_optimization")
def test_no_setting_of_inductor_is_made_for_another_compiler():
    with pytest.raises(UserError, match="--dynamo_backend aot_eager: found"):
        check(lambda: 1.3, backend=DynamoBackend.AOT_EAGER)
    assert inductor.layout_optimization


SHAPES = [Shape(8, 8), Shape(8, 12), Shape(12, 8)]


@pytest.fixture
def shaped():
    """A network for three shapes; dynamo's settings are restored."""
    kind = load_kind(ModelConfig(unet=SMALLEST), None, 0)
    kind.train_shapes(SHAPES)
    config = torch._dynamo.config
    kept = {name: getattr(config, name) for name in ("recompile_limit", "accumulated_recompile_limit")}
    with config.patch(automatic_dynamic_shapes=True, **kept):
        yield kind
    torch._dynamo.reset()


def test_of_many_shapes_a_shorter_micro_batch_of_another_is_compared_too(shaped):
    network = Compiled(shaped.network, lambda: 1.0)
    check_compiled(accelerator_of(DynamoBackend.AOT_EAGER), network, shaped, 4)
    assert network.passes == [(4, 1, 8, 12), (3, 1, 12, 8)]
    assert torch._dynamo.config.recompile_limit >= 2 * 3 * 4  # both ways, three shapes, four lengths
    wrong = Compiled(shaped.network, lambda: 1 + 1e-3 * (len(wrong.passes) == 2))
    with pytest.raises(UserError, match="--dynamo_backend aot_eager: found"):
        check_compiled(accelerator_of(DynamoBackend.AOT_EAGER), wrong, shaped, 4)


def test_a_graph_that_cannot_be_compiled_later_is_one_line(tmp_path):
    """As that of a shape which the check did not go through."""

    def fail():
        raise TorchDynamoException("no such graph")

    config = tiny_config(write_pictures(tmp_path / "pictures", 8), tmp_path / "run")
    file = write_config(tmp_path / "config.yaml", config)
    ended = run("--config", file, folder=tmp_path, before=lambda: at_call(Window, "add", 3, fail))
    assert ended.returncode == 2
    problem = "launch: --dynamo_backend: the network cannot be compiled (no such graph); set --dynamo_backend no"
    assert ended.error == problem


@pytest.mark.slow
def test_a_shape_is_compiled_once_for_all_lengths_and_once_for_single_images(shaped):
    counter = CompileCounter()
    network = torch.compile(shaped.network, backend=counter)
    check_compiled(accelerator_of(DynamoBackend.AOT_EAGER), network, shaped, 4)
    assert counter.frame_count == 2
    for count in (4, 3, 2, 1, 2, 3):
        for shape in SHAPES:
            network(torch.zeros(count, 1, *shape), torch.zeros(count, dtype=torch.long))
    assert counter.frame_count == 2 * len(SHAPES)


@pytest.mark.slow
def test_a_network_compiled_by_inductor_trains_to_the_uncompiled_weights(tmp_path):
    """The smallest network whose gradients inductor gets wrong on a CPU with AMX, by a relative error of 0.5."""
    pictures = write_pictures(tmp_path / "pictures", 8)

    def updates(name, **environment):
        config = tiny_config(pictures, tmp_path / name, model__unet=SMALLEST)
        file = write_config(tmp_path / f"{name}.yaml", config)
        done = finish("--config", file, folder=tmp_path, before=skip_the_export, seconds=1200, **environment)
        return weights(tmp_path / name, STEPS), done.stdout

    plain, _ = updates("plain")
    # Without the pool of compilers, whose start takes a fifth of the CPU time.
    cold = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    compiled, printed = updates("compiled", ACCELERATE_DYNAMO_BACKEND="INDUCTOR", **cold)
    assert "Relative error of the gradients against float64: " in printed
    assert relative_difference(plain, compiled) < 1e-4
