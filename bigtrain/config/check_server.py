"""What parameter servers do not go with. Pure, as `check`, which runs it."""

from __future__ import annotations

from collections.abc import Iterator

from bigtrain.config.schema import Config
from bigtrain.config.serving import ServerSection
from bigtrain.errors import Problem

_WHOLE = ("lamb", "muon")
_ROUNDS = ("local", "sync", "ssp")
_DEPENDS = {  # keys that some modes alone look at
    "local_steps": ("local",),
    "fragments": ("local",),
    "outer_lr": ("local",),
    "outer_momentum": ("local",),
    "staleness": ("ssp",),
    "rows": ("sync", "ssp", "async"),
    "quorum": _ROUNDS,
    "grace_seconds": _ROUNDS,
}
_FEW_BITS = ("onebit", "topk")


def server_rule(config: Config, world_size: int | None) -> Iterator[Problem]:
    """Yield what is wrong with the server section, or beside it."""
    server = config.server
    if not server.servers:
        yield from _idle(server, list(ServerSection.model_fields), "server.servers = 0")
        return
    other = [key for key, modes in _DEPENDS.items() if server.mode not in modes]
    yield from _idle(server, other, f"server.mode = {server.mode}")
    yield from _counts(server)
    yield from _codings(server)
    yield from _local(config)
    yield from _async(config)
    yield from _neighbours(config)


def _idle(server: ServerSection, keys: list[str], what: str) -> Iterator[Problem]:
    plain = ServerSection()
    for key in keys:
        if getattr(server, key) != getattr(plain, key):
            yield Problem(
                f"server.{key} has no meaning for {what}",
                why="there is no server"
                if server.servers == 0
                else "that mode does not look at it",
                mend=f"remove server.{key}, or set "
                + ("server.servers" if server.servers == 0 else "another server.mode"),
                keys=(f"server.{key}", "server.servers", "server.mode"),
            )


def _counts(server: ServerSection) -> Iterator[Problem]:
    if server.replicas > server.servers:
        yield Problem(
            f"server.replicas = {server.replicas} with server.servers = {server.servers}",
            why="each copy of a block is on a server of its own",
            mend=f"set server.replicas to {server.servers} at most, or more server.servers",
            keys=("server.replicas", "server.servers"),
        )
    if server.quorum is not None and server.quorum > server.workers:
        yield Problem(
            f"server.quorum = {server.quorum} with server.workers = {server.workers}",
            why="a quorum is a part of the workers",
            mend=f"set server.quorum to {server.workers} at most, or leave it empty",
            keys=("server.quorum", "server.workers"),
        )


def _codings(server: ServerSection) -> Iterator[Problem]:
    ways = [way for way in ("push", "pull") if getattr(server, way) in _FEW_BITS]
    for way in ways:
        keys = (f"server.{way}", "server.mode", "server.outer_momentum")
        if server.mode != "local":
            yield Problem(
                f"server.{way} = {getattr(server, way)} with server.mode = {server.mode}",
                why="a gradient of one step loses too much in so few bits; what many steps have "
                "added up to does not",
                mend=f"set server.{way} to int4, int8, bf16 or fp32, or server.mode=local",
                keys=keys,
            )
        elif server.outer_momentum:
            yield Problem(
                f"server.{way} = {getattr(server, way)} with server.outer_momentum = "
                f"{server.outer_momentum:g}",
                why="momentum adds up what so few bits get wrong",
                mend="set server.outer_momentum=0 and server.outer_lr=1 (topk: try 1.8), or "
                f"server.{way}=int4",
                keys=keys,
            )
    if "topk" not in ways and server.density != ServerSection().density:
        yield Problem(
            "server.density has no meaning without topk",
            why="it is the share of the elements that topk sends",
            mend="remove server.density, or set server.push=topk",
            keys=("server.density", "server.push", "server.pull"),
        )


def _local(config: Config) -> Iterator[Problem]:
    each = config.server.local_steps
    if config.server.mode != "local":
        return
    if each % config.server.fragments:
        yield Problem(
            f"server.local_steps = {each} is no multiple of server.fragments = "
            f"{config.server.fragments}",
            why="fragments take turns, each after as many steps",
            mend="set server.local_steps to a multiple of it",
            keys=("server.local_steps", "server.fragments"),
        )
    for key, steps in (
        ("train.steps", config.train.steps),
        ("checkpoint.every", config.checkpoint.every),
        ("eval.every", config.eval.every),
    ):
        if steps % each:
            below, above = steps // each * each, (steps // each + 1) * each
            legal = f"{below} or {above}" if below else f"{above}"
            yield Problem(
                f"{key} = {steps} is no multiple of server.local_steps = {each}",
                why="between two rounds each worker has parameters of its own",
                mend=f"set {key} to {legal}, or server.local_steps to a divisor of {steps}",
                keys=(key, "server.local_steps"),
            )


def _async(config: Config) -> Iterator[Problem]:
    if config.server.mode == "async" and config.optimizer.kind == "adamw":
        yield Problem(
            "optimizer.kind = adamw with server.mode = async",
            why="AdamW's steps do not shrink with the gradient, so that gradients of old "
            "parameters spoil the new ones",
            mend="set optimizer.kind to lion or sgd, or server.mode to local, sync or ssp",
            keys=("optimizer.kind", "server.mode"),
        )


def _neighbours(config: Config) -> Iterator[Problem]:
    """Yield what other sections ask for that servers do not do."""
    kind = config.optimizer.kind
    if kind in _WHOLE:
        yield Problem(
            f"optimizer.kind = {kind} with server.servers = {config.server.servers}",
            why="it needs norms of whole parameters, and servers hold parts of them",
            mend="set optimizer.kind to adamw, sgd, lion or adagrad",
            keys=("optimizer.kind", "server.servers"),
        )
    if config.compression.kind != "none":
        yield Problem(
            f"compression.kind = {config.compression.kind} with server.servers = "
            f"{config.server.servers}",
            why="compression is between ranks that own parameters, and here servers own them",
            mend="remove compression, or the servers",
            keys=("compression.kind", "server.servers"),
        )
    if config.train.precision == "fp16":
        yield Problem(
            f"train.precision = fp16 with server.servers = {config.server.servers}",
            why="a loss scale is of one set of ranks, and workers come and go",
            mend="set train.precision to bf16 or fp32",
            keys=("train.precision", "server.servers"),
        )
    if config.zero.stage == 3:
        yield Problem(
            f"zero.stage = 3 with server.servers = {config.server.servers}",
            why="a worker's parameters come from servers, and it has them whole in each rank",
            mend="set zero.stage to 0, 1 or 2; optimizer state is on the servers anyway",
            keys=("zero.stage", "server.servers"),
        )
    if config.zero.offload == "file":
        yield Problem(
            f"zero.offload = file with server.servers = {config.server.servers}",
            why="workers have no optimizer state that files could hold",
            mend="remove zero.offload",
            keys=("zero.offload", "server.servers"),
        )
    if config.engine.kind != "native":
        yield Problem(
            f"engine.kind = {config.engine.kind} with server.servers = {config.server.servers}",
            why="DeepSpeed updates parameters itself",
            mend="set engine to native, or remove the servers",
            keys=("engine.kind", "server.servers"),
        )
    yield from _places(config)


def _places(config: Config) -> Iterator[Problem]:
    """Yield what cannot be where it is to be started."""
    server, launch = config.server, config.launch
    if launch.mpi is not None:
        yield Problem(
            f"launch.mpi with server.servers = {server.servers}",
            why="all that mpiexec starts is one world, which ends with any of its ranks",
            mend="remove launch.mpi: bigtrain starts workers by itself, by ssh or srun",
            keys=("launch.mpi", "server.servers"),
        )
    least, most = launch.node_range or (1, 1)
    if least < most:
        yield Problem(
            f"launch.nodes = {launch.nodes} with server.servers = {server.servers}",
            why="workers are shared out to the nodes; when one is lost, the others go on anyway",
            mend=f"set launch.nodes to {most}, or auto",
            keys=("launch.nodes", "server.servers"),
        )
    if server.hosts and server.slurm is not None:
        yield Problem(
            "server.hosts and server.slurm exclude each other",
            why="Slurm chooses the nodes of its jobs",
            mend="remove one of them",
            keys=("server.hosts", "server.slurm"),
        )
    apart = len(server.hosts or ()) or (server.slurm.nodes if server.slurm else 0)
    key = "server.hosts" if server.hosts else "server.slurm.nodes"
    if apart > server.servers:
        yield Problem(
            f"{key}: {apart} machines for server.servers = {server.servers}",
            why="a server is on one machine",
            mend=f"take {server.servers} at most, or more server.servers",
            keys=(key, "server.servers"),
        )
    twice = sorted({name for name in server.hosts or () if (server.hosts or []).count(name) > 1})
    if twice:
        yield Problem(
            f"server.hosts has {', '.join(twice)} twice",
            why="servers are shared out to machines evenly",
            mend="name each machine once",
            keys=("server.hosts",),
        )
    if server.slurm is not None and launch.slurm is not None and launch.slurm.sweep:
        yield Problem(
            "launch.slurm.sweep with server.slurm",
            why="a job with nodes apart for servers is heterogeneous, and has no arrays in Slurm",
            mend="remove server.slurm (servers are then on the nodes of workers), or the sweep",
            keys=("launch.slurm.sweep", "server.slurm"),
        )
