"""What is saved is what is read, under any split of the tensors into blocks."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from unit_checkpoints import (
    ALONE,
    MATRIX,
    part,
    read_all,
    read_into,
    rows,
    run_threads,
    save_alone,
    save_split,
    state,
    tensors,
    whole,
)
from unit_helpers import assert_explained

from bigtrain.checkpoint.load import load_blocks
from bigtrain.checkpoint.manifest import read_manifest
from bigtrain.checkpoint.save import save
from bigtrain.comm.block import NamedBlock
from bigtrain.comm.mesh import Axis
from bigtrain.errors import CheckpointError


def columns(*cuts: int) -> list[NamedBlock]:
    edges = itertools.pairwise([0, *cuts, 4])
    return [part("matrix", MATRIX, (0, a), (6, b - a)) for a, b in edges]


def tiles() -> list[NamedBlock]:
    return [part("matrix", MATRIX, (r, c), (3, 2)) for r in (0, 3) for c in (0, 2)]


SPLITS = {
    "whole": rows(),
    "2 rows": rows(3),
    "uneven rows": rows(1, 2),
    "4 rows": rows(2, 3, 5),
    "columns": columns(1),
    "tiles": tiles(),
}


def test_round_trip(tmp_path: Path) -> None:
    """Every kind of tensor, bit for bit, and the state."""
    path = save_alone(tmp_path, 12)
    assert path == tmp_path / "step-00000012"
    for name, tensor in read_all(path).items():
        assert tensor.dtype == tensors()[name].dtype
        assert torch.equal(tensor, tensors()[name]), name
    assert read_manifest(path).state == state(12)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_config_with_numbers_that_json_has_not(value: float, tmp_path: Path) -> None:
    """Arguments of a user's factory may be .inf or .nan."""
    odd = state(1).model_copy(update={"config": {"model": {"args": {"limit": value}}}})
    path = save(tmp_path, odd, [whole("matrix", MATRIX)], ALONE)
    assert repr(read_manifest(path).state.config) == repr(odd.config)


def test_only_standard_files(tmp_path: Path) -> None:
    """safetensors and JSON: no pickle, and other tools can read them."""
    from safetensors.torch import load_file

    path = save_alone(tmp_path, 1)
    assert sorted(p.name for p in path.iterdir()) == ["manifest.json", "rank-00000.safetensors"]
    assert torch.equal(load_file(path / "rank-00000.safetensors")["matrix#0_0"], MATRIX)
    assert json.loads((path / "manifest.json").read_text())["format"] == "bigtrain-checkpoint"


@pytest.mark.parametrize("written", SPLITS)
@pytest.mark.parametrize("wanted", SPLITS)
def test_any_split_reads_any_other(
    written: str, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_split(tmp_path, SPLITS[written], monkeypatch)
    for block in SPLITS[wanted]:
        target = NamedBlock(block.name, block.shape, block.block, torch.zeros_like(block.tensor))
        read_into(path, [target])
        assert torch.equal(target.tensor, block.tensor)


def test_replicas_share_the_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what all ranks hold, each block is written once, and the bytes are balanced."""
    held = {f"t{i}": torch.full((10, 10), float(i)) for i in range(8)}

    def act(axis: Axis) -> Path:
        blocks = [whole(name, tensor, axis.rank, 4) for name, tensor in held.items()]
        return save(tmp_path, state(1), blocks, axis)

    path = run_threads(monkeypatch, 4, act)[0]
    manifest = read_manifest(path)
    assert len(manifest.files) == 4
    sizes = [file.size for file in manifest.files.values()]
    assert max(sizes) - min(sizes) < 100
    for name, tensor in held.items():
        out = torch.zeros(10, 10)
        read_into(path, [whole(name, out)])
        assert torch.equal(out, tensor)


def test_a_rank_may_have_nothing_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def act(axis: Axis) -> Path:
        return save(tmp_path, state(1), [whole("matrix", MATRIX, axis.rank, 3)], axis)

    path = run_threads(monkeypatch, 3, act)[0]
    assert list(read_manifest(path).files) == ["rank-00000.safetensors"]


def test_views_of_one_buffer(tmp_path: Path) -> None:
    """As parameters in a flat bucket are; strided ones too."""
    flat = torch.arange(24.0)
    blocks = [whole("a", flat[:12].view(3, 4)), whole("b", flat[12:].view(3, 4).t())]
    path = save(tmp_path, state(1), blocks, ALONE)
    a, b = torch.zeros(3, 4), torch.zeros(4, 3)
    read_into(path, [whole("a", a), whole("b", b)])
    assert torch.equal(a, flat[:12].view(3, 4))
    assert torch.equal(b, flat[12:].view(3, 4).t())


def test_read_converts_to_the_dtype_in_memory(tmp_path: Path) -> None:
    path = save_alone(tmp_path, 1)
    out = torch.zeros(6, 4, dtype=torch.bfloat16)
    read_into(path, [whole("matrix", out)])
    assert torch.equal(out, MATRIX.bfloat16())


def test_read_into_a_view_of_a_parameter(tmp_path: Path) -> None:
    path = save_alone(tmp_path, 1)
    param = torch.nn.Parameter(torch.zeros(6, 4))
    read_into(path, [whole("matrix", param)])
    assert torch.equal(param, MATRIX)


def test_read_into_a_scalar_parameter(tmp_path: Path) -> None:
    path = save_alone(tmp_path, 1)
    param = torch.nn.Parameter(torch.zeros(()))
    read_into(path, [whole("scalar", param)])
    assert param.item() == 3.5


def test_several_blocks_of_one_tensor_on_one_rank(tmp_path: Path) -> None:
    """As a rank has that owns rows of several owners."""
    path = save(tmp_path, state(1), rows(2, 4), ALONE)
    out = torch.zeros(6, 4)
    read_into(path, [whole("matrix", out)])
    assert torch.equal(out, MATRIX)


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    path = save_alone(tmp_path, 1)
    blocks = [whole(f"missing{i}", torch.zeros(1)) for i in range(7)]
    with pytest.raises(CheckpointError) as caught:
        load_blocks(path, read_manifest(path), blocks)
    assert_explained(caught.value, str(path), "lacks 7 tensors", "missing0", "missing4, ...")


def test_other_shape_is_named(tmp_path: Path) -> None:
    path = save_alone(tmp_path, 1)
    with pytest.raises(CheckpointError) as caught:
        read_into(path, [whole("matrix", torch.zeros(6, 5))])
    assert_explained(caught.value, "matrix has shape [6, 4], the model [6, 5]")


def test_nothing_is_changed_when_a_tensor_does_not_fit(tmp_path: Path) -> None:
    """Refused before the first copy."""
    path = save_alone(tmp_path, 1)
    out = torch.zeros(6, 4)
    with pytest.raises(CheckpointError):
        read_into(path, [whole("matrix", out), whole("cube", torch.zeros(1))])
    assert not out.any()
