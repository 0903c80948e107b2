"""The trainer against loops that anyone can check: plain PyTorch, no Accelerate, no windows, no weights of slots."""

from pathlib import Path

import pytest
import torch

from finetune.config.schema import Config
from finetune.core.randomness import noise, timesteps
from finetune.data.loading import load_data
from finetune.data.order import epoch_order
from finetune.models.load import load_kind
from harness.compare import history, relative_difference, weights
from harness.configs import UNET, tiny_config, write_config, write_pictures
from harness.faults import skip_the_export
from harness.processes import finish

IMAGES, BATCH, EPOCHS, STEPS = 19, 8, 3, 9  # 8 + 8 + 3, three times


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    base = tmp_path_factory.mktemp("trained")
    options = {"model__unet": UNET, "training__num_epochs": EPOCHS}
    config = tiny_config(write_pictures(base / "pictures", IMAGES), base / "run", **options)
    finish("--config", write_config(base / "config.yaml", config), folder=base, before=skip_the_export)
    return Config.model_validate(config)


def plain_training(config, micro_batch_size=None):
    """Big batches at once, or accumulation as it is usually written: divide, add up, step at a window's end, flush the
    last one.

    Usually the loss is divided by the accumulation steps, which is wrong for a last window that has fewer images; here
    it is by the images of the window.
    """
    kind = load_kind(config.model, None, config.seed)
    unet, noise_scheduler = kind.network, kind.noise_scheduler
    pictures, _ = load_data(config.data, kind.image_format, config.seed)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=config.optimizer.learning_rate)
    losses = []
    for epoch in range(EPOCHS):
        order = epoch_order(config.seed, epoch, IMAGES)
        for start in range(0, IMAGES, BATCH):
            window, total = range(start, min(start + BATCH, IMAGES)), 0.0
            size = micro_batch_size or len(window)
            for micro in (window[i : i + size] for i in range(0, len(window), size)):
                pixels = torch.stack([torch.tensor(pictures.pixels(order[p]).copy()) for p in micro])
                clean = pixels.permute(0, 3, 1, 2) / 127.5 - 1
                drawn = torch.stack([noise(config.seed, epoch, p, (1, 8, 8)) for p in micro])
                steps = torch.from_numpy(timesteps(config.seed, epoch, micro, 100, "stratified"))
                predicted = unet(noise_scheduler.add_noise(clean, drawn, steps), steps).sample
                loss = torch.nn.functional.mse_loss(predicted, drawn) * len(micro) / len(window)
                loss.backward()
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total)
    return unet.state_dict(), losses


@pytest.mark.parametrize("micro_batch_size", [None, 4, 3])
def test_a_run_ends_with_the_weights_of_a_plain_loop(trained, micro_batch_size):
    expected, losses = plain_training(trained, micro_batch_size)
    assert relative_difference(expected, weights(Path(trained.output_dir), STEPS)) < 1e-5
    logged = [line["train/loss"] for line in history(Path(trained.output_dir))]
    assert logged == pytest.approx(losses, rel=1e-5)
