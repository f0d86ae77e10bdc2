"""Damage is found, named, and the checkpoint before is used."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from unit_checkpoints import (
    ALONE,
    edit_manifest,
    read_all,
    rows,
    run_threads,
    save_alone,
    save_split,
    state,
    tensors,
)
from unit_helpers import assert_explained

from bigtrain.checkpoint import manifest as manifests
from bigtrain.checkpoint.load import find_last_good
from bigtrain.checkpoint.manifest import damaged_files, read_manifest
from bigtrain.errors import CheckpointError

FILE, MANIFEST = "rank-00000.safetensors", "manifest.json"
Edit = Callable[[dict], object]


def flip_a_bit(path: Path) -> None:
    data = bytearray((path / FILE).read_bytes())
    data[-3] ^= 16
    (path / FILE).write_bytes(data)


def cut(path: Path) -> None:
    (path / FILE).write_bytes((path / FILE).read_bytes()[:-1])


def edited(**change: object) -> Callable[[Path], None]:
    def act(path: Path) -> None:
        raw = json.loads((path / MANIFEST).read_text())
        (path / MANIFEST).write_text(json.dumps({**raw, **change}))

    return act


def written(text: str) -> Callable[[Path], object]:
    return lambda path: (path / MANIFEST).write_text(text)


def test_a_manifest_from_before_the_loss_scale_is_good(tmp_path: Path) -> None:
    """The digest covers what was written, not the keys that there are today."""
    path = save_alone(tmp_path, 1)
    raw = json.loads((path / MANIFEST).read_text())
    del raw["state"]["loss_scale"], raw["digest"]
    text = json.dumps(raw, sort_keys=True)
    raw["digest"] = hashlib.sha256(text.encode()).hexdigest()
    (path / MANIFEST).write_text(json.dumps(raw))
    assert read_manifest(path).state.loss_scale is None
    raw["state"]["cursor"] += 1
    (path / MANIFEST).write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="digest differs"):
        read_manifest(path)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit flip": (flip_a_bit, "another content"),
    "truncated": (cut, "bytes instead of"),
    "emptied": (lambda p: (p / FILE).write_bytes(b""), "0 bytes instead of"),
    "file missing": (lambda p: (p / FILE).unlink(), f"{FILE} is missing"),
    "manifest missing": (lambda p: (p / MANIFEST).unlink(), f"no readable {MANIFEST}"),
    "manifest empty": (written(""), "is damaged"),
    "manifest cut": (written('{"format": "bigtrain-checkpoint", "version": 1, "st'), "is damaged"),
    "manifest binary": (lambda p: (p / MANIFEST).write_bytes(b"\xff\xfe"), "no readable"),
    "manifest of another": (written('{"format": "other"}'), "is no bigtrain manifest"),
    "manifest is a list": (written("[]"), "is no bigtrain manifest"),
    "manifest is null": (written("null"), "is no bigtrain manifest"),
    "newer version": (edited(version=2), "has format version 2, this bigtrain reads 1"),
    "unknown key": (edited(extra=1), "is damaged"),
    "no state": (edited(state={}), "is damaged"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_and_the_one_before_is_used(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage, words = DAMAGE[name]
    good = save_alone(tmp_path, 1)
    bad = save_alone(tmp_path, 2)
    damage(bad)
    with caplog.at_level(logging.WARNING):
        found = find_last_good(tmp_path, ALONE)
    assert found is not None
    assert found[0] == good
    assert found[1].state == state(1)
    (record,) = caplog.records
    assert str(bad) in record.getMessage()
    assert words in record.getMessage()


def test_the_newest_good_one_is_used(tmp_path: Path) -> None:
    """By number, not by name or by time."""
    for step in (10, 9, 100_000_000, 2):
        save_alone(tmp_path, step)
    found = find_last_good(tmp_path, ALONE)
    assert found is not None
    assert found[0].name == "step-100000000"


def test_all_damaged_is_an_error(tmp_path: Path) -> None:
    """Never a silent start from the beginning."""
    for step in (1, 2):
        cut(save_alone(tmp_path, step))
    with pytest.raises(CheckpointError) as caught:
        find_last_good(tmp_path, ALONE)
    words = ("all checkpoints", "step-00000001", "step-00000002", "--restart")
    assert_explained(caught.value, *words)


def test_damaged_ones_are_set_aside(tmp_path: Path) -> None:
    """So that they do not count among those that are kept, nor are in the way of new ones."""
    save_alone(tmp_path, 1)
    flip_a_bit(save_alone(tmp_path, 2))
    find_last_good(tmp_path, ALONE)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["damaged-step-00000002", "step-00000001"]


def test_unreadable_file_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk error while the file is read."""

    def fail(path: Path) -> str:
        raise OSError(5, "Input/output error")

    path = save_alone(tmp_path, 1)
    monkeypatch.setattr(manifests, "sha256_of", fail)
    (line,) = damaged_files(path, read_manifest(path))
    assert line.endswith(f"{FILE} cannot be read: Input/output error")


def test_no_checkpoint(tmp_path: Path) -> None:
    assert find_last_good(tmp_path, ALONE) is None
    assert find_last_good(tmp_path / "nowhere", ALONE) is None


def test_all_ranks_hear_of_the_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each verifies a share of the files; what one finds, all act on."""
    good = save_split(tmp_path, rows(2, 3, 5), monkeypatch)
    bad = save_split(tmp_path, rows(2, 3, 5), monkeypatch, step=2)
    (bad / "rank-00002.safetensors").write_bytes(b"")
    found = run_threads(monkeypatch, 3, lambda axis: find_last_good(tmp_path, axis))
    assert [f[0] for f in found] == [good] * 3


def test_shares_of_the_verification(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Together the ranks verify every file, each one once."""
    path = save_split(tmp_path, rows(1, 2, 3), monkeypatch)
    manifest = read_manifest(path)
    for file in manifest.files:
        (path / file).write_bytes(b"")
    damage = [line for part in range(3) for line in damaged_files(path, manifest, part, 3)]
    assert sorted(damage) == sorted(damaged_files(path, manifest))
    assert len(damage) == 4


def block_of(raw: dict) -> dict:
    return raw["tensors"]["matrix"]["blocks"][0]


BAD_BLOCKS: dict[str, Edit] = {
    "gap": lambda raw: block_of(raw).update(sizes=[5, 4]),
    "no blocks": lambda raw: raw["tensors"]["matrix"].update(blocks=[]),
    "too many": lambda raw: raw["tensors"]["matrix"]["blocks"].append(block_of(raw)),
    "overlap and gap": lambda raw: raw["tensors"]["matrix"].update(
        blocks=[{**block_of(raw), "sizes": [3, 4]}] * 2
    ),
    "outside of the tensor": lambda raw: block_of(raw).update(offsets=[1, 0]),
    "before the tensor": lambda raw: block_of(raw).update(offsets=[-1, 0]),
    "negative sizes": lambda raw: block_of(raw).update(sizes=[-6, -4]),
    "other number of dims": lambda raw: block_of(raw).update(offsets=[0], sizes=[24]),
    "too few offsets": lambda raw: block_of(raw).update(offsets=[0]),
    "unknown file": lambda raw: block_of(raw).update(file="rank-00009.safetensors"),
    "file elsewhere": lambda raw: block_of(raw).update(file="../../other.safetensors"),
}


@pytest.mark.parametrize(
    "name",
    list(BAD_BLOCKS),
)
def test_blocks_that_are_no_tiling_are_refused(name: str, tmp_path: Path) -> None:
    """Every element of every tensor is in exactly one block, of a file of this checkpoint."""
    path = save_alone(tmp_path, 1)
    edit_manifest(path, BAD_BLOCKS[name])
    with pytest.raises(CheckpointError) as caught:
        read_manifest(path)
    assert_explained(caught.value, "matrix")


@pytest.mark.parametrize(
    "key",
    [
        "nothing#0",
        pytest.param("ids#0"),
        pytest.param("cube#0_0_0"),
    ],
)
def test_key_that_is_not_the_block(key: str, tmp_path: Path) -> None:
    """The file is whole, but what it has under that name is missing or of another shape."""
    path = save_alone(tmp_path, 1)
    edit_manifest(path, lambda raw: block_of(raw).update(key=key))
    with pytest.raises(CheckpointError):
        read_all(path)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("[" * 100_000),
        pytest.param('{"version": ' + "9" * 5000 + "}"),
        '{"format": "bigtrain-checkpoint", "version": NaN}',
    ],
    ids=["deep", "long number", "nan"],
)
def test_odd_json(text: str, tmp_path: Path) -> None:
    path = save_alone(tmp_path, 1)
    (path / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError):
        read_manifest(path)


def test_changed_state_is_seen(tmp_path: Path) -> None:
    """A flipped digit of the cursor would repeat or skip samples."""
    path = save_alone(tmp_path, 1)
    text = (path / MANIFEST).read_text()
    (path / MANIFEST).write_text(text.replace('"cursor": 16', '"cursor": 17'))
    with pytest.raises(CheckpointError):
        read_manifest(path)


def mutated(data: bytes, dice: random.Random) -> bytes:
    """Return `data` after one to three changed, lost or inserted bytes."""
    out = bytearray(data)
    for _ in range(dice.randint(1, 3)):
        at = dice.randrange(len(out))
        some = dice.choice([dice.randrange(256), *b'0123456789{}[]",:-'])
        change = dice.randrange(3)
        if change == 0:
            out[at] = some
        elif change == 1:
            del out[at : at + dice.randint(1, 5)]
        else:
            out.insert(at, some)
    return bytes(out)


def test_mutated_manifest(tmp_path: Path) -> None:
    """It is refused with a CheckpointError, or else what is read is what was written."""
    path = save_alone(tmp_path, 1)
    original = (path / MANIFEST).read_bytes()
    dice = random.Random(1)
    num_refused = 0
    for _ in range(400):
        (path / MANIFEST).write_bytes(mutated(original, dice))
        try:
            if damaged_files(path, read_manifest(path)):
                continue
            got = read_all(path)
        except CheckpointError:
            num_refused += 1
            continue
        assert all(torch.equal(got[name], tensor) for name, tensor in tensors().items())
    assert num_refused > 200
