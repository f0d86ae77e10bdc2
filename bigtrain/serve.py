"""What a server of a run is: the run's optimizer and policy, around what serves."""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bigtrain.comm.buckets import Segment
from bigtrain.config.load import load_config
from bigtrain.config.schema import Config, SgdOptimizer
from bigtrain.engines.coding import coding_of
from bigtrain.engines.seat import fragments_of
from bigtrain.errors import LaunchError
from bigtrain.lifetime import StopRequest
from bigtrain.machine import threads_per_rank
from bigtrain.observe.progress import setup_logging
from bigtrain.optim import learning_rate, make_optimizer
from bigtrain.optim.build import OptimizerConfig
from bigtrain.optim.clip import grad_divisor
from bigtrain.optim.rows import make_row_optimizer
from bigtrain.run_folder import RunFolder
from bigtrain.server.board import Update
from bigtrain.server.chaos import Chaos
from bigtrain.server.environment import Environment
from bigtrain.server.rounds import Closed, Rules
from bigtrain.server.rows import RowTables
from bigtrain.server.server import Server, Setup

log = logging.getLogger(__name__)


class RunPolicy:
    """What a run wants of each update: the rate, clipping, and that no NaN gets in."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._nominal = 0.0  # items of a step of all workers
        self._told = 0  # the last round that was told to be skipped

    def begin(self, about: Mapping[str, Any]) -> None:
        self._nominal = self.config.train.global_batch * float(about["items_per_sample"])

    def update(self, closed: Closed, squares: float) -> Update:
        """Return how to update, from (sum of losses, items, votes to stop) and squares."""
        config, (loss_sum, items, *_) = self.config, closed.totals
        if config.server.mode == "local":
            return self._meeting(closed, squares)
        correction = items / self._nominal if items > 0 else 1.0
        norm = float(torch.tensor(squares, dtype=torch.float64).sqrt().float())
        divisor = grad_divisor(norm / correction, correction, config.train.max_grad_norm)
        step, steps = closed.number - 1, config.train.steps
        rate = learning_rate(config.schedule, config.optimizer.lr, step, steps)
        if config.server.mode == "async":
            rate /= 1 + closed.staleness  # https://arxiv.org/abs/1511.05950
        finite = math.isfinite(loss_sum) and math.isfinite(norm)
        return Update(rate, divisor if finite else 1.0, not finite, norm)

    def _meeting(self, closed: Closed, squares: float) -> Update:
        """Return how to move by the mean of how far workers came."""
        count, finite = len(closed.parts), math.isfinite(squares)
        if not finite and closed.number > self._told:  # asked again if a server is lost meanwhile
            self._told, each = closed.number, self.config.server.steps_of_round
            log.warning(
                "steps %d to %d: what worker(s) %s have sent adds up to NaN or infinity; their "
                "meeting is skipped, and all go on from the parameters before",
                (closed.number - 1) * each + 1,
                closed.number * each,
                ", ".join(str(part.worker) for part in closed.parts),
            )
        return Update(self.config.server.outer_lr, float(count), not finite, squares**0.5 / count)

    def is_held(self, closed: Closed) -> bool:
        every = self.config.checkpoint.every
        number = closed.number * self.config.server.steps_of_round
        is_last = number >= self.config.train.steps or any(closed.totals[2:])
        return is_last or (every > 0 and number % every == 0)


def rules_of(config: Config) -> Rules:
    """Return how rounds close."""
    server = config.server
    return Rules(
        mode="sync" if server.mode == "local" else server.mode,
        workers=server.workers,
        quorum=server.least,
        grace_seconds=server.grace_seconds,
        stall_seconds=config.parallel.timeout_seconds / 2,
        join_seconds=server.join_seconds,
        staleness=server.staleness if server.mode == "ssp" else 0,
        last=config.train.steps // server.steps_of_round,
    )


def serve(config_path: str, overrides: Sequence[str], stop: StopRequest) -> None:
    """Be a server, as the environment says which, until the run is over.

    Raises:
        BigtrainError: it cannot listen, or what the run needs is lost.
    """
    env = Environment.read()
    assert env.server is not None
    setup_logging(env.server, quiet=False)
    config = load_config(config_path, overrides, env.ranks)
    sharers = env.sharers or config.server.servers
    torch.set_num_threads(threads_per_rank(config.launch.threads_per_rank, sharers))
    setup = Setup(
        index=env.server,
        addresses=env.addresses,
        token=env.token,
        rules=rules_of(config),
        batch=config.train.global_batch * config.server.steps_of_round,
        lease_seconds=config.server.lease_seconds,
        status=RunFolder(Path(config.run.dir)).status,
        incarnation=env.incarnation,
        fragments=fragments_of(config),
        chaos=Chaos(env.chaos, "server", env.server, env.incarnation),
    )

    def make(segments: Sequence[Segment]) -> Any:
        return make_optimizer(segments, _updated_by(config), config.run.kernels)

    push, pull = (
        coding_of(config.server.coding(way), config.server.density) for way in ("push", "pull")
    )
    if config.server.mode == "ssp" and config.optimizer.kind == "adamw" and env.server == 0:
        log.warning(
            "AdamW learns less well with gradients of older parameters (server.mode = ssp, up to "
            "%d rounds old); lion bears it better, server.staleness=0 has none",
            config.server.staleness,
        )
    server = Server(setup, make, RunPolicy(config), push, pull, row_tables(config))
    stop.call = server.stop
    server.serve(_listener(env))


def row_tables(config: Config) -> RowTables:
    """Return room for the tables of a run.

    Raises:
        LaunchError: there is no such folder for them.
    """
    rows, kernels = config.server.rows, config.run.kernels
    folder = Path(rows.folder) if rows.folder is not None else None
    if folder is not None and not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise LaunchError(
            f"server.rows.folder = {folder} is no folder that this server can write to",
            why="it maps tables from files there",
            mend="make it on each server's own disk, or leave it empty for tables in memory",
        )
    return RowTables(make_row_optimizer(rows, config.optimizer.lr, kernels), folder, kernels)


def _updated_by(config: Config) -> OptimizerConfig:
    """Return the optimizer of the servers."""
    server = config.server
    if server.mode != "local":
        return config.optimizer
    momentum = server.outer_momentum
    return SgdOptimizer(
        kind="sgd", lr=server.outer_lr, momentum=momentum, nesterov=momentum > 0, weight_decay=0.0
    )


def _listener(env: Environment) -> socket.socket:
    """Return the socket that workers call: the launcher's, or one of our own."""
    if env.listen_fd is not None:
        return socket.socket(fileno=env.listen_fd)
    assert env.server is not None
    host, port = env.addresses[env.server]
    try:
        return socket.create_server(("", port))
    except OSError as error:
        raise LaunchError(
            f"server {env.server} cannot listen at {host}:{port}",
            why=error.strerror or str(error),
            mend="give it another port in BIGTRAIN_SERVERS",
        ) from error
