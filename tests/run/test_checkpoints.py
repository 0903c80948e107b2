"""The checkpoints in an output folder: which one is resumed from, which ones are kept."""

import os

import pytest

from finetune.core.errors import UserError
from finetune.run import checkpoint
from finetune.run.checkpoints import Checkpoints
from harness.checkpoints import empty, flip_a_bit
from harness.faults import wait_for_pruning


def find(folder, resume="auto"):
    warnings = []
    return Checkpoints(folder, str(resume), keep=3).find(warnings.append), warnings


def steps(folder):
    wait_for_pruning()
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in folder.iterdir())


def test_auto_finds_the_newest_by_step_and_not_by_name(save, tmp_path):
    save(9)
    newest = save(10)
    assert find(tmp_path) == (newest, [])


@pytest.mark.parametrize("name", ["checkpoint-7", "checkpoint-02", "checkpoint-1"])
def test_a_checkpoint_under_the_name_of_another_step_is_refused(save, tmp_path, name):
    """By such a name an older one would be taken for the newest, and the updates since then be done again."""
    renamed = save(2).rename(tmp_path / name)
    expected = f"output_dir: found the checkpoint {renamed}, which is that of step 2; rename it checkpoint-2, or move"
    with pytest.raises(UserError) as caught:
        find(tmp_path)
    assert str(caught.value).startswith(expected)
    moved = renamed.rename(tmp_path / "mine")  # it may be named whatever it is called
    assert find(tmp_path, moved) == (moved, [])
    assert find(tmp_path) == (None, [])


def test_of_a_checkpoint_that_was_moved_and_linked_the_link_is_pruned(save, tmp_path):
    (tmp_path / "runs").mkdir()
    kept = save(1).rename(tmp_path / "elsewhere")
    (tmp_path / "runs/checkpoint-1").symlink_to(kept)
    save(2).rename(tmp_path / "runs/checkpoint-2")
    Checkpoints(tmp_path / "runs", "auto", keep=1).prune(2)
    wait_for_pruning()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["checkpoint-2"]
    assert checkpoint.flaw(kept) is None
    (tmp_path / "runs/.checkpoint-1.pruned").symlink_to(kept)  # of a killed run
    Checkpoints(tmp_path / "runs", "auto", keep=1).remove_leftovers()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["checkpoint-2"]
    assert checkpoint.flaw(kept) is None


def test_auto_reports_a_damaged_checkpoint_and_finds_the_one_before(save, tmp_path):
    before, newest = save(1), save(2)
    flip_a_bit(newest / "ema.safetensors")
    problem = "ema.safetensors has another checksum than when it was written"
    assert find(tmp_path) == (before, [f"{newest} is skipped: {problem}"])


def test_auto_does_not_start_again_beside_damaged_checkpoints(save, tmp_path):
    empty(save(1) / "optimizer.bin")
    with pytest.raises(UserError, match="none of the 1 checkpoints"):
        find(tmp_path)


def test_never_is_refused_where_there_are_checkpoints(save, tmp_path):
    assert find(tmp_path, "never") == (None, [])
    save(1)
    with pytest.raises(UserError, match=r"holds checkpoint-1"):
        find(tmp_path, "never")


def test_a_named_checkpoint_must_be_valid(save, tmp_path):
    folder = save(1)
    assert find(tmp_path, folder) == (folder, [])
    flip_a_bit(folder / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors"):
        find(tmp_path, folder)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match=r"nothing is not a valid checkpoint: it has no manifest\.json"):
        find(tmp_path, tmp_path / "nothing")
    with pytest.raises(UserError, match="found always, which is no folder; expected auto, never or a checkpoint"):
        find(tmp_path, "always")


def test_a_named_checkpoint_with_newer_ones_beside_it_is_refused(save, tmp_path):
    older = save(5)
    save(10)
    with pytest.raises(UserError) as refused:
        find(tmp_path, older)
    assert str(refused.value).startswith(f"checkpoint.resume: {older} is older than checkpoint-10 in the same output")
    assert "set another output_dir to branch off" in str(refused.value)


def test_a_named_checkpoint_with_only_a_damaged_one_after_it_is_found(save, tmp_path):
    older, newer = save(5), save(10)
    empty(newer / "optimizer.bin")
    found, warnings = find(tmp_path, older)
    assert found == older
    assert len(warnings) == 1


@pytest.mark.parametrize("inside", [True, False], ids=["same folder", "another folder"])
def test_the_newest_that_was_trained_on_from_a_named_checkpoint_is_found(save, tmp_path, inside):
    named = save(5)
    if not inside:
        named = named.rename(tmp_path.with_name(f"{tmp_path.name}-named"))  # under a name of the user's
    save(7, "digest of another", checkpoint.digest(named))
    newest = save(9, "digest of another", checkpoint.digest(named))
    assert find(tmp_path, named) == (newest, [])


def test_a_named_checkpoint_of_another_folder_is_refused_beside_checkpoints_that_do_not_come_from_it(save, tmp_path):
    named = save(5).rename(tmp_path.with_name(f"{tmp_path.name}-named"))
    save(3)  # older ones too: they are another run's
    with pytest.raises(UserError, match=r"holds checkpoint-3, which was not trained on from"):
        find(tmp_path, named)


def save_in_turn(save, checkpoints, *numbers):
    for step in numbers:
        save(step)
        checkpoints.prune(step)


def test_pruning_keeps_the_newest(save, tmp_path):
    save_in_turn(save, Checkpoints(tmp_path, "auto", keep=2), 1, 2, 3, 10)
    assert steps(tmp_path) == [3, 10]


def test_pruning_keeps_a_named_checkpoint(save, tmp_path):
    save(5)
    save_in_turn(save, Checkpoints(tmp_path, os.path.relpath(tmp_path / "checkpoint-5"), keep=2), 7, 9, 11)
    assert steps(tmp_path) == [5, 9, 11]


def test_a_skipped_checkpoint_does_not_count_as_kept_and_goes_once_the_run_has_passed_it(save, tmp_path):
    save_in_turn(save, Checkpoints(tmp_path, "auto", keep=2), 5, 10)
    empty(save(20) / "optimizer.bin")
    checkpoints = Checkpoints(tmp_path, "auto", keep=2)
    assert checkpoints.find(lambda warning: None) == tmp_path / "checkpoint-10"
    save_in_turn(save, checkpoints, 15)
    assert steps(tmp_path) == [10, 15, 20]
    save_in_turn(save, checkpoints, 25)
    assert steps(tmp_path) == [15, 25]


def test_a_skipped_checkpoint_that_is_saved_again_counts_as_kept(save, tmp_path):
    save_in_turn(save, Checkpoints(tmp_path, "auto", keep=2), 5, 10)
    empty(tmp_path / "checkpoint-10" / "optimizer.bin")
    checkpoints = Checkpoints(tmp_path, "auto", keep=2)
    assert checkpoints.find(lambda warning: None) == tmp_path / "checkpoint-5"
    save_in_turn(save, checkpoints, 10, 15)
    assert steps(tmp_path) == [10, 15]


@pytest.mark.parametrize(
    ("saved", "resume", "saves", "more"),
    [
        ([], "auto", 100, 3),  # keep 2 and the next one, before one is pruned
        ([], "auto", 1, 1),
        ([], "auto", 0, 0),
        ([5], "auto", 100, 2),
        ([5, 10], "auto", 100, 1),
        ([5, 10, 15], "auto", 100, 1),  # one too many, after keep was lowered: still one more before any goes
        ([5], "checkpoint-5", 100, 3),  # it stays beside keep 2 and the next one
    ],
)
def test_room_for_checkpoints(save, tmp_path, monkeypatch, saved, resume, saves, more):
    monkeypatch.chdir(tmp_path)
    for step in saved:
        save(step)
    assert Checkpoints(tmp_path, resume, keep=2).room_needed(1000, saves) == 1000 * more


def test_leftovers_are_removed_and_their_room_counts_as_free(tmp_path):
    for name in (checkpoint.PARTIAL, ".checkpoint-3.pruned"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(bytes(100))
    checkpoints = Checkpoints(tmp_path, "auto", keep=2)
    assert checkpoints.room_needed(1000, 1) == 1000 - 200
    checkpoints.remove_leftovers()
    assert list(tmp_path.iterdir()) == []
