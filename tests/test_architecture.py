"""Who may import whom: folders are floors, and a module imports from lower floors or from its own folder only.

And what is imported from elsewhere is pinned.
"""

import ast
import sys
from pathlib import Path

import pytest

from harness.configs import ROOT

FLOORS = {"core": 1, "config": 2, "models": 3, "training": 3, "data": 3, "evaluation": 4, "run": 5}
PACKAGE = "finetune"
PACKAGE_OF = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "PyYAML"}
BACK_ENDS = {"aiohttp"}  # for http:// sources alone, as s3fs for s3://: who names such a source is told to install it
COMMANDS = {"mypy", "pytest-xdist", "ruff"}  # are pinned for tests, and not imported


def imported(file):
    """The modules that a file imports, wherever in it: `from finetune.run import run` is finetune.run and .run.run."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def forbidden(folder):
    """Imports of a package's files that go up a floor, sideways between folders of one floor, or out to train.py."""
    found = set()
    for file in folder.rglob("*.py"):
        own, *_ = file.relative_to(folder).parts
        for module in imported(file):
            first, *rest = module.split(".")
            upwards = first == PACKAGE and rest and own != rest[0] and FLOORS.get(rest[0], 9) >= FLOORS.get(own, 0)
            if upwards or first == "train":
                found.add(f"{own} imports {first if first == 'train' else rest[0]}")
    return found


def test_every_folder_of_the_package_has_a_floor():
    folders = {file.parent.name for file in (ROOT / PACKAGE).rglob("*.py")} - {PACKAGE}
    assert folders == set(FLOORS)
    modules = {file.relative_to(ROOT / PACKAGE).as_posix() for file in (ROOT / PACKAGE).rglob("*.py")}
    assert {module.count("/") for module in modules - {"__init__.py"}} == {1}
    # One file of each floor, so that an empty search cannot pass.
    some = ["core/batch", "config/schema", "models/unconditional", "training/memory", "data/order"]
    assert {f"{file}.py" for file in (*some, "evaluation/validation", "run/checkpoint")} <= modules


def test_no_module_imports_upwards_or_sideways():
    assert forbidden(ROOT / PACKAGE) == set()


def test_config_does_not_load_torch():
    libraries = {module.split(".")[0] for file in (ROOT / PACKAGE / "config").glob("*.py") for module in imported(file)}
    assert libraries & {"torch", "accelerate", "diffusers"} == set()
    assert "pydantic" in libraries


def reads_of_a_networks_config(file):
    """Expressions like `unet.config`, except where `from_config` makes another such network of it."""
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    copies = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("from_config")]
    allowed = [argument for copy in copies for argument in copy.args]
    configs = [node for node in nodes if isinstance(node, ast.Attribute) and node.attr == "config"]
    return [
        ast.unparse(node)
        for node in configs
        if node not in allowed and ast.unparse(node.value).split(".")[-1] in ("network", "unet", "bare_unet")
    ]


FILES = [*(ROOT / PACKAGE).rglob("*.py"), ROOT / "train.py"]


def test_only_models_read_the_config_of_a_network():
    """A latent model's 4 input channels are not a picture's: what the data has to know is the kind's `image_format`."""
    readers = {file.parent.name for file in FILES if reads_of_a_networks_config(file)}
    assert readers == {"models"}


def test_a_network_is_called_by_the_loop_its_kind_and_one_function():
    """Calls like `unet(x, t, **conditions).sample`: whoever leaves out the conditions judges another network."""
    callers = {
        file.relative_to(ROOT).as_posix()
        for file in FILES
        if file.parent.name != "models"
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "sample" and isinstance(node.value, ast.Call)
    }
    assert callers == {"train.py", "finetune/core/kind.py"}


@pytest.mark.parametrize(
    ("file", "line", "found"),
    [
        ("core/files.py", "from finetune.config.schema import Config", "core imports config"),
        ("data/batches.py", "from finetune.models.hub import push", "data imports models"),
        ("training/memory.py", "import finetune.data.order", "training imports data"),
        ("models/ema.py", "from finetune import training", "models imports training"),
        ("evaluation/rounds.py", "def late():\n    from finetune.run.run import Run", "evaluation imports run"),
        ("run/state.py", "import train", "run imports train"),
        ("core/files.py", "from finetune.lobby import desk", "core imports lobby"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path, file, line, found):
    for allowed in ("core/errors.py", "run/run.py"):
        (tmp_path / allowed).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "core/errors.py").write_text("import os\nfrom finetune.core.batch import BatchLayout\n")
    (tmp_path / "run/run.py").write_text("from finetune.evaluation import pictures\nfrom finetune.run import folder\n")
    assert forbidden(tmp_path) == set()
    Path(tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(f"{line}\n")
    assert forbidden(tmp_path) == {found}


def packages(*files):
    """The packages that files import, without Python's own and ours."""
    ours = {PACKAGE, "harness", "train", *(file.stem for file in (ROOT / "tests/benchmarks").glob("*.py"))}
    modules = {module.split(".")[0] for file in files for module in imported(file)}
    return {PACKAGE_OF.get(module, module) for module in modules - ours - sys.stdlib_module_names}


def pinned(name):
    """The packages of a requirements file, each with one exact version."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    pins = [line.split("==") for line in lines if line and not line.startswith("-r ")]
    assert all(len(pin) == 2 and pin[1].replace(".", "").isdigit() for pin in pins), pins
    return {package for package, _ in pins}


def test_what_is_imported_is_pinned_and_nothing_else():
    """Also what a pinned package happens to bring along: its next version may not."""
    program = packages(ROOT / "train.py", *(ROOT / PACKAGE).rglob("*.py"))
    assert pinned("requirements.txt") == program - BACK_ENDS
    assert program >= BACK_ENDS
    tests = packages(*(ROOT / "tests").rglob("*.py"))
    assert pinned("tests/requirements.txt") - COMMANDS == tests - program
    assert {"torch", "scikit-learn"} <= program & tests
