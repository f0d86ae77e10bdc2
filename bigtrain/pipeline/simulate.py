"""A clock for schedules: when each action starts and stops, what idles, what is held in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from bigtrain.errors import BigtrainError
from bigtrain.pipeline.table import Action, Table, need_of

Time = int | float | Fraction
PerStage = Time | Sequence[Time]


@dataclass(frozen=True)
class Costs:
    """How long things take: one number for all stages, or one per stage.

    `backward` is the whole backward, of which `weight` is the part for weight gradients; so an
    input backward takes backward - weight. `transfer` is a message between two ranks. Fractions
    give exact results.
    """

    forward: PerStage = 1
    backward: PerStage = 2
    weight: PerStage = 1
    transfer: Time = 0


@dataclass(frozen=True)
class Span:
    """An action on the clock."""

    action: Action
    start: Any
    stop: Any


@dataclass(frozen=True)
class Timeline:
    """What a table amounts to on a clock.

    `spans` and `memory` have one entry per rank. A memory curve is a list of (time, activations
    held from then on).
    """

    table: Table
    spans: tuple[tuple[Span, ...], ...]
    memory: tuple[tuple[tuple[Any, Any], ...], ...]
    step_time: Any

    @property
    def busy(self) -> tuple[Any, ...]:
        """How long each rank computes."""
        return tuple(sum(span.stop - span.start for span in row) for row in self.spans)

    @property
    def bubbles(self) -> tuple[Any, ...]:
        """The share of the step that each rank idles."""
        if not self.step_time:
            return tuple(0 for _ in self.spans)
        return tuple(1 - _ratio(busy, self.step_time) for busy in self.busy)

    @property
    def bubble(self) -> Any:
        """The share of the step that all ranks together idle."""
        if not self.step_time:
            return 0
        return 1 - _ratio(sum(self.busy), self.step_time * len(self.spans))


def simulate(table: Table, costs: Costs, weight_memory: Any = 0.5) -> Timeline:
    """Return when each compute action of `table` starts and stops.

    A message travels while its sender goes on; it arrives `transfer` after the action that made
    it. `weight_memory` is what is held of an activation between its I and its W.

    Raises:
        BigtrainError: a cost is negative, not finite or lacks a stage; or ranks wait in a circle.
    """
    times = _Times(costs, table.num_stages)
    rows = [[action for action in row if action.is_compute] for row in table.rows]
    spans: list[list[Span]] = [[] for _ in rows]
    done: dict[tuple[str, int, int], Any] = {}
    waiting: dict[tuple[str, int, int], int] = {}
    ready = list(range(len(rows)))
    while ready:
        rank = ready.pop()
        while len(spans[rank]) < len(rows[rank]):
            action = rows[rank][len(spans[rank])]
            need = need_of(action, table.num_stages)
            start = spans[rank][-1].stop if spans[rank] else 0
            if need is not None:
                key = (*need, action.microbatch)
                if key not in done:
                    waiting[key] = rank
                    break
                away = table.placement[need[1]] != rank
                start = max(start, done[key] + times.transfer if away else done[key])
            stop = start + times.of(action)
            spans[rank].append(Span(action, start, stop))
            if action.kind != "W":
                made = ("F" if action.kind == "F" else "B", action.stage, action.microbatch)
                done[made] = stop
                if made in waiting:
                    ready.append(waiting.pop(made))
    if any(len(done_) < len(row) for done_, row in zip(spans, rows, strict=True)):
        raise BigtrainError(
            f"the ranks of schedule {table.name} wait for each other in a circle",
            mend="validate(table) tells which rank waits for what",
        )
    step_time = max((row[-1].stop for row in spans if row), default=0)
    memory = tuple(_memory(row, weight_memory) for row in spans)
    return Timeline(table, tuple(map(tuple, spans)), memory, step_time)


class _Times:
    """Costs by action, checked."""

    def __init__(self, costs: Costs, num_stages: int) -> None:
        forward = _per_stage("forward", costs.forward, num_stages)
        backward = _per_stage("backward", costs.backward, num_stages)
        weight = _per_stage("weight", costs.weight, num_stages)
        (self.transfer,) = _per_stage("transfer", costs.transfer, 1)
        for whole, part in zip(backward, weight, strict=True):
            if part > whole:
                raise BigtrainError(
                    f"the weight part of a backward takes {part}, the whole backward {whole}",
                    why="backward counts both the input and the weight gradients",
                    mend=f"give a weight time of at most {whole}",
                )
        split = [whole - part for whole, part in zip(backward, weight, strict=True)]
        self._by_kind = {"F": forward, "B": backward, "I": split, "W": weight}

    def of(self, action: Action) -> Any:
        return self._by_kind[action.kind][action.stage]


def _per_stage(name: str, given: PerStage, num_stages: int) -> list[Time]:
    values = list(given) if isinstance(given, Sequence) else [given] * num_stages
    if len(values) != num_stages:
        raise BigtrainError(
            f"{len(values)} {name} times for {num_stages} stages",
            mend="give one time for all stages, or one per stage",
        )
    for value in values:
        if not 0 <= value < float("inf"):
            raise BigtrainError(
                f"a {name} time of {value}", mend=f"give a {name} time that is finite and >= 0"
            )
    return values


def _memory(spans: list[Span], weight_memory: Any) -> tuple[tuple[Any, Any], ...]:
    if all(span.action.kind == "F" for span in spans):
        return ((0, 0),)  # nothing is kept for a backward that never comes
    change = {"F": 1, "B": -1, "I": weight_memory - 1, "W": -weight_memory}
    held: Any = 0
    curve: list[tuple[Any, Any]] = [(0, 0)]
    for span in spans:
        held += change[span.action.kind]
        curve.append((span.stop, held))
    return tuple(curve)


def _ratio(part: Any, whole: Any) -> Any:
    """Return part / whole, exactly where both are whole numbers or fractions."""
    if isinstance(part, float) or isinstance(whole, float):
        return part / whole
    return Fraction(part) / Fraction(whole)
