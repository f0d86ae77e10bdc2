"""A checkpoint is published whole or not at all, and old ones go."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from unit_checkpoints import ALONE, read_all, rows, run_threads, save_alone, state, tensors, whole
from unit_helpers import assert_explained

from bigtrain.checkpoint import save as saving
from bigtrain.checkpoint.load import find_last_good
from bigtrain.checkpoint.manifest import Manifest, list_checkpoints, read_manifest
from bigtrain.checkpoint.save import prune, remove_unfinished, save
from bigtrain.errors import CheckpointError, Overtaken

FULL = OSError(28, "No space left on device")


def steps(folder: Path) -> list[int]:
    return [step for step, _ in list_checkpoints(folder)]


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_full_disk_publishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While tensors are written: nothing is left over, and the one before stays good."""
    before = save_alone(tmp_path, 1)

    def fill(payload: dict, path: Path) -> None:
        path.write_bytes(b"half of it")
        raise FULL

    monkeypatch.setattr(saving, "save_file", fill)
    with pytest.raises(CheckpointError) as caught:
        save_alone(tmp_path, 2)
    assert_explained(
        caught.value, "checkpoint of step 2", str(tmp_path), "rank 0", "No space left on device"
    )
    assert steps(tmp_path) == [1]
    assert hidden(tmp_path) == []
    found = find_last_good(tmp_path, ALONE)
    assert found is not None
    assert found[0] == before


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_failure_at_publication(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the manifest is written, or the folder renamed."""
    save_alone(tmp_path, 1)

    def fail(*args: object) -> None:
        raise FULL

    with monkeypatch.context() as broken:
        broken.setattr(os, call, fail)
        with pytest.raises(CheckpointError, match="No space left on device"):
            save_alone(tmp_path, 2)
    assert steps(tmp_path) == [1]
    assert hidden(tmp_path) == []


def test_silently_short_file_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems tell of a full disk by a short file only."""
    monkeypatch.setattr(saving, "save_file", lambda payload, path: path.write_bytes(b"short"))
    with pytest.raises(CheckpointError, match="has 5 bytes, fewer than"):
        save_alone(tmp_path, 1)
    assert steps(tmp_path) == []


def test_what_was_overtaken_is_not_published(tmp_path: Path) -> None:
    """What the others had written goes, and the one before stays good."""
    before = save_alone(tmp_path, 1)

    def further(folder: Path) -> list[str]:
        (folder / "rows").write_bytes(b"half of it")
        raise Overtaken("others have gone on")

    blocks = [whole("w", torch.arange(4.0))]
    with pytest.raises(Overtaken):
        save(tmp_path, state(2), blocks, ALONE, further)
    assert (steps(tmp_path), hidden(tmp_path)) == ([1], [])
    assert find_last_good(tmp_path, ALONE)[0] == before  # type: ignore[index]


def test_failure_of_one_rank_fails_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All raise the same error, which names the rank, and nothing is published."""
    real = saving.save_file

    def fail_on_one(payload: dict, path: Path) -> None:
        if "00001" in path.name:
            raise FULL
        real(payload, path)

    monkeypatch.setattr(saving, "save_file", fail_on_one)
    blocks = rows(2, 4)
    errors = run_threads(
        monkeypatch, 3, lambda axis: save(tmp_path, state(1), [blocks[axis.rank]], axis)
    )
    assert all(isinstance(error, CheckpointError) for error in errors)
    assert len({str(error) for error in errors}) == 1
    assert "rank 1: OSError" in str(errors[0])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("alone", [True, False])
def test_folder_that_is_a_file(alone: bool, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError) as caught:
        save(tmp_path / "checkpoints", state(1), [], ALONE, alone=alone)
    assert_explained(caught.value, "checkpoints")


def test_folder_is_made(tmp_path: Path) -> None:
    assert save_alone(tmp_path / "a" / "b", 1).is_dir()


def test_unfinished_is_removed_by_the_next_save(tmp_path: Path) -> None:
    """What a killed run left; published ones are not touched."""
    save_alone(tmp_path, 1)
    left = tmp_path / ".writing-step-00000002"
    left.mkdir()
    (left / "rank-00000.safetensors").write_bytes(b"half")
    assert steps(tmp_path) == [1]
    save_alone(tmp_path, 3)
    assert hidden(tmp_path) == []
    assert steps(tmp_path) == [1, 3]


def test_remove_unfinished_leaves_the_rest(tmp_path: Path) -> None:
    save_alone(tmp_path, 1)
    (tmp_path / "notes").mkdir()
    (tmp_path / ".writing-removed-step-00000000").mkdir()
    remove_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "step-00000001"]


@pytest.mark.parametrize("step", [5, 6])
def test_another_saves_meanwhile(step: int, tmp_path: Path) -> None:
    """A worker that was cut off while it saved, and its heir: neither harms what the other does."""
    (tmp_path / ".writing-step-00000004-0123abcd").mkdir()
    blocks = [whole(name, tensor) for name, tensor in tensors().items()]

    def heir(folder: Path) -> list[str]:
        save(tmp_path, state(step), blocks, ALONE, alone=False)
        (folder / "more").write_text("more")
        return ["more"]

    if step == 5:
        save(tmp_path, state(5), blocks, ALONE, heir, alone=False)
        assert (tmp_path / "step-00000005" / "more").is_file()
    else:  # what is of an earlier step is thought to be left over
        with pytest.raises(Overtaken, match="saved meanwhile"):
            save(tmp_path, state(5), blocks, ALONE, heir, alone=False)
    found = find_last_good(tmp_path, ALONE)
    assert found is not None
    assert found[0].name == f"step-{step:08d}"
    assert torch.equal(read_all(found[0])["matrix"], tensors()["matrix"])
    assert steps(tmp_path) == [step]
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_who_is_overtaken_gives_up_on_all_ranks(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of them was stopped while another took the folder away."""
    real = saving.save_file

    def late(payload: dict, path: Path) -> None:
        if path.name == f"rank-{rank:05d}.safetensors":
            remove_unfinished(tmp_path, before=6)
        real(payload, path)

    monkeypatch.setattr(saving, "save_file", late)
    blocks = rows(3)
    errors = run_threads(
        monkeypatch,
        2,
        lambda axis: save(tmp_path, state(5), [blocks[axis.rank]], axis, alone=False),
    )
    assert [type(error) for error in errors] == [Overtaken, Overtaken]
    assert list(tmp_path.iterdir()) == []


def test_what_is_taken_away_at_publication_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even what was written since."""
    real = Manifest.model_dump_json

    def late(manifest: Manifest, **how: int) -> str:
        remove_unfinished(tmp_path, before=6)
        return real(manifest, **how)

    monkeypatch.setattr(Manifest, "model_dump_json", late)
    blocks = [whole("w", torch.arange(4.0))]
    with pytest.raises(Overtaken):
        save(tmp_path, state(5), blocks, ALONE, alone=False)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_not_another_saver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though there are later checkpoints: of a run that has gone back, since they are damaged."""
    save_alone(tmp_path, 7)

    def fill(payload: dict, path: Path) -> None:
        raise FULL

    monkeypatch.setattr(saving, "save_file", fill)
    blocks = [whole("w", torch.arange(4.0))]
    with pytest.raises(CheckpointError, match="No space left on device"):
        save(tmp_path, state(5), blocks, ALONE, alone=False)
    assert (steps(tmp_path), hidden(tmp_path)) == ([7], [])


def test_two_prune_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another has removed meanwhile is gone, and that is all."""
    for step in range(1, 4):
        (tmp_path / f"step-{step:08d}").mkdir()
    real = saving.list_checkpoints

    def late(folder: Path) -> list[tuple[int, Path]]:
        found = real(folder)
        (folder / "step-00000001").rmdir()
        return found

    monkeypatch.setattr(saving, "list_checkpoints", late)
    prune(tmp_path, 3, 1, None)
    assert (steps(tmp_path), hidden(tmp_path)) == ([3], [])


def test_saving_again_replaces(tmp_path: Path) -> None:
    """After a resume the same step comes again."""
    save(tmp_path, state(1), [whole("matrix", torch.zeros(6, 4))], ALONE)
    path = save_alone(tmp_path, 1)
    assert torch.equal(read_all(path)["matrix"], tensors()["matrix"])
    assert hidden(tmp_path) == []
    assert steps(tmp_path) == [1]


def test_a_kill_while_replacing_leaves_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every rename a good checkpoint of that step is listed."""
    real = os.rename
    good = []

    def rename(source: Path, target: Path) -> None:
        good.append(find_last_good(tmp_path, ALONE))
        real(source, target)

    save_alone(tmp_path, 1)
    monkeypatch.setattr(os, "rename", rename)
    save_alone(tmp_path, 1)
    assert len(good) == 2
    assert all(found is not None and found[1].state == state(1) for found in good)


def test_the_new_one_counts_before_the_one_it_replaces(tmp_path: Path) -> None:
    for name in ("step-00000001", "step-00000001.replaced", "step-00000000"):
        (tmp_path / name).mkdir()
    names = [path.name for _, path in list_checkpoints(tmp_path)]
    assert names == ["step-00000000", "step-00000001.replaced", "step-00000001"]


def test_folder_that_is_not_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1, on another node, writes into a folder of its own."""
    blocks = rows(3)
    errors = run_threads(
        monkeypatch,
        2,
        lambda axis: save(tmp_path / str(axis.rank), state(1), [blocks[axis.rank]], axis),
    )
    assert all(isinstance(error, CheckpointError) for error in errors)
    assert "shared" in str(errors[0])
    assert steps(tmp_path / "0") == []


def test_step_is_unpublished_until_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the folder gets its name, everything in it is complete."""
    real = os.rename
    seen = []

    def rename(source: Path, target: Path) -> None:
        seen.append((steps(tmp_path), read_manifest(source).state.step))
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    save_alone(tmp_path, 1)
    assert seen == [([], 1)]
    assert steps(tmp_path) == [1]


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [
        (1, None, [6]),
        (2, None, [5, 6]),
        (10, None, [1, 2, 3, 4, 5, 6]),
        (1, 2, [2, 4, 6]),
        (1, 4, [4, 6]),
        (2, 3, [3, 5, 6]),
        (1, 1, [1, 2, 3, 4, 5, 6]),
    ],
)
def test_prune(keep_last: int, keep_every: int | None, kept: list[int], tmp_path: Path) -> None:
    """The newest ones stay, and multiples of keep_every."""
    for step in range(1, 7):
        (tmp_path / f"step-{step:08d}").mkdir()
    prune(tmp_path, 6, keep_last, keep_every)
    assert steps(tmp_path) == kept
    assert hidden(tmp_path) == []


def test_prune_keeps_what_is_newer(tmp_path: Path) -> None:
    """After a resume from an older one, the run has not caught up with these yet."""
    for step in (1, 2, 3, 8, 9):
        (tmp_path / f"step-{step:08d}").mkdir()
    prune(tmp_path, 3, 1, None)
    assert steps(tmp_path) == [3, 8, 9]


def test_other_names_are_no_checkpoints(tmp_path: Path) -> None:
    for name in ("step-", "step-x", "step--1", "step-1.old", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000007").write_text("a file")
    assert steps(tmp_path) == []


def test_no_tensors_at_all(tmp_path: Path) -> None:
    """A model without parameters or buffers."""
    assert read_manifest(save(tmp_path, state(1), [], ALONE)).tensors == {}
