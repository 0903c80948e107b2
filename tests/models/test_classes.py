"""Class-conditional models: made from unconditional ones, from plain diffusers networks, and from their own exports."""

import json

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from finetune.config.inputs import ModelConfig
from finetune.core.errors import UserError
from finetune.core.randomness import noise
from finetune.models.classes import with_classes
from finetune.models.hub import save_export
from finetune.models.load import load_kind
from finetune.models.unconditional import Unconditional
from harness.configs import UNET

NAMES = ["cat", "dog", "emu"]
EMBEDDING = 32  # UNET's timestep embedding: 4 times its first 8 channels


@pytest.fixture
def base():
    torch.manual_seed(0)
    return Unconditional(UNet2DModel(**UNET), DDPMScheduler())


def output(kind, names):
    """The network's prediction for the same two inputs, told these conditions."""
    generator = torch.Generator().manual_seed(1)
    noisy, timesteps = torch.randn(2, 1, 8, 8, generator=generator), torch.tensor([10, 500])
    with torch.no_grad():
        return kind.network(noisy, timesteps, **kind.conditions(names, torch.device("cpu"))).sample


def test_an_unconditional_network_gets_a_row_for_each_class_and_one_for_none(base):
    without_classes = output(base, [None, None])
    kind = with_classes(base, NAMES, seed=5)
    rows = kind.network.class_embedding.weight
    assert rows.shape == (4, EMBEDDING)
    assert kind.network.config.num_class_embeds == 4
    for row in range(3):
        assert torch.equal(rows[row], noise(5, 0, row, (EMBEDDING,), "class embedding"))
    assert (rows[3] == 0).all()
    # No class is the network's own output, to the bit; a class is not.
    assert torch.equal(output(kind, [None, None]), without_classes)
    assert not torch.isclose(output(kind, ["cat", "dog"]), without_classes).all()
    assert "class_embedding.weight" in kind.trainable()


def test_a_class_is_told_by_its_row_and_a_dropped_one_by_the_last(base):
    kind = with_classes(base, NAMES, seed=0)
    batch = {
        "images": torch.full((3, 1, 8, 8), 255, dtype=torch.uint8),
        "noise": torch.zeros(3, 1, 8, 8),
        "labels": torch.tensor([2, 0, 1]),
        "dropped": torch.tensor([False, True, False]),
    }
    clean, conditions = kind.inputs(batch)
    assert (clean == 1).all()
    assert conditions["class_labels"].tolist() == [2, 3, 1]
    assert kind.conditions(["emu", None], torch.device("cpu"))["class_labels"].tolist() == [2, 3]
    clean, conditions = kind.inputs(kind.example(2))
    assert (clean.shape, conditions["class_labels"].tolist()) == ((2, 1, 8, 8), [0, 0])


def test_a_plain_class_conditional_network_keeps_its_rows_and_gets_one_for_none(tmp_path):
    torch.manual_seed(0)
    unet = UNet2DModel(**UNET, num_class_embeds=3)
    rows = unet.class_embedding.weight.detach().clone()
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "plain")
    config = ModelConfig(pretrained=str(tmp_path / "plain"), class_conditional=True)
    kind = with_classes(load_kind(config, None, 0), ["0", "2"], seed=0)
    assert kind.class_names == ["0", "1", "2"]
    assert torch.equal(kind.network.class_embedding.weight, torch.cat([rows, torch.zeros(1, EMBEDDING)]))
    with pytest.raises(UserError, match="found the classes 3; expected numbers from 0 to 2"):
        with_classes(load_kind(config, None, 0), ["0", "3"], seed=0)


def test_a_network_whose_rows_all_have_names_keeps_them_and_gets_a_row_for_none(tmp_path):
    torch.manual_seed(0)
    unet = UNet2DModel(**UNET, num_class_embeds=3)
    rows = unet.class_embedding.weight.detach().clone()
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "named")
    file = tmp_path / "named/model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"id2label": {"0": "emu", "1": "cat", "2": "dog"}}))
    config = ModelConfig(pretrained=str(tmp_path / "named"), class_conditional=True)
    kind = with_classes(load_kind(config, None, 0), ["cat", "dog"], seed=0)
    assert kind.class_names == ["emu", "cat", "dog"]
    assert kind.network.config.num_class_embeds == 4
    assert torch.equal(kind.network.class_embedding.weight, torch.cat([rows, torch.zeros(1, EMBEDDING)]))
    with pytest.raises(UserError, match="found the classes fox, which the pretrained model does not have; expected"):
        with_classes(load_kind(config, None, 0), ["fox"], seed=0)


@pytest.fixture
def exported(base, tmp_path):
    kind = with_classes(base, NAMES, seed=0)
    save_export(kind.save, tmp_path / "pipeline", "card", [])
    return kind, tmp_path / "pipeline"


def test_an_export_is_loaded_with_its_classes_and_weights(exported):
    kind, folder = exported
    config = ModelConfig(pretrained=str(folder), class_conditional=True)
    again = with_classes(load_kind(config, None, 0), ["dog"], seed=9)
    assert again.class_names == NAMES
    assert torch.equal(output(again, ["dog", None]), output(kind, ["dog", None]))
    with pytest.raises(
        UserError, match="found the classes fox, which the pretrained model does not have; expected some"
    ):
        with_classes(load_kind(config, None, 0), ["dog", "fox"], seed=0)


def test_a_class_conditional_network_is_not_trained_without_its_classes(exported):
    _, folder = exported
    with pytest.raises(UserError, match=r"conditioned on 4 classes; set model\.class_conditional=true"):
        load_kind(ModelConfig(pretrained=str(folder)), None, 0)


@pytest.mark.parametrize(
    "names",
    [
        {"0": "cat"},
        {"0": "cat", "1": "cat", "2": "dog"},
        {"1": "a", "2": "b", "3": "c"},
        ["a", "b", "c"],
        7,
        dict(zip("01234", "abcde", strict=True)),
    ],
)
def test_names_that_do_not_fit_the_embedding_are_refused(exported, names):
    _, folder = exported
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"id2label": names}))
    with pytest.raises(
        UserError, match=r"model_index\.json names the classes .*; expected one name for each of the rows"
    ):
        load_kind(ModelConfig(pretrained=str(folder), class_conditional=True), None, 0)


def test_the_number_of_classes_comes_from_the_data():
    config = ModelConfig(unet={**UNET, "num_class_embeds": 5}, class_conditional=True)
    with pytest.raises(UserError, match=r"num_class_embeds: found 5; leave it out"):
        load_kind(config, None, 0)
