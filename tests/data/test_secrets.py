"""Names in a dataset are not used as paths, and a hub token is neither printed nor written to a file."""

import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune.models import hub
from harness.configs import png, tiny_config, write_config, write_pictures
from harness.processes import finish, run

TOKEN = "hf_" + "aBcDeFgHiJ" * 3


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    base = tmp_path_factory.mktemp("base")
    config = tiny_config(write_pictures(base / "pictures", 8), base / "run", training__num_epochs=1)
    write_config(base / "config.yaml", config)
    return base


def test_names_in_a_dataset_are_not_used_as_paths(base, tmp_path):
    inside = tmp_path / "a/b"
    inside.mkdir(parents=True)
    names = ["../../evil.png", str(tmp_path / "outside/evil.png"), "../evil", "a\x1b[2J\n.png"]
    table = pa.table({"image": [{"bytes": png(), "path": name} for name in names * 2], "label": names * 2})
    pq.write_table(table, inside / "../../evil.parquet")
    arguments = ("--config", base / "config.yaml", f"data.source={tmp_path / 'evil.parquet'}")
    arguments += ("data.label_column=label", "samples.count=1", f"output_dir={inside / 'run'}")
    finish(*arguments, folder=base)
    outside = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if inside / "run" not in path.parents}
    assert set(map(str, outside)) == {"a", "a/b", "a/b/run", "evil.parquet"}
    assert not [path for path in inside.rglob("*") if "evil" in path.name or "\x1b" in path.name]


def traces(folder, outcome):
    """Files and streams that contain the token."""
    files = [file for file in folder.rglob("*") if file.is_file() and TOKEN.encode() in file.read_bytes()]
    return files + [name for name in ("stdout", "stderr") if TOKEN in getattr(outcome, name)]


@pytest.mark.parametrize("reached", [True, False])
def test_a_token_in_the_environment_is_neither_written_nor_printed(base, tmp_path, reached):
    output_dir = tmp_path / "run"

    def request(*arguments, **keywords):
        if not reached:
            raise ConnectionError(f"401 for https://user:{os.environ['HF_TOKEN']}@huggingface.co, or {TOKEN}")

    def before():
        hub.create_repo = hub.upload_folder = request

    arguments = ("--config", base / "config.yaml", f"output_dir={output_dir}", "export.push_to_hub=somebody/digits")
    arguments += ("logging.tracker=tensorboard",)
    outcome = run(*arguments, folder=tmp_path, before=before, HF_TOKEN=TOKEN)
    if reached:
        assert outcome.returncode == 0, outcome.stderr
    else:
        assert outcome.returncode == 1
        assert outcome.error.startswith("export.push_to_hub: somebody/digits: the upload of ")
    assert (output_dir / "pipeline/README.md").exists()
    assert traces(output_dir, outcome) == []


@pytest.mark.parametrize(
    "change",
    [
        "model.pretrained=https://user:{}@huggingface.co/somebody/digits",
        "data.source=https://{}@huggingface.co/datasets/somebody/digits",
        "export.push_to_hub=https://{}@huggingface.co/somebody/digits",
        "export.push_to_hub={}",
        "hub_token={}",
    ],
)
def test_a_token_in_a_config_is_refused_and_not_repeated(base, tmp_path, change):
    more = ("model.unet=null",) if change.startswith("model") else ()
    arguments = ("--config", base / "config.yaml", f"output_dir={tmp_path / 'run'}", change.format(TOKEN), *more)
    outcome = run(*arguments, folder=tmp_path)
    assert (outcome.returncode, bool(outcome.error)) == (2, True)
    assert traces(tmp_path / "run", outcome) == []
    assert not (tmp_path / "run").exists()
