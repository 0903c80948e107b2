"""Invalid configs: each problem is one line that names the key, what was found and what is expected."""

from pathlib import Path

import pytest

from finetune.config.load import ConfigError, load_config
from finetune.config.schema import Config
from harness.config_files import VALID, write
from harness.processes import run


def swap(old, new):
    assert old in VALID
    return VALID.replace(old, new)


COUNT = "expected a whole number above 0"
KEYS = ", ".join(Config.model_fields)
SIZES = "global_batch_size, micro_batch_size, gradient_accumulation_steps"
LABELS = "expected a list of numbers or texts or null"
SEED = "expected a whole number from 0 to 2^63 - 1"
RULES = "expected factor:until_step,...,factor like 1:100,0.1:200,0.01 or null"
PIECEWISE = "lr_scheduler={{name: piecewise_constant, step_rules: '{}'}}".format
NO_CODE = r"FILE: found an escape like \ud800 that is not a character; expected a character"

# (what is wrong, the file, each expected line). FILE stands for the file's name; ... at the end matches anything.
BAD_FILES = [
    # keys
    ("unknown section", VALID + "foo: 1", f"FILE: foo: unknown key; expected one of {KEYS}"),
    ("misspelt section", VALID + "optimiser: {}", "FILE: optimiser: unknown key; did you mean optimizer?"),
    (
        "misspelt key",
        swap("micro_batch_size", "micro_batchsize"),
        "FILE: training.micro_batchsize: unknown key; did you mean training.micro_batch_size?",
    ),
    (
        "key in capitals",
        swap("source", "SOURCE"),
        "FILE: data.source: missing; expected a line of text",
        "FILE: data.SOURCE: unknown key; did you mean data.source?",
    ),
    ("key elsewhere", VALID + "betas: 1", "FILE: betas: unknown key; did you mean optimizer.betas?"),
    (
        "key in several places",
        VALID + "every_steps: 3",
        "FILE: every_steps: unknown key; did you mean checkpoint.every_steps or validation.every_steps or ...",
    ),
    ("key like none", VALID + "ema: {zzz: 1}", "FILE: ema.zzz: unknown key; expected one of enabled, decay, power"),
    ("key of two lines", VALID + '"a\\nb": 1', r"FILE: 'a\nb': unknown key; expected one of ..."),
    (
        "merge key",
        VALID + "ema: {<<: {decay: 0.5}}",
        "FILE: ema.<<: unknown key; expected one of enabled, decay, power",
    ),
    ("number as key", VALID + "5: 1", "FILE: line 9, column 1: found a key that is not text; expected text"),
    ("list as key", VALID + "? [a]\n: 1", "FILE: line 9, column 3: found a key that is not text; expected text"),
    ("true as key", VALID + "ema: {true: 1}", "FILE: line 9, column 7: found a key that is not text; expected text"),
    ("section twice", VALID + "data: {}", "FILE: line 9, column 1: found the key 'data' twice; expected it once"),
    (
        "key twice",
        swap("  num_epochs", "  num_epochs: 3\n  num_epochs"),
        "FILE: line 9, column 3: found the key 'num_epochs' twice; expected it once",
    ),
    ("no section", swap("model: {pretrained: user/base}\n", ""), "FILE: model: missing; expected a mapping with ..."),
    ("no output", swap("output_dir: runs/test\n", ""), "FILE: output_dir: missing; expected a line of text"),
    # types
    ("number as section", VALID + "ema: 3", "FILE: ema: found 3; expected a mapping with enabled, decay, power"),
    ("nothing as section", VALID + "ema:", "FILE: ema: found null; expected a mapping with enabled, decay, power"),
    ("list as section", VALID + "export: [1]", "FILE: export: found [1]; expected a mapping with push_to_hub"),
    ("list as text", swap("digits", "[a, b]"), "FILE: data.source: found ['a', 'b']; expected a line of text"),
    ("word as number", swap(": 2", ": two"), f"FILE: training.num_epochs: found 'two'; {COUNT} or null"),
    ("quoted number", swap(": 2", ": '2'"), f"FILE: training.num_epochs: found '2'; {COUNT} or null"),
    ("octal number", swap(": 2", ": 02"), f"FILE: training.num_epochs: found '02'; {COUNT} or null"),
    ("part of a whole", swap(": 2", ": 2.5"), f"FILE: training.num_epochs: found 2.5; {COUNT} or null"),
    ("whole with a point", swap(": 2", ": 2.0"), f"FILE: training.num_epochs: found 2.0; {COUNT} or null"),
    ("true as number", VALID + "seed: true", f"FILE: seed: found true; {SEED}"),
    ("value of two lines", VALID + 'seed: "a\\nb\\u2028c"', rf"FILE: seed: found 'a\nb\u2028c'; {SEED}"),
    ("value of 500 letters", VALID + f"seed: {'x' * 500}", f"FILE: seed: found '{'x' * 56}...; {SEED}"),
    # values that do not go together
    (
        "no model",
        swap("{pretrained: user/base}", "{}"),
        "FILE: model: found neither; expected exactly one of pretrained, unet",
    ),
    (
        "two models",
        swap("user/base", "user/base, unet: {}"),
        "FILE: model: found pretrained and unet; expected exactly one of pretrained, unet",
    ),
    (
        "no length",
        swap("  num_epochs: 2\n", ""),
        "FILE: training: found neither; expected num_epochs or max_train_steps",
    ),
    (
        "no batch",
        swap("  micro_batch_size: 16\n  gradient_accumulation_steps: 4\n", ""),
        f"FILE: training: found none of {SIZES}; expected at least two",
    ),
    (
        "half a batch",
        swap("  micro_batch_size: 16\n", ""),
        f"FILE: training: found gradient_accumulation_steps of {SIZES}; expected at least two",
    ),
    (
        "auto alone",
        swap("16\n  gradient_accumulation_steps: 4", "auto"),
        "FILE: training.micro_batch_size: found micro_batch_size; auto needs global_batch_size and ...",
    ),
    (
        "auto with steps",
        swap("16", "auto\n  global_batch_size: 64"),
        f"FILE: training.micro_batch_size: found {SIZES}; auto needs global_batch_size and no ...",
    ),
    (
        "indivisible by micro-batches",
        swap("gradient_accumulation_steps: 4", "global_batch_size: 60"),
        "FILE: training: found global_batch_size 60; expected a multiple of micro_batch_size 16",
    ),
    (
        "indivisible by steps",
        swap("micro_batch_size: 16", "global_batch_size: 62"),
        "FILE: training: found global_batch_size 62; expected a multiple of gradient_accumulation_steps 4",
    ),
    (
        "three sizes that disagree",
        swap("size: 16", "size: 16\n  global_batch_size: 96"),
        "FILE: training: found global_batch_size 96; "
        "expected a multiple of micro_batch_size 16 x gradient_accumulation_steps 4 = 64",
    ),
    (
        "nine things at once",
        "seed: -1\nsede: 1\nmodel: {}\ndata: 5\ntraining: {num_epochs: 0, epochs: 1}\nema: {decay: 2, enabled: 1}",
        "FILE: output_dir: missing; expected a line of text",
        f"FILE: seed: found -1; {SEED}",
        "FILE: model: found neither; expected exactly one of pretrained, unet",
        "FILE: data: found 5; expected a mapping with source, ...",
        f"FILE: training.num_epochs: found 0; {COUNT} or null",
        "FILE: training.epochs: unknown key; did you mean training.num_epochs?",
        "FILE: ema.enabled: found 1; expected true or false",
        "FILE: ema.decay: found 2; expected a number from 0 to 1",
        "FILE: sede: unknown key; did you mean seed?",
    ),
    # no mapping, or no YAML
    ("empty", "", f"FILE: found nothing; expected a mapping with {KEYS}"),
    ("only a comment", "# nothing yet\n", f"FILE: found nothing; expected a mapping with {KEYS}"),
    ("list at the top", "- output_dir: a\n", f"FILE: found [{{'output_dir': 'a'}}]; expected a mapping with {KEYS}"),
    ("word at the top", "digits", f"FILE: found 'digits'; expected a mapping with {KEYS}"),
    (
        "two documents",
        VALID + "---\n" + VALID,
        "FILE: line 9, column 1: expected a single document in the stream, but found another document",
    ),
    (
        "tab",
        swap("  source", "\tsource"),
        r"FILE: line 4, column 1: while scanning for the next token, found character '\t' that cannot start any token",
    ),
    (
        "open bracket",
        VALID + "ema: {decay: 1",
        "FILE: line 9, column 15: while parsing a flow mapping, expected ',' ...",
    ),
    (
        "odd indent",
        VALID + " ema: {}",
        "FILE: line 9, column 2: while parsing a block mapping, expected <block end>, ...",
    ),
    ("two colons", VALID + "seed: a: b", "FILE: line 9, column 8: mapping values are not allowed here"),
    (
        "open quote",
        VALID + "seed: 'a",
        "FILE: line 9, column 9: while scanning a quoted scalar, found unexpected end ...",
    ),
    (
        "Python object",
        VALID + "seed: !!python/object/apply:os.system [ls]",
        "FILE: line 9, column 7: found a tag; expected a plain value",
    ),
    ("tag", VALID + "seed: !!int x", "FILE: line 9, column 7: found a tag; expected a plain value"),
    ("alias of nothing", VALID + "seed: *x", "FILE: line 9, column 7: found undefined alias 'x'"),
    (
        "value inside itself",
        VALID + "ema: &a {decay: *a}",
        "FILE: line 9, column 17: found an alias inside an aliased value; expected the value itself",
    ),
    (
        "a billion laughs",
        "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]",
        "FILE: line 2, column 8: found an alias inside an aliased value; expected the value itself",
    ),
    ("nesting", "[" * 5000, "FILE: found values nested too deeply; expected sections with values"),
    ("control character", VALID + "seed: \x07", r"FILE: line 9: found '\x07'; expected printable text"),
    ("half a surrogate pair", VALID + 'seed: "\\ud800"', NO_CODE),
    ("no code point", VALID + 'seed: "\\UFFFFFFFF"', NO_CODE),
    ("Latin-1", b"output_dir: caf\xe9", "FILE: found invalid UTF-8 at byte 15; expected UTF-8 text"),
    ("UTF-16", VALID.encode("utf-16"), "FILE: found invalid UTF-8 at byte 0; expected UTF-8 text"),
    ("picture", b"\x89PNG\r\n\x1a\n\x00\x00", "FILE: found invalid UTF-8 at byte 0; expected UTF-8 text"),
]

# (override, the problem with the value of the key it names)
BAD_VALUES = [
    ("output_dir=''", "found ''; expected a line of text"),
    ("output_dir=' '", "found ' '; expected a line of text"),
    ("output_dir=3", "found 3; expected a line of text"),
    ('output_dir="a\\0"', r"found 'a\x00'; expected a line of text"),
    ("output_dir=\udcff", r"line 1: found '\udcff'; expected printable text"),
    ("seed=-1", f"found -1; {SEED}"),
    (f"seed={2**63}", f"found {2**63}; {SEED}"),
    (f"seed={'9' * 5000}", f"found '{'9' * 56}...; {SEED}"),
    ("model.unet=big", "found 'big'; expected a mapping or null"),
    ("model.noise_scheduler=[1]", "found [1]; expected a mapping"),
    ("data.labels=5", f"found 5; {LABELS}"),
    ("data.labels=[]", f"found []; {LABELS}"),
    ("data.labels=[1, 1.5, true]", f"found [1, 1.5, True]; {LABELS}"),
    ("data.labels=[1", "line 1, column 3: while parsing a flow sequence, expected ',' or ']', but got '<stream end>'"),
    ("data.resolution=0", f"found 0; {COUNT} or null"),
    ("data.crop=left", "found 'left'; expected center or random"),
    ("data.random_flip=yes", "found 'yes'; expected true or false"),
    ("data.num_workers=-1", "found -1; expected a whole number, 0 or more"),
    ("data.validation_fraction=1", "found 1; expected a number from 0 to below 1"),
    ("data.validation_split=train", "found 'train'; expected a split other than data.split"),
    ("data.foo=1", "unknown key; expected one of source, split, ..."),
    ("training.epochs=1", "unknown key; did you mean training.num_epochs?"),
    ("training.num_epochs.x=1", "found training.num_epochs=2; expected a mapping there"),
    ("training.micro_batch_size=0", f"found 0; {COUNT} or auto or null"),
    ("training.micro_batch_size=AUTO", f"found 'AUTO'; {COUNT} or auto or null"),
    ("training.gradient_accumulation_steps=-4", f"found -4; {COUNT} or null"),
    ("training.max_grad_norm=0", "found 0; expected a number above 0 or null"),
    ("training.snr_gamma=-5", "found -5; expected a number above 0 or null"),
    ("training.timestep_sampling=none", "found 'none'; expected stratified or uniform"),
    ("optimizer.name=sgd", "found 'sgd'; expected adamw"),
    ("optimizer.learning_rate=0", "found 0; expected a number above 0"),
    ("optimizer.learning_rate=.nan", "found nan; expected a number above 0"),
    ("optimizer.learning_rate='1e-5'", "found '1e-5'; expected a number above 0"),
    ("optimizer.learning_rate=0,1", "found '0,1'; expected a number above 0"),
    ("optimizer.betas=[0.9]", "found [0.9]; expected a list of two numbers from 0 to below 1"),
    ("optimizer.betas=[0.9, 1]", "found [0.9, 1]; expected a list of two numbers from 0 to below 1"),
    ("optimizer.betas=[a, b]", "found ['a', 'b']; expected a list of two numbers from 0 to below 1"),
    ("optimizer.weight_decay=.inf", "found inf; expected a number, 0 or more"),
    ("optimizer.eps=1e999", "found inf; expected a number above 0"),
    ("optimizer.eps=0", "found 0; expected a number above 0"),
    (
        "lr_scheduler.name=cosin",
        "found 'cosin'; expected constant or constant_with_warmup or piecewise_constant or ...",
    ),
    ("lr_scheduler.num_cycles=2", "found 2; expected 1 with constant, because only cosine_with_restarts uses it"),
    ("lr_scheduler.power=2", "found 2.0; expected 1 with constant, because only polynomial uses it"),
    (
        "lr_scheduler.warmup_steps=9",
        "found 9; expected 0 with constant, which has no warm-up (constant_with_warmup has one)",
    ),
    (
        "lr_scheduler.step_rules='1:2,3'",
        "found '1:2,3' with constant; expected rules for piecewise_constant and null for any other schedule",
    ),
    ("ema.decay=1.1", "found 1.1; expected a number from 0 to 1"),
    ("ema.decay=true", "found true; expected a number from 0 to 1"),
    ("checkpoint.keep=null", f"found null; {COUNT}"),
    ("checkpoint.resume=null", "found null; expected auto, never or the folder of a checkpoint"),
    ("samples.every_steps=0", f"found 0; {COUNT}"),
    ("samples.count=-1", "found -1; expected a whole number, 0 or more"),
    ("export.push_to_hub=model", "found 'model'; expected a repository like user/name or null"),
    ("export.push_to_hub=../x", "found '../x'; expected a repository like user/name or null"),
]

# (overrides, each expected line)
BAD_OVERRIDES = [
    (["training.num_epochs"], "command line: found 'training.num_epochs'; expected key.path=value"),
    (["=3"], "command line: found '=3'; expected key.path=value"),
    (["training..seed=3"], "command line: found 'training..seed=3'; expected key.path=value"),
    (["foo.bar=1"], f"FILE and command line: foo: unknown key; expected one of {KEYS}"),
    (["trainig.num_epochs=1"], "FILE and command line: trainig: unknown key; did you mean training?"),
    (["seed.x=1"], f"FILE and command line: seed: found {{'x': 1}}; {SEED}"),
    (
        ["optimizer={betas: [0, 0]}", "optimizer.betas.0=1"],
        "command line: optimizer.betas.0: found optimizer.betas=[0, 0]; expected a mapping there",
    ),
    (
        ["ema={decya: 0.5, power: 0}"],
        "command line: ema.power: found 0; expected a number above 0",
        "command line: ema.decya: unknown key; did you mean ema.decay?",
    ),
    (
        ["lr_scheduler={name: piecewise_constant, warmup_steps: 1, step_rules: '1:2,1'}"],
        "command line: lr_scheduler.warmup_steps: found 1; expected 0 with piecewise_constant, which has ...",
    ),
    (
        ["lr_scheduler={name: piecewise_constant}"],
        "command line: lr_scheduler.step_rules: found null with piecewise_constant; expected rules for ...",
    ),
    ([PIECEWISE("1:10")], f"command line: lr_scheduler.step_rules: found '1:10'; {RULES}"),
    ([PIECEWISE("1:9,1:9,1")], f"command line: lr_scheduler.step_rules: found '1:9,1:9,1'; {RULES}"),
    ([PIECEWISE("1:9,1:8,1")], f"command line: lr_scheduler.step_rules: found '1:9,1:8,1'; {RULES}"),
    ([PIECEWISE("1:0,1")], f"command line: lr_scheduler.step_rules: found '1:0,1'; {RULES}"),
    ([PIECEWISE("a:b,c")], f"command line: lr_scheduler.step_rules: found 'a:b,c'; {RULES}"),
    ([PIECEWISE("nan:9,1")], f"command line: lr_scheduler.step_rules: found 'nan:9,1'; {RULES}"),
    (
        ["lr_scheduler.name=polynomial", "optimizer.learning_rate=1e-7"],
        "command line: optimizer.learning_rate: found 1e-07; expected above 1e-07, the polynomial ...",
    ),
    (
        ["nonsense", "seed=-1"],
        "command line: found 'nonsense'; expected key.path=value",
        f"command line: seed: found -1; {SEED}",
    ),
]

BAD = {name: (content, [], lines) for name, content, *lines in BAD_FILES}
BAD |= {given[:60]: (VALID, [given], [f"command line: {given.split('=')[0]}: {line}"]) for given, line in BAD_VALUES}
BAD |= {" ".join(given): (VALID, given, lines) for given, *lines in BAD_OVERRIDES}


def problems_of(file, overrides=()):
    with pytest.raises(ConfigError) as caught:
        load_config(file, overrides)
    assert caught.value.exit_code == 2
    assert all(problem.splitlines() == [problem] for problem in caught.value.problems)
    return list(caught.value.problems)


def assert_lines(lines, expected, file):
    assert len(lines) == len(expected), lines
    for line, wanted in zip(lines, expected, strict=True):
        wanted = wanted.replace("FILE", str(file), 1)
        assert line == wanted or (wanted.endswith("...") and line.startswith(wanted[:-3])), f"expected: {wanted}"


@pytest.mark.parametrize("name", BAD)
def test_each_problem_of_an_invalid_config_is_one_line(name, tmp_path, monkeypatch):
    content, overrides, expected = BAD[name]
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path, content)
    assert_lines(problems_of(file, overrides), expected, file)
    assert list(tmp_path.iterdir()) == [file]


def test_no_two_rows_of_the_tables_have_the_same_name():
    assert len(BAD) == len(BAD_FILES) + len(BAD_VALUES) + len(BAD_OVERRIDES) >= 60


def test_a_file_that_cannot_be_read_is_named_with_the_reason(tmp_path, monkeypatch):
    expected = "expected a YAML file"
    missing, folder = tmp_path / "missing.yaml", tmp_path
    assert problems_of(missing) == [f"{missing}: cannot be read (No such file or directory); {expected}"]
    assert problems_of(folder) == [f"{folder}: cannot be read (Is a directory); {expected}"]
    assert problems_of("a\0b") == [r"--config: found 'a\x00b'; expected one without control characters"]
    file = write(tmp_path, VALID)
    assert problems_of(file / "x") == [f"{file / 'x'}: cannot be read (Not a directory); {expected}"]

    def forbidden(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", forbidden)  # the tests may run as root, who may read anything
    assert problems_of(file) == [f"{file}: cannot be read (Permission denied); {expected}"]


@pytest.mark.parametrize("name", ["nine things at once", "tab", "nonsense seed=-1"])
def test_train_py_prints_the_problems_and_writes_nothing(name, tmp_path):
    content, overrides, expected = BAD[name]
    file = write(tmp_path / "config", content)
    outcome = run("--config", file, *overrides, folder=tmp_path / "printed")
    assert outcome.returncode == 2, outcome.stderr
    assert_lines(outcome.errors, expected, file)
    assert "Traceback" not in outcome.stderr
    assert outcome.stdout == ""
    assert list(file.parent.iterdir()) == [file]
