"""`data.order` is part of which run it is: resuming keeps it, or is refused."""

import json
from functools import partial

import pytest

from finetune.data import order
from finetune.data.blocks import BlockOrder
from finetune.run import manifest
from harness.compare import differing
from harness.faults import skip_the_export, stop_after_updates
from harness.processes import finish, run
from harness.undisturbed import command, undisturbed

OPTIONS = {"data__order": "blocks", "logging__tracker": "tensorboard"}


def small_blocks():
    """Blocks of 4 images in 2 stripes: of 19 images, 8 are mixed at a time."""
    order.BlockOrder = partial(BlockOrder, span=2, block=2, stripes=2)
    skip_the_export()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return undisturbed(tmp_path_factory.mktemp("base"), images=19, before=small_blocks, **OPTIONS)


def test_a_run_in_blocks_resumes_bit_exactly(base, tmp_path):
    def before():
        small_blocks()
        stop_after_updates(4)

    arguments = command(base, tmp_path / "run")
    assert run(*arguments, folder=tmp_path, before=before).returncode == 143
    finish(*arguments, folder=tmp_path, before=small_blocks)
    assert differing(base / "run", tmp_path / "run", 6) == []


def test_another_order_is_another_run(base):
    refused = run(*command(base, base / "run", "data.order=full"), folder=base, before=small_blocks)
    assert refused.returncode == 2
    checkpoint = base / "run/checkpoint-6"
    assert refused.errors[0] == f"{checkpoint} is of another run: data.order: 'blocks' in the checkpoint, 'full' now"


def test_a_checkpoint_without_the_key_was_shuffled_fully(base, tmp_path):
    arguments = command(base, tmp_path / "run", "data.order=full")
    finish(*arguments, "training.num_epochs=1", folder=tmp_path, before=skip_the_export)
    checkpoint = tmp_path / "run/checkpoint-3"
    state = json.loads((checkpoint / "run_state.json").read_text())
    assert state["identity"]["data"].pop("order") == "full"
    (checkpoint / "run_state.json").write_text(json.dumps(state))
    files = list(manifest.read(checkpoint)["files"])
    (checkpoint / manifest.MANIFEST).unlink()
    manifest.seal(checkpoint, 3, files)
    refused = run(*command(base, tmp_path / "run"), folder=tmp_path, before=small_blocks)
    assert "data.order: 'full' in the checkpoint, 'blocks' now" in refused.errors[0]
    resumed = finish(*arguments, folder=tmp_path, before=skip_the_export)
    assert f"Resuming from {checkpoint}: step 3 of 6." in resumed.stdout
