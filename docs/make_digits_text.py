"""Makes configs/digits-text-base: a miniature of Stable Diffusion that draws the handwritten digits 0 to 4 by caption.

python docs/make_digits_text.py                                # trains, saves and measures: minutes on two CPU cores
python docs/make_digits_text.py --measure                      # measures the folder as it is
python docs/make_digits_text.py --lora runs/digits-text/lora   # with an adapter, and draws the README's picture of it
"""

import argparse
import string
import sys
import time
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel  # noqa: E402
from diffusers.optimization import get_scheduler  # noqa: E402
from make_pictures import PICTURES, THEMES  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from PIL import Image  # noqa: E402
from sklearn.svm import SVC  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer  # noqa: E402
from transformers.convert_slow_tokenizer import bytes_to_unicode  # noqa: E402

from finetune.data.decode import decode  # noqa: E402
from finetune.data.sources import open_source  # noqa: E402

FOLDER = ROOT / "configs/digits-text-base"
MOST_BYTES = 3_000_000
RESOLUTION, TOKENS, BATCH = 32, 32, 64
KNOWN, NEW = range(5), range(5, 10)  # the digits that the base is taught, and those left for fine-tuning
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
OPENINGS = (
    "",
    "a picture of",
    "an image of",
    "a photo of",
    "a scan of",
    "a drawing of",
    "draw",
    "please write",
    "this is",
)
MIDDLES = ("{}", "a {}", "the {}", "a handwritten {}", "the digit {}", "the handwritten digit {}", "the number {}")
ENDINGS = ("", "written by hand", "in white on black", "on a black background", "drawn with a pen", "on paper")
TEMPLATES = tuple(" ".join(filter(None, parts)) for parts in product(OPENINGS, MIDDLES, ENDINGS))
ASKED = ("a handwritten {}", "the digit {}", "a picture of the number {}", "please write a {} on paper")
UNSEEN = ("a sketch of the figure {}", "show me the numeral {} in ink", "a small {} .", "{} written with a brush")
SHADES = "grey bold thin tiny large round sharp old new red green blue yellow photograph painting pencil style"
SPELLING = [*string.ascii_lowercase, *string.digits, *string.punctuation]
WORDS = sorted({*" ".join((*NUMBERS, *TEMPLATES, *UNSEEN, SHADES, *SPELLING)).split()})


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """All digits as the trainer decodes them, (n, 3, 32, 32) in -1 .. 1, and which they are, (n,)."""
    rows = open_source("digits").splits["train"]
    pictures = np.stack([decode(row["image"]["bytes"], 3, RESOLUTION, "center", "white") for row in rows])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1, torch.tensor(rows["label"])


def make_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-pair encoding with a vocabulary in which each of WORDS is one token; other words are spelled."""
    letters = sorted(bytes_to_unicode().values())
    vocabulary = {token: index for index, token in enumerate((*letters, *(letter + "</w>" for letter in letters)))}
    merges: list[tuple[str, str]] = []
    for word in WORDS:  # a merge ranks behind the earlier ones, so that words which are one token stay so
        while len(pieces := CLIPTokenizer(vocab=vocabulary, merges=merges).tokenize(word)) > 1:
            merges.append((pieces[0], pieces[1]))
            vocabulary.setdefault("".join(merges[-1]), len(vocabulary))
    for token in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[token] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A CLIP text model of random weights: it tells words apart, and the UNet learns what they mean.

    The embeddings of words get a deviation of 0.5, those of places 0.1. As CLIP starts, with 0.02 for both, a word is
    lost in the mean of the words before it, and the UNet learns little from captions of so many forms.
    """
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        projection_dim=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    text_encoder = CLIPTextModel(config).eval().requires_grad_(False)
    text_encoder.embeddings.token_embedding.weight.normal_(std=0.5)
    text_encoder.embeddings.position_embedding.weight.normal_(std=0.1)
    return text_encoder


def train(network: torch.nn.Module, loss: Callable[[], torch.Tensor], updates: int, learning_rate: float) -> None:
    """AdamW on the loss of one batch after another, printed as it falls; the network is frozen afterwards."""
    optimizer = torch.optim.AdamW(network.parameters(), learning_rate)
    lr_scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=20, num_training_steps=updates)
    start, losses = time.process_time(), []
    for update in range(1, updates + 1):
        batch_loss = loss()
        batch_loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        losses.append(batch_loss.item())
        if update % 100 == 0:
            used = time.process_time() - start
            print(f"{update} updates, {used:.0f} CPU-s: loss {np.mean(losses[-100:]):.4f}", flush=True)
    network.eval().requires_grad_(False)


def train_vae(pictures: torch.Tensor) -> AutoencoderKL:
    """An autoencoder of all digits, 3 x 32 x 32 to 4 x 8 x 8; its scaling factor brings latents to a deviation of 1."""
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[16, 32, 32],
        norm_num_groups=8,
        sample_size=RESOLUTION,
    )

    def loss() -> torch.Tensor:
        batch = pictures[torch.randint(len(pictures), (BATCH // 2,))]
        posterior = vae.encode(batch).latent_dist
        return F.mse_loss(vae.decode(posterior.sample()).sample, batch) + 3e-6 * posterior.kl().mean()

    train(vae, loss, updates=300, learning_rate=4e-3)
    with torch.no_grad():
        deviation = vae.encode(pictures).latent_dist.sample().std().item()
    vae.register_to_config(scaling_factor=round(1 / deviation, 4))
    return vae


def make_unet() -> UNet2DConditionModel:
    """A UNet of 1.06 M random weights for latents of 4 x 8 x 8, with cross-attention on both of its levels."""
    return UNet2DConditionModel(
        sample_size=RESOLUTION // 4,
        down_block_types=["CrossAttnDownBlock2D"] * 2,
        up_block_types=["CrossAttnUpBlock2D"] * 2,
        block_out_channels=[32, 64],
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def train_unet(pipeline: StableDiffusionPipeline, pictures: torch.Tensor, labels: torch.Tensor) -> None:
    """Teaches the pipeline's UNet the digits of KNOWN by captions of all TEMPLATES; an eighth of them is dropped."""
    known = labels <= max(KNOWN)
    posterior, labels = pipeline.vae.encode(pictures[known]).latent_dist, labels[known]
    captions = [template.format(NUMBERS[digit]) for digit in KNOWN for template in TEMPLATES]
    texts = pipeline.encode_prompt([*captions, ""], "cpu", 1, False)[0]  # the empty caption is the last row
    noise_scheduler, scale = pipeline.scheduler, pipeline.vae.config.scaling_factor

    def loss() -> torch.Tensor:
        chosen = torch.randint(len(labels), (BATCH,))
        latents = scale * (
            posterior.mean[chosen] + posterior.std[chosen] * torch.randn(BATCH, *posterior.mean.shape[1:])
        )
        rows = labels[chosen] * len(TEMPLATES) + torch.randint(len(TEMPLATES), (BATCH,))
        rows[torch.rand(BATCH) < 1 / 8] = len(captions)
        places = (torch.arange(BATCH) + torch.rand(BATCH)) / BATCH  # one timestep in each 64th of the noise levels
        timesteps = (places * noise_scheduler.config.num_train_timesteps).long()
        noise = torch.randn_like(latents)
        noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
        velocity = noise_scheduler.get_velocity(latents, noise, timesteps)
        return F.mse_loss(pipeline.unet(noisy_latents, timesteps, texts[rows]).sample, velocity)

    train(pipeline.unet, loss, updates=700, learning_rate=3e-3)


def make() -> None:
    """Trains the pipeline and saves it to FOLDER."""
    torch.manual_seed(0)
    pictures, labels = digits()
    tokenizer = make_tokenizer()
    noise_scheduler = DDIMScheduler(  # as Stable Diffusion 2 has it
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",  # weighs high noise, where the caption decides, more than epsilon would
    )
    pipeline = StableDiffusionPipeline(
        text_encoder=make_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=make_unet(),
        vae=train_vae(pictures),
        scheduler=noise_scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    train_unet(pipeline, pictures, labels)
    # The text encoder stays in float32. Where no dtype is asked for, transformers loads what was saved and diffusers
    # float32, and the two would not fit together.
    pipeline.unet.half()
    pipeline.vae.half()
    pipeline.save_pretrained(FOLDER)


def load(lora: Path | None = None) -> StableDiffusionPipeline:
    """The saved pipeline, with an adapter if there is one; refuses a folder that is too large, or lost its words."""
    pipeline = StableDiffusionPipeline.from_pretrained(FOLDER)
    pipeline.set_progress_bar_config(disable=True)
    size = sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file())
    assert size <= MOST_BYTES, size
    assert pipeline.tokenizer.get_vocab() == make_tokenizer().get_vocab()
    assert [word for word in WORDS if len(pipeline.tokenizer.tokenize(word)) != 1] == []
    if lora:
        pipeline.load_lora_weights(lora)
    return pipeline


def drawn(pipeline: StableDiffusionPipeline, template: str, asked: Iterable[int]) -> torch.Tensor:
    """A picture of each digit asked for at guidance 3 in 20 steps, (n, 3, 32, 32) in -1 .. 1."""
    captions = [template.format(NUMBERS[digit]) for digit in asked]
    options = {"num_inference_steps": 20, "guidance_scale": 3.0, "output_type": "pt"}
    return pipeline(captions, generator=torch.Generator().manual_seed(1), **options).images * 2 - 1


class Judge:
    """Reads pictures, at the size that scikit-learn's digits have, by an SVC trained on all the real ones."""

    def __init__(self, pictures: torch.Tensor, labels: torch.Tensor) -> None:
        self.svc = SVC(gamma=0.001).fit(self.shrunk(pictures), labels)

    @staticmethod
    def shrunk(pictures: torch.Tensor) -> np.ndarray:
        """Pictures (n, 3, 32, 32) in -1 .. 1 as (n, 64) in 0 .. 16."""
        return 8 * (F.avg_pool2d(pictures.mean(1), RESOLUTION // 8).flatten(1).numpy() + 1)

    def share(self, pictures: torch.Tensor, labels: Iterable[int]) -> float:
        """The share of pictures that are read as their labels say."""
        return float((self.svc.predict(self.shrunk(pictures)) == np.array(list(labels))).mean())


def measure(pipeline: StableDiffusionPipeline, pictures: torch.Tensor, labels: torch.Tensor, each: int = 20) -> None:
    """Prints how well the autoencoder reconstructs, and in how many pictures the requested digit is read."""
    judge = Judge(pictures, labels)
    with torch.no_grad():
        latents = pipeline.vae.encode(pictures).latent_dist.sample(torch.Generator().manual_seed(0))
        decoded = pipeline.vae.decode(latents).sample.clamp(-1, 1)
    error, read = F.mse_loss(decoded, pictures), judge.share(decoded, labels.tolist())
    print(f"Reconstructions: mean squared error {error:.4f}, {read:.1%} are read.\n")
    print("| caption | 0 to 4 | 5 to 9 |\n|---|---|---|")
    for template in ASKED + UNSEEN:
        row = [template.format("...") + " (none like it in training)" * (template in UNSEEN)]
        for digits_asked in (KNOWN, NEW):
            asked = [digit for digit in digits_asked for _ in range(each)]
            row.append(f"{judge.share(drawn(pipeline, template, asked), asked):.0%}")
        print(f"| {' | '.join(row)} |", flush=True)


def draw(before: StableDiffusionPipeline, after: StableDiffusionPipeline, rows: int = 4) -> None:
    """docs/pictures/digits-text-light.png and -dark.png: the new digits without the adapter and with it."""
    asked = [digit for _ in range(rows) for digit in NEW]
    grids = [drawn(pipeline, "a handwritten {}", asked) for pipeline in (before, after)]
    for theme, (background, text, *_) in THEMES.items():
        figure = Figure(figsize=(9, 4.3), dpi=80, layout="constrained", facecolor=background)
        for axes, grid, title in zip(figure.subplots(1, 2), grids, ("before", "after"), strict=True):
            tiles = F.pad(grid.mean(1), (1, 1, 1, 1), value=-1).numpy()
            side = tiles.shape[-1]
            axes.imshow(
                tiles.reshape(rows, len(NEW), side, side).swapaxes(1, 2).reshape(rows * side, -1),
                cmap="gray",
                vmin=-1,
                vmax=1,
                interpolation="nearest",
            )
            for column, digit in enumerate(NEW):
                axes.text((column + 0.5) * side, -4, NUMBERS[digit], color=text, fontsize=10, ha="center")
            axes.set_title(title, color=text, fontsize=12, pad=20)
            axes.axis("off")
        file = PICTURES / f"digits-text-{theme}.png"
        figure.savefig(file)
        Image.open(file).convert("L").quantize(32).save(file, optimize=True)  # the digits have no colour


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="measure the folder as it is instead of making it")
    parser.add_argument(
        "--lora", type=Path, metavar="FOLDER", help="measure and draw an adapter of the folder as it is"
    )
    arguments = parser.parse_args()
    if not (arguments.measure or arguments.lora):
        make()
    pipeline = load(arguments.lora)
    if arguments.lora:
        draw(load(), pipeline)
    measure(pipeline, *digits())


if __name__ == "__main__":
    main()
