"""Distances between samples and held-out images, by numbers worked out by hand."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from finetune.config.outputs import QualityConfig
from finetune.core.errors import UserError
from finetune.core.shapes import Shape
from finetune.evaluation.quality import Features, Quality, feature_distances
from harness.features import processor, save_resnet

IMAGES = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), dtype=np.uint8)


def test_shifted_features_of_equal_spread_are_the_squared_shift_apart():
    # Two clouds with the same covariance and means (0, 0) and (3, 4): |m1 - m2|^2 = 25, and the trace term vanishes.
    cloud = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    assert feature_distances(cloud, cloud + torch.tensor([3.0, 4.0]))["frechet_distance"] == pytest.approx(25, abs=1e-5)
    assert feature_distances(cloud, cloud)["frechet_distance"] == pytest.approx(0, abs=1e-5)


def test_wider_features_of_equal_mean_are_apart_by_the_difference_of_their_deviations():
    # Unbiased variances 4 x 1 / 3 and 4 x 9 / 3: (sqrt(12) - sqrt(4/3))^2 = (2 sqrt(4/3))^2 = 16 / 3.
    line = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    assert feature_distances(line, 3 * line)["frechet_distance"] == pytest.approx(16 / 3, abs=1e-4)


def test_kernel_distance_is_the_unbiased_estimate_over_pairs_of_other_conditions():
    # k(x, y) = (x y + 1)^3 in one dimension. Real {0, 1}, fake {1, 2}, in pairs (0, 1) and (1, 2): mean over i != j of
    # each set, k(0,1) = 1 and k(1,2) = 27; across k(0,2) = 1 and k(1,1) = 8: 1 + 27 - 2 x 9/2 = 19.
    found = feature_distances(torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [2.0]]))
    assert found["kernel_distance"] == pytest.approx(19)


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_perfect_samples_of_features_that_the_class_decides_are_at_no_distance(rounds):
    """Counted between the sets, but not within them, pairs of one image would bring it to -24."""
    classes = torch.tensor([[0.0, 1.0], [3.0, 0.0], [0.0, 1.0], [0.0, -2.0]])
    found = feature_distances(classes, classes.repeat(rounds, 1))
    assert found["kernel_distance"] == pytest.approx(0, abs=1e-12)


def test_perfect_samples_by_class_vary_around_no_distance():
    """1,000 sets of 20 images of four classes; the mean is within four of its standard errors of 0."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(1000):
        centres = 2 * torch.eye(4)[torch.randint(4, (20,), generator=generator)]
        real, fake = (centres + 0.5 * torch.randn(20, 4, generator=generator) for _ in range(2))
        found.append(feature_distances(real, fake)["kernel_distance"])
    assert abs(np.mean(found)) < 4 * np.std(found) / 1000**0.5
    assert np.std(found) / 1000**0.5 < 0.02


def test_the_global_generator_is_left_as_it_was():
    before = torch.get_rng_state()
    feature_distances(torch.randn(6, 2, generator=torch.Generator().manual_seed(0)), torch.zeros(6, 2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("wanted", [1, 3])
def test_grey_colour_and_transparent_images_fit_any_model(tmp_path, channels, wanted):
    features = Features(save_resnet(tmp_path, wanted))
    images = IMAGES.repeat(channels, axis=-1)
    assert features.of(images).shape == (20, 16)
    # Repeated or averaged, equal channels are the same picture to the model.
    assert torch.equal(features.of(images), features.of(IMAGES))


def test_a_model_without_a_pooling_layer_is_averaged_over_its_tokens(tmp_path):
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=16, patch_size=8
    )
    model = ViTModel(config, add_pooling_layer=False)
    model.save_pretrained(tmp_path)
    processor(3).save_pretrained(tmp_path)
    features = Features(str(tmp_path))
    features.model.pooler = None
    found = features.of(IMAGES[:2])
    pixels = features.processor(
        list(IMAGES[:2].repeat(3, axis=-1)), return_tensors="pt", input_data_format="channels_last"
    )
    with torch.no_grad():
        expected = features.model(**pixels).last_hidden_state.mean(1)
    assert torch.equal(found, expected)


def test_chunks_do_not_change_the_features(tmp_path):
    """20 images in chunks of 8, 8 and 4 are those of each alone, up to the order of sums."""
    quality = Quality(QualityConfig(features=save_resnet(tmp_path), images=30, every_steps=1), IMAGES, [None])
    assert (len(quality.images), len(quality.names)) == (20, 30)
    shared = quality._shared(IMAGES, Accelerator(cpu=True), lambda: None)
    alone = torch.cat([quality.features.of(image[None]) for image in IMAGES])
    torch.testing.assert_close(shared, alone, rtol=1e-5, atol=1e-6)


def test_images_of_many_shapes_go_through_the_network_with_their_own(tmp_path):
    """Twelve squares and eight of 4 x 16, in turns: the features of each are those that it has alone."""
    images = [IMAGES[0].repeat(2, axis=1)[:4] if index % 5 < 2 else image for index, image in enumerate(IMAGES)]
    quality = Quality(QualityConfig(features=save_resnet(tmp_path), images=30, every_steps=1), images, [None])
    shapes = [Shape(4, 16) if index % 5 < 2 else Shape(8, 8) for index in range(20)]
    assert quality.shapes == shapes + shapes[:10]  # samples go through the held-out images again
    shared = quality._shared(images, Accelerator(cpu=True), lambda: None)
    alone = torch.cat([quality.features.of(image[None]) for image in images])
    torch.testing.assert_close(shared, alone, rtol=1e-5, atol=1e-6)
    distances = quality.distances(images, Accelerator(cpu=True), lambda: None)
    assert distances["frechet_distance"] == pytest.approx(0, abs=1e-4)


def test_samples_are_drawn_for_the_conditions_of_the_held_out_images(tmp_path):
    quality = Quality(QualityConfig(features=save_resnet(tmp_path), images=5), IMAGES[:3], ["a", "b", "a"])
    assert quality.names == ["a", "b", "a", "a", "b"]


def test_a_folder_that_holds_no_image_model_is_refused_in_one_line(tmp_path):
    for name in (str(tmp_path), "no/where"):
        with pytest.raises(UserError, match=r"validation\.quality\.features: .* cannot be loaded") as failure:
            Features(name)
        assert len(failure.value.problems) == 1
        assert "\n" not in failure.value.problems[0]


def test_a_model_of_text_is_refused_before_the_run(tmp_path):
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 9}
    BertModel(BertConfig(**size)).save_pretrained(tmp_path)
    processor(3).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"validation\.quality\.features: .*input_ids.*; expected .* an image model"):
        Features(str(tmp_path))
