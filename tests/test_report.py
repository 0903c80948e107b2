"""Curves that go on where they were, cards and words that say what is true."""

import json

from finetune.config import Config
from finetune.metrics import GradientNoiseScale
from finetune.report import History
from finetune.summary import model_card, results
from finetune.windows import Split
from tiny import tiny_config

LINES = [{"step": 0, "validation/loss": 2.0}, {"step": 1, "train/loss": 3.0}, {"step": 2, "train/loss": 1.0}]


def test_history_is_cut_back_to_where_a_run_goes_on(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in LINES) + '{"step": 3, "tra')
    history = History(file, 1)
    assert history.read() == LINES[:2]
    history.add(2, {"train/loss": 5.0})
    assert file.read_text().endswith('{"step": 2, "train/loss": 5.0}\n')  # readable while the run goes on
    assert History(file, -1).read() == []
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_results_name_the_best_step_of_the_exported_weights():
    history = [
        {"step": 0, "validation/loss": 1.0, "validation/loss_ema": 1.0},
        {"step": 5, "validation/loss": 0.1, "validation/loss_ema": 0.5},
        {"step": 9, "validation/loss": 0.2, "validation/loss_ema": 0.6},
    ]
    rows = results(history, 9, 72, 4.0, 2_500_000_000)
    assert rows["validation loss"] == "0.60000, from 1.00000; best 0.50000 at step 5"
    assert rows["updates"] == "9, 72 images in 4 s of training, 18.0 images/s"
    assert rows["compute"] == "2.5 GFLOP an image, 45 GFLOP/s on all processes"


def test_advice_comes_near_the_noise_scale():
    scale = GradientNoiseScale(squared_gradient=1.0, variance=100.0, updates=5)
    # 100 images at 8 x 2 a micro-step: 6.25 accumulation steps
    assert "gradient_accumulation_steps=6 " in scale.advice(Split(8, 1, 2))
    assert "returns diminish from about 100" in scale.advice(Split(8, 1, 2))
    assert GradientNoiseScale().advice(Split(8, 1, 2)) is None


def test_the_card_is_one_that_the_hub_reads(tmp_path):
    from huggingface_hub import ModelCard

    config = Config.model_validate(tiny_config(tmp_path / "pictures", tmp_path / "run"))
    card = ModelCard(model_card(config, {"training loss": "0.1"}, "step-9.png"))
    assert card.data.library_name == "diffusers"
    assert "base_model" not in card.data.to_dict()
    assert "| training loss | 0.1 |" in card.text
    config = Config.model_validate(tiny_config(tmp_path, tmp_path, model={"pretrained": "google/ddpm-cat-256"}))
    assert ModelCard(model_card(config, {}, None)).data.base_model == "google/ddpm-cat-256"
