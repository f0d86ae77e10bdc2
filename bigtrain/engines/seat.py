"""A worker's place among those that train together: what the board tells it, all its ranks know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bigtrain.comm.collectives import all_gather_object
from bigtrain.comm.mesh import Mesh
from bigtrain.config.schema import Config
from bigtrain.engines.seam import Place
from bigtrain.server.chaos import Chaos
from bigtrain.server.client import Client, receivers_of
from bigtrain.server.environment import Environment
from bigtrain.server.fragments import Fragments, number_of
from bigtrain.server.protocol import THE_END, Who
from bigtrain.server.table import Spec

_MOST_UNTOLD = 64  # rounds; the board tells with each turn which ones count


def fragments_of(config: Config) -> Fragments:
    """Return which blocks meet in a round: all where something is done with the parameters."""
    each = config.server.steps_of_round
    steps = (config.train.steps, config.checkpoint.every, config.eval.every)
    return Fragments(
        config.server.fragments if config.server.mode == "local" else 1,
        tuple(some // each for some in steps),
    )


class Seat:
    """Speaks with servers for the ranks of one worker: rank 0 with the board, each with its own.

    turn: what to do next. outcome: of the last round that is known; `is_new`: since the last turn.
    inherits: does it speak in place of one that is gone?

    Raises:
        CommError: no server that holds a block is left, or one refuses this worker.
    """

    def __init__(self, mesh: Mesh, config: Config, env: Environment) -> None:
        assert env.worker is not None
        self.mesh, self.worker, self.server = mesh, env.worker, config.server
        self.client = Client(
            Who("worker", env.worker, env.incarnation, mesh.rank, mesh.world.degree),
            env.addresses,
            env.token,
            lease_seconds=config.server.lease_seconds,
            patience_seconds=max(config.parallel.timeout_seconds, config.server.join_seconds),
            fragments=fragments_of(config),
            chaos=Chaos(env.chaos, "worker", env.worker, env.incarnation),
        )
        self.hosts = [host for host, _ in env.addresses]  # of the servers
        self.turn: dict[str, Any] = {"clock": 0}
        self.outcome: dict[str, Any] | None = None
        self.is_new = self.inherits = False
        self._read: dict[int, list[list[int]]] = {}  # round -> samples of each step of it

    def start(self, specs: Sequence[Spec]) -> None:
        """Declare this rank's blocks to servers."""
        each = all_gather_object(receivers_of(specs), self.mesh.world, "whom ranks push to")
        self.client.start(specs, set().union(*each) if self.mesh.rank == 0 else ())
        answers = list(self.client.wanted.values())
        self.fills = any(answer["fill"] for answer in answers)
        self.moments: list[str] = answers[0]["moments"]

    def begin(self) -> None:
        """Take part from now on, and take the first turn."""
        if self.mesh.rank == 0:
            self.client.ready()
        self.take_turn()

    def report(self, base: int, totals: torch.Tensor) -> None:
        """Tell the board of this round's part, once servers have it; and take the next turn."""
        clock = self.turn["clock"]
        servers = self.client.wait_pushed(clock)
        if self.mesh.rank == 0:
            self.client.report(clock, base, totals.tolist(), servers)
        self.take_turn()

    def take_turn(self) -> None:
        known = self.outcome["number"] if self.outcome is not None else 0
        turn = self.client.next_turn(self.turn["clock"]) if self.mesh.rank == 0 else None
        self.turn = all_gather_object(turn, self.mesh.world, "the board's word")[0]
        self.client.begin(self.turn["clock"])
        self.outcome = self.turn["outcome"]
        self.is_new = self.outcome is not None and self.outcome["number"] > known

    def read(self, samples: list[int]) -> None:
        """Note what this rank has read in a step of the round that it is at work on."""
        clock = self.turn["clock"]
        self._read.setdefault(clock, []).append(samples)
        # Others read what came too late.
        oldest = number_of(clock) - self.server.staleness - _MOST_UNTOLD
        self._read = {c: steps for c, steps in self._read.items() if number_of(c) >= oldest}

    def counted(self) -> list[tuple[int, list[list[int]]]]:
        """Return what this rank has read and is in updates, as the board has told since the last
        call: (number of the update, samples of each step)."""
        used = [(c, number) for c, number in self.turn.get("used", []) if c in self._read]
        return [(number, self._read.pop(clock)) for clock, number in used]

    @property
    def workers(self) -> list[int]:
        """Workers whose part is in the last round."""
        return [part[0] for part in self.outcome["parts"]] if self.outcome is not None else []

    @property
    def leads(self) -> bool:
        """Does this worker speak for the last round?"""
        if self.outcome is None:
            return self.worker == 0
        me, speaker = [self.worker, self.client.who.incarnation], self.outcome["speaker"]
        return any(part[:2] == me for part in self.outcome["parts"] if part[0] == speaker)

    def totals(self, like: torch.Tensor) -> torch.Tensor:
        """Return what the last round's workers have reported, summed."""
        assert self.outcome is not None
        return torch.tensor(self.outcome["totals"], dtype=like.dtype, device=like.device)

    def place(self, ahead: int = 0) -> Place:
        """Return what this rank reads, `ahead` samples after what the turn says."""
        cursor, number = self.turn["share"]
        dp = self.mesh.dp
        return Place(cursor + ahead, number * dp.degree + dp.rank, self.turn["workers"] * dp.degree)

    def evaluation(self) -> Place | None:
        """Return this rank's place in an evaluation after the last round; None: in none."""
        if not self.is_new or self.worker not in self.workers:
            return None
        dp, number = self.mesh.dp, self.workers.index(self.worker)
        return Place(0, number * dp.degree + dp.rank, len(self.workers) * dp.degree)

    def must_save(self, saved: bool) -> bool:
        """Wait until the last checkpoint is there: return whether it is for this worker to save it,
        since who was to is gone. saved: has this worker done it?"""
        everybody = range(self.server.workers)
        while True:
            values = None
            if self.mesh.rank == 0:
                me = [float(worker == self.worker) for worker in everybody]
                offer = [*me, float(saved)]
                values = self.client.add_up(THE_END, self.turn["version"], everybody, offer)
            values = all_gather_object(values, self.mesh.world, "the end of other workers")[0]
            if values[-1]:
                return False
            # Those of the last round have what it has made of the optimizer's state.
            heir = next(w for w in (*self.workers, *everybody) if values[w])
            if heir == self.worker:
                self.inherits = True
                return True

    def add_up(self, totals: torch.Tensor, what: str) -> torch.Tensor:
        """Return the sum over the workers of the last round."""
        after, values = self.turn["version"], None
        if self.mesh.rank == 0:
            name = f"{what} after round {after}"
            values = self.client.add_up(name, after, self.workers, totals.tolist())
        values = all_gather_object(values, self.mesh.world, what)[0]
        return torch.tensor(values, dtype=totals.dtype, device=totals.device)
