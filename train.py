"""Fine-tune a diffusion model on your own images at any effective batch size.

    accelerate launch --config_file accelerate_config.yaml train.py --config configs/digits-classes.yaml
    accelerate launch train.py --config configs/digits.yaml training.max_train_steps=100
    python train.py --config configs/digits.yaml --check

Run the same command again to resume a run. A step is an optimizer update everywhere, never a micro-batch.

After an error `accelerate launch` prints a traceback of its own, which `--quiet` leaves out with one process; it ends
with exit code 1 in any case. `python train.py` ends with 2 after a mistake in the config, the data or the launch, 1
after another failure, 130 after Ctrl-C and 143 after any other signal; the last two are resumable.
"""

if __name__ == "__main__":  # before the other imports, which take seconds
    from finetune.core.launcher import prepare_for_imports

    prepare_for_imports()

import argparse
import sys

import torch
from accelerate import Accelerator

from finetune.config.load import load_config
from finetune.config.schema import Config
from finetune.core.batch import resolve_layout
from finetune.core.distributed import main_process_first, on_main_process, say, together
from finetune.core.environment import check_environment
from finetune.core.failures import exit_code
from finetune.core.groups import processes
from finetune.core.hosts import check_same_command
from finetune.core.launch import accelerator_options, check_launch, check_processes, launch_errors, use_available_cores
from finetune.core.launch_config import take_launch_config
from finetune.core.sharding import check_sharding, place
from finetune.core.stopping import Interrupted
from finetune.data.encoded_batches import find_encodings, make_batches
from finetune.data.loading import load_images
from finetune.data.order import WindowSampler
from finetune.data.workers import make_loader
from finetune.evaluation.evaluations import choose_samples, make_evaluations, make_quality
from finetune.evaluation.prediction_type import DRAWS, check_prediction_type
from finetune.models.classes import with_classes
from finetune.models.ema import make_ema
from finetune.models.load import outline_kind
from finetune.run.plan import data_notes, peak_throughput, plan, shapes_note
from finetune.run.recovery import check_finite, explain_failure
from finetune.run.start import start_run
from finetune.run.starting_point import find_start
from finetune.training.compute import flops_per_image, peak_rates
from finetune.training.memory import largest_layout, memory_plan, state_plan
from finetune.training.objective import loss_per_image
from finetune.training.optim import make_lr_scheduler, make_optimizer, set_hyperparameters
from finetune.training.soundness import check_compiled


def main(config: Config, check: bool = False, measure: bool = False) -> int:
    """Train; with `check` only print the plan, with `measure` also measure peak throughput.

    Returns:
        The exit code.
    """
    training, crops = config.training, config.data.crop == "random"

    # Batch layout and Accelerator: global batch = micro-batch x accumulation steps x processes.
    sizes = training.global_batch_size, training.micro_batch_size, training.gradient_accumulation_steps
    layout = on_main_process(lambda: resolve_layout(*sizes, processes().num_processes))
    with launch_errors(config.logging.tracker):
        accelerator = Accelerator(
            gradient_accumulation_steps=layout.gradient_accumulation_steps,
            log_with=config.logging.tracker,
            project_dir=config.output_dir,
            **accelerator_options(),
        )
    together(lambda: check_launch(accelerator, layout.gradient_accumulation_steps, config.logging.tracker))
    check_sharding(accelerator, training.shard)
    use_available_cores(accelerator)

    # Model and images. What the model will take of memory is printed before it is loaded.
    outline = main_process_first(lambda: outline_kind(config.model, config.data.resolution, crops))
    taken = layout.num_processes, config.ema.enabled, training.shard, outline.crop_encoder
    say(together(lambda: state_plan(accelerator, outline.network, *taken)))
    kind = main_process_first(lambda: outline.load(config.seed))
    train_images, held_out = load_images(config, kind)
    if config.model.class_conditional:
        kind = together(lambda: with_classes(kind, train_images.class_names, config.seed))
    samples, quality = choose_samples(config, kind, train_images), make_quality(config, kind, held_out)

    # On the device: the network, and the moving average of its weights.
    place(accelerator, kind, training.shard)
    parameters = list(kind.trainable().values())
    noise_scheduler, ema = kind.noise_scheduler, make_ema(parameters, config.ema)
    if training.micro_batch_size == "auto":
        layout = largest_layout(accelerator, kind, layout, config.ema.enabled)
        accelerator.gradient_accumulation_steps = layout.gradient_accumulation_steps

    # The order of the images, and what a model of latents needs encoded.
    required = together(lambda: find_encodings(config, kind, train_images, held_out, samples.texts))
    sampler = WindowSampler(len(train_images), config.seed, layout, train_images.shape_numbers, config.data.order)

    # Where the run starts: at the newest valid checkpoint, if any. Nothing is written yet.
    start = find_start(config, kind, layout, len(train_images), train_images.fingerprint)

    # The plan.
    data, counts = (train_images, held_out, required), (len(train_images), len(held_out or ()))
    flops, note = flops_per_image(kind, train_images.shapes), shapes_note(train_images.shapes, sampler)
    say(on_main_process(lambda: plan(config, accelerator, layout, kind, *counts, data_notes(kind, *data), flops, note)))

    # Encoded once, before training; a check encodes only the images of `check_prediction_type`.
    encodings = None if required is None else required.make(accelerator, DRAWS if check or measure else None)

    # What it is trained on and evaluated by.
    batches = make_batches(config, kind, train_images, encodings)
    evaluations = make_evaluations(config, kind, samples, quality, held_out, encodings)
    if config.model.pretrained is not None:
        together(lambda: check_prediction_type(kind, batches, config.seed, accelerator.device))
    if check or measure:
        say(memory_plan(accelerator, kind, layout, config.ema.enabled))
        check_compiled(accelerator, accelerator.prepare(kind.network), kind, layout.micro_batch_size)
        if measure:
            say(peak_throughput(peak_rates(accelerator.device, accelerator.mixed_precision)))
        return 0

    # Loader and optimizer.
    loader = make_loader(batches, sampler, config.data.num_workers, pin_memory=accelerator.device.type == "cuda")
    optimizer = make_optimizer(parameters, config.optimizer)
    unet, optimizer, loader = accelerator.prepare(kind.network, optimizer, loader)
    check_compiled(accelerator, unet, kind, layout.micro_batch_size)

    # From here on files are written.
    run = start_run(start, config, accelerator, kind, optimizer, ema, evaluations, batches, sampler)
    set_hyperparameters(optimizer, config.optimizer)
    lr_scheduler = make_lr_scheduler(optimizer, config.lr_scheduler, run.length.total_steps, run.state.updates)

    try:
        run.evaluate()  # baseline evaluation, or one that an interruption skipped
        for batch in run.batches(loader):
            if not run.window.losses:  # a window of many shapes takes as many micro-steps as its shapes need
                accelerator.gradient_accumulation_steps, accelerator.step = run.window.accumulation_steps, 0
            with accelerator.accumulate(unet):
                clean_images, conditions = kind.inputs(batch)
                noise, timesteps = batch["noise"], batch["timesteps"]
                noisy_images = noise_scheduler.add_noise(clean_images, noise, timesteps)
                prediction = unet(noisy_images, timesteps, **conditions).sample
                losses = loss_per_image(noise_scheduler, prediction, clean_images, noise, timesteps, training.snr_gamma)
                accelerator.backward((batch["weights"] * losses).sum())
                run.window.add(losses, parameters)
                if accelerator.sync_gradients:
                    grad_norm = accelerator.clip_grad_norm_(parameters, training.max_grad_norm or torch.inf)
                    result = run.close_window(grad_norm)
                    check_finite(run, result)
                    if not result.finite:
                        optimizer.zero_grad()  # no gradients: optimizer.step() is a no-op
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
                    ema.step(parameters)
            run.finish_step(result, learning_rate, applied)
            run.evaluate()
            run.save_if_due()
            if result.stop:
                raise Interrupted
    except Interrupted:
        return run.interrupt()
    except (RuntimeError, MemoryError, OSError) as error:  # OSError: shared memory exhausted
        explain_failure(run, error)
        raise
    return run.finish(flops)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tune a diffusion model on your own images.")
    parser.add_argument("--config", required=True, metavar="FILE", help="the run's config (YAML)")
    parser.add_argument("--check", action="store_true", help="validate config, data and model, print the plan and exit")
    parser.add_argument("--measure", action="store_true", help="like --check, and measure this machine's throughput")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="keys of the config to override")
    return parser.parse_intermixed_args()


def run(arguments: argparse.Namespace) -> int:
    check_environment()
    take_launch_config()
    check_processes()
    check_same_command(**vars(arguments))
    config = on_main_process(lambda: load_config(arguments.config, arguments.overrides))
    return main(config, arguments.check, arguments.measure)


if __name__ == "__main__":
    parsed = parse_arguments()
    sys.exit(exit_code(lambda: run(parsed)))
