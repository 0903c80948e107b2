"""Config files for the tests of reading them: the shortest valid one, which tests change."""

from pathlib import Path

from finetune.config.load import load_config
from finetune.config.schema import Config

VALID = """\
output_dir: runs/test
model: {pretrained: user/base}
data:
  source: digits
training:
  micro_batch_size: 16
  gradient_accumulation_steps: 4
  num_epochs: 2
"""


def write(folder: Path, content: str | bytes) -> Path:
    """A config file with this content."""
    folder.mkdir(exist_ok=True)
    file = folder / "run.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def load_valid(folder: Path, *overrides: str) -> Config:
    """The shortest valid config with overrides."""
    return load_config(write(folder, VALID), overrides)
