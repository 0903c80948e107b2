"""Fine-tune a diffusion model on your own images, with the batch size that the optimisation wants.

    accelerate launch --config_file accelerate_config.yaml train.py --config configs/digits.yaml
    accelerate launch train.py --config configs/digits.yaml training.max_train_steps=100
    python train.py --config configs/digits.yaml --check

The same command goes on where a run was stopped. A step is an optimizer update everywhere, never a micro-batch.
"""

import argparse
import sys

import torch

from finetune import model
from finetune.capacity import first_split, largest_split, memory_plan
from finetune.compute import ceilings, flops_per_image
from finetune.config import Config, load_config
from finetune.data import Batches, load_images, make_loader, split_images
from finetune.evaluation import Interrupted, Validation
from finetune.launch import exit_code, main_process_first, make_accelerator, on_main_process, processes
from finetune.metrics import Window
from finetune.objective import loss_per_image
from finetune.optim import make_lr_scheduler, make_optimizer, set_hyperparameters
from finetune.run import Run
from finetune.summary import ceiling, plan, split_dependence
from finetune.windows import WindowSampler


def main(config: Config, check: bool = False, measure: bool = False) -> int:
    """Train; or with `check` only say what would be trained, with `measure` also what the machine can do.

    Returns:
        The exit code.
    """
    training = config.training

    # The network, and how a window is split over processes, accumulation steps and micro-batches.
    split = on_main_process(lambda: first_split(training, processes().num_processes))
    accelerator = make_accelerator(config.output_dir, config.logging.tracker, split.gradient_accumulation_steps)
    unet, noise_scheduler = main_process_first(
        lambda: model.load_model(config.model, config.data.resolution, config.seed)
    )
    ema = model.make_ema(unet.to(accelerator.device), config.ema)
    if training.micro_batch_size == "auto":
        split = largest_split(accelerator, unet, split)
        accelerator.gradient_accumulation_steps = split.gradient_accumulation_steps

    # The images, and how many updates they make.
    images = main_process_first(lambda: load_images(config.data, unet.config.in_channels, unet.config.sample_size))
    train_images, held_out = split_images(images, config.data, config.seed)
    flops = flops_per_image(unet)
    counts = len(train_images), len(held_out or ())
    accelerator.print(plan(config, accelerator, split, unet, noise_scheduler, *counts, flops))
    if layers := model.split_dependent_layers(unet):
        accelerator.print(split_dependence(layers))
    if check or measure:
        accelerator.print(memory_plan(unet, split.micro_batch_size, config.ema.enabled))
        if measure:
            accelerator.print(ceiling(ceilings(accelerator.device, accelerator.mixed_precision)))
        return 0

    # What is trained, and what it is fed with.
    sampler = WindowSampler(len(train_images), config.seed, split)
    batches = Batches(
        train_images,
        config.seed,
        noise_scheduler.config.num_train_timesteps,
        training.timestep_sampling,
        unet.config.sample_size,
        config.data.crop,
        config.data.random_flip,
    )
    loader = make_loader(batches, sampler, config.data.num_workers, pin_memory=accelerator.device.type == "cuda")
    denoiser, optimizer, loader = accelerator.prepare(unet, make_optimizer(unet.parameters(), config.optimizer), loader)
    validation = held_out and Validation(held_out, config, noise_scheduler)

    # Where the run is: at its start, or at its newest whole checkpoint.
    run = Run(config, accelerator, unet, noise_scheduler, ema, validation, sampler, images.fingerprint)
    run.resume()
    set_hyperparameters(optimizer, config.optimizer)
    lr_scheduler = make_lr_scheduler(optimizer, config.lr_scheduler, run.total_steps, run.state.updates)

    try:
        run.evaluate()  # the network as it came, or what an interruption left out
        while not run.done:
            sampler.seek(*run.place)
            window = Window(sampler.split)
            try:
                for batch in loader:
                    run.clock.tick("data")
                    with accelerator.accumulate(denoiser):
                        clean, conditioning = model.noised_and_conditioning(batch)
                        noise, timesteps = batch["noise"], batch["timesteps"]
                        noisy = noise_scheduler.add_noise(clean, noise, timesteps)
                        prediction = denoiser(noisy, timesteps, **conditioning).sample
                        losses = loss_per_image(
                            noise_scheduler, prediction, clean, noise, timesteps, training.snr_gamma
                        )
                        accelerator.backward((batch["weights"] * losses).sum())
                        window.add(losses, denoiser.parameters())
                        run.clock.tick("compute")
                        if accelerator.sync_gradients:
                            max_norm = training.max_grad_norm or torch.inf
                            grad_norm = accelerator.clip_grad_norm_(denoiser.parameters(), max_norm)
                            result = window.close(accelerator, len(run.positions), grad_norm, run.stop.requested())
                            if not result.finite:
                                run.refuse(result)
                                optimizer.zero_grad()  # without gradients the step below leaves all as it is
                        optimizer.step()
                        optimizer.zero_grad()
                    if not accelerator.sync_gradients:
                        continue

                    # One update is done.
                    learning_rate = lr_scheduler.get_last_lr()[0]
                    applied = result.finite and not accelerator.optimizer_step_was_skipped
                    if applied:
                        lr_scheduler.step()
                        if ema is not None:
                            ema.step(unet.parameters())
                    run.finish_step(result, learning_rate, applied)
                    run.evaluate()
                    if run.state.step % config.checkpoint.every_steps == 0:
                        run.save()
                    if result.stop:
                        raise Interrupted
                    if run.done:
                        break
                    window = Window(sampler.split)
            except (RuntimeError, MemoryError, OSError) as error:  # the last: no room for the workers' queues
                losses = prediction = None  # their graph holds the memory that was asked for
                run.recover(error, window)  # and the same window again, if that is possible
    except Interrupted:
        run.interrupt()
        return run.stop.exit_code
    run.finish(flops)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tune a diffusion model on your own images.")
    parser.add_argument("--config", required=True, metavar="FILE", help="the run's config (YAML)")
    parser.add_argument("--check", action="store_true", help="validate config, data and model, show the plan, and stop")
    parser.add_argument("--measure", action="store_true", help="as --check, and measure what the machine can compute")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="keys of the config to override")
    return parser.parse_intermixed_args()


def run(arguments: argparse.Namespace) -> int:
    config = on_main_process(lambda: load_config(arguments.config, arguments.overrides))
    return main(config, arguments.check, arguments.measure)


if __name__ == "__main__":
    parsed = parse_arguments()
    sys.exit(exit_code(lambda: run(parsed)))
