"""Pictures of many shapes, and one config run in many batch layouts over them."""

from pathlib import Path
from typing import NamedTuple

from harness.configs import PIPELINES, UNET, crop_of, of_kind, picture, tiny_config, write_caption, write_config
from harness.several_runs import run_configs

SHAPES = [[8, 8], [12, 8], [8, 12], [16, 4], [4, 16]]  # width, height
SIZES = [(16, 16), (25, 16), (16, 24), (41, 10), (11, 40), (30, 22)]  # of the pictures, in turn; 30:22 becomes 12 x 8
ATTENTION = UNET | {
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 4,
}
LAYOUTS = [(1, 16, 1), (1, 4, 4), (2, 4, 2), (2, 1, 8)]  # processes x micro-batch x accumulation steps
TAILS = {  # images -> what the last window of 16 has
    33: "1 image, fewer than processes",
    31: "15 images",
    37: "5 images, of as many shapes",
}


class Case(NamedTuple):
    layout: tuple[int, int, int]
    images: int
    precision: str = "float64"
    kind: str = "unconditional"
    crop: str = ""  # empty: that of its kind
    epochs: int = 2

    @property
    def updates(self) -> int:
        return self.epochs * -(-self.images // 16)

    @property
    def reference(self) -> "Case":
        return self._replace(layout=LAYOUTS[0])

    def __str__(self) -> str:
        cropped = f"-{self.crop}" if self.crop else ""
        return f"{self.kind}-{self.precision}-{'x'.join(map(str, self.layout))}-{self.images}{cropped}"


def write_shapes(folder: Path, count: int, kind: str = "unconditional") -> Path:
    """`count` different grey PNG files of six sizes in turn; for a model of classes in two folders, for one of texts
    beside their captions."""
    for index in range(count):
        home = folder / "ab"[index // 6 % 2] if kind == "classes" else folder
        home.mkdir(parents=True, exist_ok=True)
        picture(SIZES[index % len(SIZES)], index).save(home / f"{index:04}.png")
        if kind in PIPELINES:
            write_caption(home, index)
    return folder


def shaped_config(pictures: Path, output_dir: Path, **changes) -> dict:
    """A run on pictures of five shapes by a network with attention, in windows of 16; the changes may name another."""
    options = {
        "model__unet": ATTENTION,
        "data__buckets": SHAPES,
        "training__micro_batch_size": 4,
        "training__gradient_accumulation_steps": 4,
    }
    return tiny_config(pictures, output_dir, **options | changes)


def run_shaped(base: Path, cases: list[Case]) -> dict[Case, Path]:
    """Run these and their references, one after another, on each number of processes; the output folder of each."""
    cases = sorted({*cases, *(case.reference for case in cases)})
    for processes in sorted({case.layout[0] for case in cases}):
        files = {"float32": [], "float64": []}
        for case in cases:
            if case.layout[0] == processes:
                files[case.precision].append(write_config(base / f"{case}.yaml", _config(base, case)))
        run_configs(processes, files, base / "log")
    return {case: base / str(case) for case in cases}


def _config(base: Path, case: Case) -> dict:
    _, micro, steps = case.layout
    pictures = write_shapes(base / f"{case.kind}-{case.images}", case.images, case.kind)
    return shaped_config(
        pictures,
        base / str(case),
        **of_kind(case.kind, pictures, whole=case.kind in PIPELINES),  # the others have that with attention
        data__crop=case.crop or crop_of(case.kind),
        data__random_flip=True,
        training__micro_batch_size=micro,
        training__gradient_accumulation_steps=steps,
        training__num_epochs=case.epochs,
        training__snr_gamma=5.0,
        lr_scheduler={"name": "cosine", "warmup_steps": 2},
    )
