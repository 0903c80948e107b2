"""README, CONTRIBUTING and docs/ are true: commands run, links lead somewhere, the config reference is current."""

import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from fnmatch import fnmatch

import pytest
import yaml

from finetune.config.load import load_config
from finetune.models.load import outline_kind
from finetune.run.board import PLACES, place
from harness.configs import ROOT, write_config
from harness.processes import run

README, CONTRIBUTING = ((ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = re.findall(r"```bash\n(.*?)```", README + CONTRIBUTING, re.DOTALL)
COMMANDS = {part.strip() for block in BLOCKS for line in block.splitlines() for part in line.split("&&")}
MAIN_JOB = (
    "accelerate launch --quiet --config_file accelerate_config.yaml train.py --config configs/digits-classes.yaml"
)
BASE = "accelerate launch train.py --config configs/digits-base.yaml"
TEXT = "accelerate launch --quiet train.py --config configs/digits-text.yaml"
FEW = "samples.count=0 validation.images=8"
SHORT = f"training.max_train_steps=2 {FEW}"
PRINTED = {  # command -> how its training is cut short, and what it prints
    BASE: (SHORT, "Finished: runs/digits-base"),
    TEXT: (SHORT, "Finished: runs/digits-text"),
    "python train.py --config configs/digits.yaml --check": ("", "Memory: "),
    "accelerate launch --quiet train.py --config configs/digits.yaml output_dir=runs/try training.max_train_steps=20": (
        f"training.global_batch_size=16 {FEW}",
        "Finished: runs/try",
    ),
}
IN_TESTS = {  # command -> the test that runs its recipe on a small pipeline of the same class
    "accelerate launch --config_file configs/accelerate/one-gpu-bf16.yaml train.py --config configs/sd15-lora.yaml "
    "data.source=path/to/pictures": "tests/test_text.py::test_a_recipe_trains_a_small_pipeline",
}
IN_CI = {  # command -> the line of .ci/run, which runs these tests
    "python3 -m venv .venv": '"$python" -m venv "$environment"',
    ". .venv/bin/activate": '. "$environment/bin/activate"',
    "pip install -r requirements.txt": "pip install --quiet -r requirements.txt",
    "pip install -r tests/requirements.txt": "pip install --quiet -r tests/requirements.txt",
    "ruff check .": "ruff check .",
    "ruff format --check .": "ruff format --check .",
    "mypy": "mypy",
    "pytest -n 2": "pytest -n 2",
    'pytest -n 2 -m "not slow"': 'pytest -n 2 -m "not slow"',
}
TENSORBOARD = "tensorboard --logdir runs/digits-classes"
REFERENCE = "python docs/make_config.py"


def test_every_command_is_run_somewhere():
    assert {*IN_CI, *IN_TESTS, *PRINTED, MAIN_JOB, TENSORBOARD, REFERENCE} == COMMANDS
    for file, test in (name.split("::") for name in IN_TESTS.values()):
        assert f"def {test}(" in (ROOT / file).read_text()
    lines = [line.strip() for line in (ROOT / ".ci/run").read_text().splitlines()]
    assert [line for line in IN_CI.values() if line not in lines] == []


def test_commands_of_measurements_have_their_files_options_and_tests():
    """They run for minutes; test_benchmarks.py runs the short form of each benchmark."""
    text = (ROOT / "docs/measurements.md").read_text()
    commands = re.findall(r"^    ((?:python|pytest) .+)$", text, re.MULTILINE)
    assert "python tests/benchmarks/crash.py --kind classes" in commands
    for command in commands:
        files = [word for word in command.split() if word.endswith(".py")]
        code = "".join((ROOT / file).read_text() for file in files)
        assert files
        assert [option for option in re.findall(r"--\w+", command) if f'"{option}"' not in code] == [], command
        assert [name for name in re.findall(r"-k (\w+)", command) if f"{name}_" not in code] == [], command


def test_files_that_are_named_exist():
    """Those that are named from the root of the repository."""
    text = "".join(page.read_text() for page in PAGES)
    paths = re.findall(r"`(?:python )?((?:tests|docs|configs|finetune)/[\w./-]+)", text)
    assert {"finetune/training/optim.py", "docs/make_pictures.py"} <= {*paths}
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_links_lead_somewhere():
    """To files, and to headings of files as GitHub names them."""
    links = [
        (page, "".join(link))
        for page in PAGES
        for link in re.findall(r"\]\(([^)]+)\)|(?:src|srcset)=\"([^\"]+)\"", page.read_text())
        if not "".join(link).startswith("https://")
    ]
    assert (ROOT / "README.md", "docs/pictures/digits-dark.png") in links
    for page, target in links:
        file, _, heading = target.partition("#")
        path = page.parent / file if file else page
        assert path.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings], target


def test_pictures_are_small():
    assert sum(file.stat().st_size for file in (ROOT / "docs/pictures").iterdir()) < 300_000


def test_architecture_names_every_file():
    text = (ROOT / "docs/architecture.md").read_text()
    listed = {}
    for folder, files in re.findall(r"\.\./finetune/(\w+)\) \| ([^|]+) \|", text):
        listed[folder] = sorted(re.findall(r"`(\w+)`", files))
    found = {}
    for file in (ROOT / "finetune").glob("*/*.py"):
        if file.stem != "__init__":
            found.setdefault(file.parent.name, []).append(file.stem)
    assert listed == {folder: sorted(files) for folder, files in found.items()}


def test_the_table_of_curves_says_where_tensorboard_shows_each():
    names, charts = set(), []
    rows = re.findall(r"^\|(.*)\|(.*)\|(.*)\|.*\|$", README.partition("| chart | run |")[2], re.MULTILINE)
    for cells in rows[1:]:  # the first is the line below the head
        named, runs, scalars = (re.findall(r"`(.+?)`", cell) for cell in cells)
        charts = named or charts  # an empty cell means the chart above
        for scalar in scalars:
            run, tag = place(scalar)
            assert run in runs, scalar
            assert any(fnmatch(tag, chart) for chart in charts), scalar
        names.update(scalars)
    assert names == {*PLACES, "train/loss_by_timestep/*", "validation/loss_by_timestep/*", "time/*"}


def test_readme_config_is_valid(tmp_path):
    text = next(block for block in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL) if "runs/mine" in block)
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    assert load_config(file).training.micro_batch_size == "auto"


def test_reference_configs_are_valid(tmp_path):
    """The two that stand first; the networks after them are built below."""
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/config.md").read_text(), re.DOTALL)
    for text in blocks[:2]:
        file = tmp_path / "example.yaml"
        file.write_text(text)
        assert load_config(file).training.global_batch_size == 64


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the repository, in which commands may write."""
    folder = tmp_path_factory.mktemp("readme") / "checkout"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "runs", "__pycache__", "tests", "pictures"))
    return folder


def in_shell(command, checkout):
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    return {"args": command, "shell": True, "cwd": checkout, "env": {**os.environ, "PATH": path}}


def output(command, checkout):
    done = subprocess.run(**in_shell(command, checkout), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def main_job(checkout):
    """What the main job printed, cut short."""
    return output(f"{MAIN_JOB} {SHORT}", checkout)


@pytest.mark.slow
@pytest.mark.parametrize("command", PRINTED)
def test_command(command, checkout):
    cut, printed = PRINTED[command]
    assert printed in output(f"{command} {cut}", checkout)


@pytest.mark.slow
def test_exported_pipeline_is_used_as_shown(main_job, checkout, tmp_path):
    assert "Finished: runs/digits-classes" in main_job
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    script = checkout / "snippet.py"
    script.write_text(snippet + "print(len(images), images[0].size)")
    printed = run(folder=tmp_path, before=lambda: os.chdir(checkout), script=script)
    assert printed.stdout == "3 (16, 16)\n", printed


@pytest.mark.slow
def test_two_processes_on_a_cpu(checkout):
    row = next(line for line in README.splitlines() if "two processes on a CPU" in line)
    command = re.search(r"`(.*)`", row)[1]
    assert "cpu, 2 process(es)" in output(f"{command} output_dir=runs/two {SHORT}", checkout)


def test_networks_of_the_reference_are_built(tmp_path):
    """Without memory for their weights; an image goes through each."""
    text = (ROOT / "docs/config.md").read_text()
    networks = re.findall(r"\(([\d.]+) M parameters\).*?```yaml\n(.*?)```", text, re.DOTALL)
    assert len(networks) == 2
    for millions, block in networks:
        config = yaml.safe_load((ROOT / "configs/digits.yaml").read_text()) | yaml.safe_load(block)
        outline = outline_kind(load_config(write_config(tmp_path / "scratch.yaml", config)).model, None)
        found = sum(parameter.numel() for parameter in outline.network.parameters())
        assert found / 1e6 == pytest.approx(float(millions), abs=0.5)


def test_the_reference_has_a_row_for_each_key():
    """A row of a Markdown table is one line: one that is broken ends the table."""

    def keys(settings, path=""):
        for key, inner in settings.items():
            yield from keys(inner, f"{path}{key}.") if isinstance(inner, dict) and inner else [path + key]

    lines = (ROOT / "docs/config.md").read_text().splitlines()
    rows = [line for line in lines if re.fullmatch(r"\| `[\w.]+` \|( [^|]+ \|){3}", line)]
    config = load_config(ROOT / "configs/digits.yaml").model_dump()
    assert {*keys(config | {"model": config["model"] | {"noise_scheduler": {}}})} <= {row.split("`")[1] for row in rows}
    assert not [line for line in lines if line.startswith("    ") and line.endswith("|")]


@pytest.mark.slow
def test_config_reference_is_current(checkout, tmp_path):
    script = checkout / REFERENCE.removeprefix("python ")
    assert run(folder=tmp_path, script=script).returncode == 0
    assert (checkout / "docs/config.md").read_text() == (ROOT / "docs/config.md").read_text()


@pytest.mark.slow
def test_tensorboard_starts(checkout):
    board = subprocess.Popen(**in_shell(f"exec {TENSORBOARD} --port 6131", checkout), stderr=subprocess.DEVNULL)
    try:
        for _ in range(60):
            time.sleep(0.5)
            try:
                page = urllib.request.urlopen("http://localhost:6131/", timeout=5).read()
                break
            except OSError:
                continue
        assert b"TensorBoard" in page
    finally:
        board.kill()
        board.wait()
