"""What the tests of pipeline parallelism share: models, schedules from a file, and how to train."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from parity_models import EPS, VOCAB, own_blocks, relative_error
from torch import nn

from bigtrain.comm.gradient import GradientPath
from bigtrain.comm.mesh import Mesh
from bigtrain.compose import build_pipeline
from bigtrain.models import GPT, Llama
from bigtrain.observe.replicas import find_divergence
from bigtrain.optim import AdamW
from bigtrain.pipeline.run import Pipeline
from bigtrain.pipeline.schedule import make_table
from bigtrain.pipeline.table import Action, Table
from bigtrain.pipeline.table_file import read_csv, to_csv
from bigtrain.pipeline.units import choose_cuts

BATCH, LENGTH = 12, 8
Batch = tuple[torch.Tensor, torch.Tensor]


# -- models and batches -----------------------------------------------------------------------


def gpt(layers: int, tie: bool = False, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(7)
    return GPT(VOCAB, 2 * LENGTH, layers, 16, 4, dropout=dropout, tie_embeddings=tie)


def llama(layers: int, tie: bool = False) -> nn.Module:
    torch.manual_seed(7)
    return Llama(VOCAB, 2 * LENGTH, layers, 16, 4, num_kv_heads=2, mlp_size=24, tie_embeddings=tie)


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "gpt": gpt,
    "gpt-tied": partial(gpt, tie=True),
    "llama": llama,
    "llama-tied": partial(llama, tie=True),
}


def batches_of(steps: int, batch: int = BATCH, length: int = LENGTH) -> list[Batch]:
    """Return global batches, the same in every process."""
    draw = torch.Generator().manual_seed(3)
    found = []
    for _ in range(steps):
        ids = torch.randint(0, VOCAB, (batch, length + 1), generator=draw)
        found.append((ids[:, :-1].contiguous(), ids[:, 1:].contiguous()))
    return found


def language_loss(model: Any, batch: Batch) -> torch.Tensor:
    loss: torch.Tensor = model(*batch)
    return loss


def shares(sizes: Sequence[int], mesh: Mesh) -> list[slice]:
    """Return which samples of the global batch each microbatch of this replica has."""
    begin, found = sum(sizes) * mesh.dp.rank, []
    for size in sizes:
        found.append(slice(begin, begin + size))
        begin += size
    return found


def scramble(model: nn.Module, mesh: Mesh) -> nn.Module:
    """Give all ranks but the first of each replica other weights, which must not matter."""
    if mesh.dp.rank or mesh.tp.rank:
        draw = torch.Generator().manual_seed(mesh.rank)
        with torch.no_grad():
            for param in model.parameters():
                param.normal_(generator=draw)
    return model


# -- schedules --------------------------------------------------------------------------------


def odd_table(num_ranks: int, num_microbatches: int, folder: Path) -> Table:
    """Return a schedule that no generator makes, read back from a file.

    Stages go from the last rank to the first (three on two ranks, two on one). Backward takes
    microbatches in reverse; those with odd numbers go in two halves, with weights at the very end.
    """
    placement = {1: (0, 0), 2: (1, 0, 1)}.get(num_ranks, tuple(reversed(range(num_ranks))))
    micros = range(num_microbatches)
    rows = []
    for rank in range(num_ranks):
        stages = [stage for stage, owner in enumerate(placement) if owner == rank]
        row = [Action("F", stage, micro) for micro in micros for stage in stages]
        back = [(stage, micro) for micro in reversed(micros) for stage in reversed(stages)]
        row += [Action("BI"[micro % 2], stage, micro) for stage, micro in back]
        row += [Action("W", stage, micro) for stage, micro in back if micro % 2]
        rows.append(tuple(row))
    table = Table("odd", placement, num_microbatches, tuple(rows))
    path = folder / f"odd-{num_ranks}-{num_microbatches}.csv"
    path.write_text(to_csv(table))
    return read_csv(path)


@dataclass(frozen=True)
class Way:
    """How a model is trained: `sizes` are those of a replica's microbatches.

    schedule: a name, with "/2" behind it for 2 virtual stages; or a table.
    """

    model: str
    layers: int
    schedule: str | Table
    sizes: tuple[int, ...]
    sequence: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """What build_pipeline is given of the schedule."""
        if isinstance(self.schedule, Table):
            return {"schedule": self.schedule}
        name, _, virtual = self.schedule.partition("/")
        return {"schedule": name, "virtual_stages": int(virtual or 1)}

    def table(self, num_ranks: int) -> Table:
        """Return the table of a step."""
        if isinstance(self.schedule, Table):
            return self.schedule
        options = self.options
        return make_table(
            options["schedule"], num_ranks, len(self.sizes), options["virtual_stages"]
        )

    def split(self, num_stages: int) -> list[str] | None:
        """Return where stages begin, so that they have about as many units each; None for one."""
        units = ["embedding", *(f"blocks.{index}" for index in range(self.layers)), "head"]
        begins = [stage * len(units) // num_stages for stage in range(1, num_stages)]
        return [units[begin] for begin in begins] or None


# -- what a rank does -------------------------------------------------------------------------


def train(
    mesh: Mesh,
    way: Way,
    steps: int,
    batches: Sequence[Batch] | None = None,
    loss_of: Callable[[Any, Any], torch.Tensor] = language_loss,
) -> dict[str, Any]:
    """Train on this rank's share of the batches; return what a test compares."""
    batches = batches or batches_of(steps)
    model = scramble(MODELS[way.model](way.layers), mesh)
    pipeline = build_pipeline(
        model,
        mesh,
        **way.options,
        split=way.split(way.table(mesh.pp.degree).num_stages),
        sequence_parallel=way.sequence,
        bucket_mb=0.01,
    )
    path = pipeline.path
    optimizer = AdamW(path.segments(), lr=1e-2, eps=EPS)
    start = own_blocks(path)
    model.eval()
    logits = pipeline.forward(batches[0][0][:3])
    model.train()
    losses, grads, norms = [], [], []
    parts = shares(way.sizes, mesh)
    weights = [size / sum(way.sizes) for size in way.sizes]
    for tokens, targets in batches:
        micros = [(tokens[part], targets[part]) for part in parts]
        losses.append(float(pipeline.step(micros, loss_of, weights)))
        path.finish()
        grads.append(named_gradients(path))
        norms.append(float(path.grad_norm()))
        optimizer.step()
        path.publish()
    return {
        "start": start,
        "logits": logits,
        "losses": losses,
        "grads": grads,
        "norms": norms,
        "params": own_blocks(path),
        "shards": path.shards,
        "dp": mesh.dp.rank,
        "stages": [stage.index for stage in pipeline.stages],
        "peak": pipeline.peak_in_flight,
        "divergence": find_divergence(own_blocks(path), mesh.world),
    }


def named_gradients(path: GradientPath) -> dict[str, torch.Tensor]:
    """Return what `param.grad` shows after finish(), by names in the full model."""
    return {
        path.names[param]: param.grad.clone()
        for param in path.model.parameters()
        if param.grad is not None
    }


def one_step(
    pipeline: Pipeline, micros: Sequence[Any], loss_of: Callable[[Any, Any], torch.Tensor]
) -> dict[str, Any]:
    """Do one step without an update; return its loss, and the gradients of this rank."""
    loss = float(pipeline.step(micros, loss_of))
    pipeline.path.finish()
    return {"loss": loss, "grads": named_gradients(pipeline.path)}


def ready() -> None:
    """Let forked ranks find what the first use of fake tensors makes, which takes a second."""
    choose_cuts(gpt(2), 2, None, "counted", batches_of(1)[0], language_loss)


# -- what is compared -------------------------------------------------------------------------


def assert_gradients(
    ranks: Sequence[Mapping[str, torch.Tensor]],
    wanted: Mapping[str, torch.Tensor],
    most: float = 5e-6,
    shards: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """See that all of `wanted` is somewhere, and what each rank has is its part of it."""
    assert {name for grads in ranks for name in grads} == set(wanted)
    for rank, grads in enumerate(ranks):
        for name, grad in grads.items():
            own = wanted[name] if shards is None else shards[rank][name].take(wanted[name])
            error = relative_error(grad, own, floor=1e-4)
            assert error < most, f"gradient of {name} on rank {rank}: {error}"


def plain_gradients(
    model: nn.Module, batches: Sequence[Any], loss_of: Callable[[Any, Any], torch.Tensor]
) -> dict[str, Any]:
    """Return loss and gradients of the mean over `batches`, with nothing but torch."""
    total = 0.0
    for batch in batches:
        loss = loss_of(model, batch) / len(batches)
        loss.backward()
        total += loss.item()
    grads = {
        name: torch.zeros_like(param) if param.grad is None else param.grad.clone()
        for name, param in model.named_parameters()
        if param.requires_grad
    }
    return {"loss": total, "grads": grads}


def shown(outcome: list[Any] | str) -> list[Any]:
    """Return what ranks returned; fail with their error, without a traceback of our own."""
    assert not isinstance(outcome, str), outcome
    return outcome
