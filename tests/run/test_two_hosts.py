"""Two hosts with a cable between them: the same run as on one, stopped, killed, cut off and resumed."""

import signal
import sys
import time
from datetime import timedelta
from functools import partial

import datasets
import psutil
import pytest

from finetune.core import groups
from finetune.data import loading
from finetune.data.store import Store
from finetune.evaluation.validation import Validation
from finetune.training.window import Window
from harness.compare import differing, history, newest_step, relative_difference, valid_checkpoints, weights
from harness.configs import EVALUATED_STEPS, ROOT, of_kind, tiny_config, write_config, write_pictures
from harness.faults import at_call, kill_at, mount_own, signal_at
from harness.hosts import CABLE, hosts_are_possible, start_on, two_hosts
from harness.processes import finish, nothing, run_two, start_command, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.root,
    pytest.mark.skipif(not hosts_are_possible(), reason="no right to make network namespaces here, or no `ip`"),
]
SILENCE = 4  # seconds


@pytest.fixture
def hosts():
    with two_hosts() as hosts:
        yield hosts


def ended(trainings, seconds=60):
    """How they ended; if one of them does not, none is left."""
    outcomes = []
    try:
        for training in trainings:
            outcomes.append(training.wait(seconds))
    except TimeoutError:  # that one was killed
        kill(trainings[len(outcomes) + 1 :])
        raise
    return outcomes


def kill(trainings):
    for training in trainings:
        training.end()


def finished(hosts, *command, folder, before=nothing):
    outcomes = ended(start_on(hosts, *command, folder=folder, before=before))
    assert [outcome.returncode for outcome in outcomes] == [0, 0], outcomes


def short_silence():
    groups.SILENCE = timedelta(seconds=SILENCE)


def wait_for_file(file, seconds=30):
    end = time.monotonic() + seconds
    while not file.exists():
        assert time.monotonic() < end
        time.sleep(0.02)


def use_own_cache(tmp_path, process):
    datasets.config.HF_DATASETS_CACHE = str(tmp_path / f"cache-{process}")
    of_the_other = tmp_path / f"cache-{1 - process}"
    of_the_other.mkdir(exist_ok=True)
    mount_own(of_the_other)  # which would be on that host's disk


def test_two_hosts_with_caches_of_their_own_make_the_run_of_one_host_to_the_last_bit(
    undisturbed, on_two, hosts, tmp_path
):
    output_dir, before = tmp_path / "run", partial(use_own_cache, tmp_path)
    finished(hosts, *on_two, f"output_dir={output_dir}", folder=tmp_path, before=before)
    assert differing(undisturbed / "two", output_dir, EVALUATED_STEPS) == []
    first, second = (sorted(file.name for file in (tmp_path / f"cache-{n}").rglob("*.arrow")) for n in (0, 1))
    assert first == second != []  # each host decoded for itself


def test_two_hosts_with_caches_of_their_own_encode_what_one_host_does(hosts, tmp_path):
    """And find it at the next start, where nothing is encoded."""
    pictures = write_pictures(tmp_path / "pictures", 12, kind="text")
    training = {"micro_batch_size": 2, "gradient_accumulation_steps": 1, "max_train_steps": 2}
    options = of_kind("text", pictures) | {"training": training, "logging__tracker": "tensorboard"}  # compared
    config = tiny_config(pictures, tmp_path / "one", **options)
    command = ("--config", write_config(tmp_path / "config.yaml", config))
    assert [outcome.returncode for outcome in run_two(*command, folder=tmp_path)] == [0, 0]
    for output_dir in ("two", "again"):
        again = output_dir == "again"

        def before(process, again=again):
            use_own_cache(tmp_path, process)
            if again:
                Store.write = None

        finished(hosts, *command, f"output_dir={tmp_path / output_dir}", folder=tmp_path, before=before)
        assert differing(tmp_path / "one", tmp_path / output_dir, 2) == []
    first, second = (sorted(file.name for file in (tmp_path / f"cache-{n}").rglob("*.safetensors")) for n in (0, 1))
    assert first == second != []


@pytest.mark.parametrize(
    ("signalled", "moment", "saved"), [(0, (Validation, "losses"), 0), (1, (Window, "add"), 1)], ids=["first", "second"]
)
def test_sigusr1_to_one_host_stops_both_at_one_step(undisturbed, on_two, hosts, tmp_path, signalled, moment, saved):
    def before(process):
        if process == signalled:
            signal_at(signal.SIGUSR1, *moment, 1)

    command = (*on_two, f"output_dir={tmp_path / 'run'}")
    outcomes = ended(start_on(hosts, *command, folder=tmp_path, before=before))
    assert [outcome.returncode for outcome in outcomes] == [143, 143], outcomes
    assert [outcome.stdout.count(f"Stopped after step {saved} of 6;") for outcome in outcomes] == [1, 0]
    assert valid_checkpoints(tmp_path / "run") == [saved]
    finished(hosts, *command, folder=tmp_path)
    assert differing(undisturbed / "two", tmp_path / "run", EVALUATED_STEPS) == []


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_host_ends_the_other_with_one_line_and_both_resume(undisturbed, on_two, hosts, tmp_path, killed):
    """Its kernel lives on, and closes its connections."""

    def before(process):
        if process == killed:
            kill_at(Window, "add", 6)  # in the fourth update: 2 + 2 + 1 micro-steps come before it

    command = (*on_two, f"output_dir={tmp_path / 'run'}")
    outcomes = ended(start_on(hosts, *command, folder=tmp_path, before=before))
    assert outcomes[killed].returncode == -signal.SIGKILL
    left = outcomes[1 - killed]
    assert left.returncode == 1, left
    assert left.error.startswith("launch: another process of this run ended")
    assert valid_checkpoints(tmp_path / "run") == [2]
    finished(hosts, *command, folder=tmp_path)
    assert differing(undisturbed / "two", tmp_path / "run", EVALUATED_STEPS) == []


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_of_two_hosts_is_resumed_on_two(undisturbed, on_two, hosts, tmp_path, processes):
    """By two processes to the last bit; by one, which adds in another order, up to rounding."""

    def before(process):
        if process == 1:
            signal_at(signal.SIGTERM, Window, "add", 6)

    command = (*on_two, f"output_dir={tmp_path / 'run'}")
    stopped = ended(start_on(hosts, *command, folder=tmp_path, before=before))
    assert [outcome.returncode for outcome in stopped] == [143, 143], stopped
    if processes == 2:
        assert [outcome.returncode for outcome in run_two(*command, folder=tmp_path)] == [0, 0]
        assert differing(undisturbed / "two", tmp_path / "run", EVALUATED_STEPS) == []
    else:
        finish(*command, "training.gradient_accumulation_steps=4", folder=tmp_path)
        expected, found = (weights(folder, EVALUATED_STEPS) for folder in (undisturbed / "two", tmp_path / "run"))
        assert relative_difference(expected, found) < 1e-5


def test_a_run_of_one_host_is_resumed_on_two(undisturbed, on_two, hosts, tmp_path):
    def before(process):
        if process == 1:
            signal_at(signal.SIGTERM, Window, "add", 6)

    command = (*on_two, f"output_dir={tmp_path / 'run'}")
    stopped = run_two(*command, folder=tmp_path, before=before)
    assert [outcome.returncode for outcome in stopped] == [143, 143], stopped
    finished(hosts, *command, folder=tmp_path)
    assert differing(undisturbed / "two", tmp_path / "run", EVALUATED_STEPS) == []


def test_a_cut_link_is_told_by_both_hosts_and_the_run_resumes(undisturbed, on_two, hosts, tmp_path):
    """In the fourth update, where the gradients' group has a timeout of ten minutes."""

    def before(process):
        short_silence()
        if process == 1:
            at_call(Window, "add", 6, partial(hosts[1].cable, "down"))

    command = (*on_two, f"output_dir={tmp_path / 'run'}")
    outcomes = ended(start_on(hosts, *command, folder=tmp_path, before=before), 6 * SILENCE)
    for outcome, other in zip(outcomes, reversed(hosts), strict=True):
        assert outcome.returncode == 1, outcome
        assert outcome.error.startswith(f"launch: the host {other.address} has been silent for {SILENCE} s, so this")
    assert valid_checkpoints(tmp_path / "run") == [2]
    hosts[1].cable("up")
    finished(hosts, *command, folder=tmp_path)
    assert differing(undisturbed / "two", tmp_path / "run", EVALUATED_STEPS) == []


@pytest.mark.parametrize("cut", [False, True])
def test_a_slow_host_is_waited_for_and_a_lost_one_is_detected(on_two, hosts, tmp_path, cut):
    """The main process decodes for twice the silence that is allowed, while the other waits in the control group,
    which has a timeout of a day; after a cut it would decode on."""

    def before(process):
        short_silence()
        load = loading.load_data

        def slowly(*arguments):
            (tmp_path / "decoding").touch()
            time.sleep(1000 if cut else 2 * SILENCE)
            return load(*arguments)

        if process == 0:
            loading.load_data = slowly

    one, other = start_on(hosts, *on_two, f"output_dir={tmp_path / 'run'}", folder=tmp_path, before=before)
    wait_for_file(tmp_path / "decoding")
    if not cut:
        assert [outcome.returncode for outcome in ended([one, other])] == [0, 0]
        return
    hosts[0].cable("down")
    start = time.monotonic()
    try:
        outcome = other.wait(3 * SILENCE)
    finally:
        kill([one])
    seconds = time.monotonic() - start
    assert outcome.returncode == 1
    assert outcome.error.startswith(f"launch: the host {hosts[0].address} has been silent for {SILENCE} s")
    assert seconds > SILENCE / 2


def test_launchers_of_two_hosts_start_a_killed_process_again_but_not_a_run_that_was_asked_to_stop(hosts, tmp_path):
    training = {"micro_batch_size": 4, "global_batch_size": 8, "max_train_steps": 100_000}
    output_dir, pictures = tmp_path / "run", write_pictures(tmp_path / "pictures", 16)
    file = write_config(tmp_path / "config.yaml", tiny_config(pictures, output_dir, training=training))
    launch = (sys.executable, "-m", "accelerate.commands.launch", "--max_restarts", "2")
    launch += ("--config_file", ROOT / "configs/accelerate/several-machines.yaml", "--mixed_precision", "no")
    launch += ("--num_processes", "2", "--main_process_ip", hosts[0].address)
    launchers = [
        start_command(
            *("ip", "netns", "exec", host.name, *launch, "--machine_rank", str(host.number), "train.py"),
            *("--config", file, "checkpoint.every_steps=5"),
            **CABLE,
        )
        for host in hosts
    ]

    def workers():
        return [psutil.Process(launcher.pid).children()[0] for launcher in launchers]

    wait_for(lambda: any(output_dir.glob("checkpoint-*")), launchers[0])
    first = workers()
    first[1].kill()
    _, alive = psutil.wait_procs(first, timeout=20)  # after 30 s the launchers kill what is left
    assert alive == []
    known = newest_step(output_dir)
    wait_for(lambda: newest_step(output_dir) > known, launchers[0])
    workers()[1].send_signal(signal.SIGUSR1)
    outputs = [launcher.communicate(timeout=120)[0] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [1, 1]
    assert [output.count("Resuming from") for output in outputs] == [1, 0]
    assert [output.count("everything is saved") for output in outputs] == [1, 0]
    assert history(output_dir)[-1]["step"] == valid_checkpoints(output_dir)[-1] > known
