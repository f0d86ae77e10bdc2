"""Rules that look at several keys at once. Pure: no process, no file, no torch.

Each rule yields a Problem for what cannot work. All of them run, so that one report has
everything; the loader adds file and line from the keys that a problem names.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

from bigtrain.config.check_compression import compression_problems
from bigtrain.config.check_deepspeed import deepspeed_rule
from bigtrain.config.check_server import server_rule
from bigtrain.config.check_update import UPDATE_RULES
from bigtrain.config.layout import Layout, legal_head_degrees
from bigtrain.config.schema import (
    Config,
    FactoryModel,
    GptModel,
    LlamaModel,
    PipelineSection,
    ZeroSection,
)
from bigtrain.errors import BigtrainError, Problem
from bigtrain.pipeline.schedule import Table, make_table
from bigtrain.pipeline.simulate import Costs, simulate
from bigtrain.pipeline.table_file import read_csv
from bigtrain.pipeline.validate import validate

Rule = Callable[[Config, int | None], Iterator[Problem]]


def check(config: Config, world_size: int | None = None) -> list[Problem]:
    """Return everything that cannot work in `config`, in a world of `world_size` if known."""
    return [problem for rule in RULES for problem in rule(config, world_size)]


def fixed_world_size(config: Config) -> int | None:
    """Return how many ranks the config itself asks for, or None where it leaves that open."""
    parallel = config.parallel
    launch = config.launch
    if launch.processes != "auto":
        least, most = launch.node_range or (1, 1)
        nodes = len(launch.hosts or ()) or (least if least == most else None)
        if nodes and config.server.servers:  # then a world is that of one worker
            nodes = config.server.nodes_per_worker(nodes)
        return int(launch.processes) * nodes if nodes else None
    if parallel.dp != "auto":
        return math.prod((parallel.pp, int(parallel.dp), parallel.cp, parallel.tp))
    return None


def layout_of(config: Config, world_size: int) -> Layout:
    """Return the layout of the config in a world of `world_size` ranks."""
    return Layout.infer(config.parallel.model_dump(include={"pp", "dp", "cp", "tp"}), world_size)


def replicas_of(config: Config, layout: Layout) -> int:
    """Return how many replicas of the model share a batch: the data-parallel ranks of all
    workers."""
    return layout.dp * (config.server.workers if config.server.servers else 1)


def microbatches_of(config: Config, layout: Layout) -> tuple[int, int]:
    """Return (samples per microbatch, microbatches per step and rank)."""
    per_rank = config.train.global_batch // replicas_of(config, layout)
    microbatch = config.train.microbatch or per_rank
    return microbatch, per_rank // microbatch


def schedule_of(config: Config) -> str | Table:
    """Return the name of the pipeline's schedule, or the table that a file has.

    Raises:
        BigtrainError: the file cannot be read, or is no valid table.
    """
    name = config.pipeline.schedule
    return read_csv(name) if name.endswith(".csv") else name


def table_of(config: Config, layout: Layout) -> Table:
    """Return the pipeline's table for this layout.

    Raises:
        BigtrainError: there is none for these numbers.
    """
    schedule, pp = schedule_of(config), layout.pp
    num_microbatches = microbatches_of(config, layout)[1]
    if isinstance(schedule, str):
        return make_table(schedule, pp, num_microbatches, config.pipeline.virtual_stages)
    wrong = (schedule.num_ranks, schedule.num_microbatches) != (pp, num_microbatches)
    if wrong:
        raise BigtrainError(
            f"{schedule.name} is a table for {schedule.num_ranks} ranks and "
            f"{schedule.num_microbatches} microbatches, not for {pp} and {num_microbatches}",
            why="a table from a file has its ranks and microbatches written out",
            mend="change parallel.pp and train.microbatch, or the table",
        )
    return schedule


def describe_schedule(config: Config, layout: Layout) -> str:
    """Return in a line what the pipeline's schedule amounts to, if all stages cost the same."""
    table = table_of(config, layout)
    timeline = simulate(table, Costs())
    peak = max(validate(table).peak_in_flight)
    number, bubble = table.num_microbatches, float(timeline.bubble)
    text = (
        f"{table.name}: {table.num_stages} stages on {table.num_ranks} ranks, {number} "
        f"microbatch{'es' * (number > 1)}, bubble {bubble:.0%} if stages are equal, "
        f"at most {peak} in flight"
    )
    return text + "; a smaller train.microbatch would make the bubble smaller" * (bubble > 0.3)


def _divisors_near(number: int, wanted: int, most: int = 8) -> str:
    """Return the divisors of `number` that are nearest to `wanted`, in order, as text."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    divisors = {*small, *(number // n for n in small)}
    return ", ".join(map(str, sorted(sorted(divisors, key=lambda n: abs(n - wanted))[:most])))


def _axes_that_exist(config: Config, world_size: int | None) -> Iterator[Problem]:
    if config.parallel.cp > 1:
        yield Problem(
            f"parallel.cp = {config.parallel.cp}: this version has no context parallelism",
            why="the data-, tensor- and pipeline-parallel axes can be split so far",
            mend="remove parallel.cp, and spread the run with parallel.dp, tp or pp",
            keys=("parallel.cp",),
        )


def _world(config: Config, world_size: int | None) -> Iterator[Problem]:
    keys = ("parallel.dp", "launch.processes", "parallel.tp", "parallel.cp", "parallel.pp")
    world = world_size or fixed_world_size(config)
    if world is None:
        return
    try:
        layout_of(config, world)
    except BigtrainError as error:
        problem = dataclasses.replace(error.problem, keys=keys)
        if world == config.launch.processes:
            problem = dataclasses.replace(
                problem,
                what=f"launch.processes = {world} does not fit: {problem.what}",
                mend="set launch.processes=auto, or change a degree",
                keys=("launch.processes", *keys),
            )
        yield problem


def _batch(config: Config, world_size: int | None) -> Iterator[Problem]:
    world = world_size or fixed_world_size(config)
    if world is None:
        return
    try:
        layout = layout_of(config, world)
    except BigtrainError:
        return  # reported by _world
    dp = replicas_of(config, layout)
    sharers = f"dp = {dp} ranks"
    keys: tuple[str, ...] = ("train.global_batch", "train.microbatch", "parallel.dp")
    if config.server.servers:
        keys = (*keys, "server.workers")
        sharers = f"{config.server.workers} workers of dp = {layout.dp}"
    batch, microbatch = config.train.global_batch, config.train.microbatch
    if batch % dp:
        below, above = batch - batch % dp, batch - batch % dp + dp
        legal = " or ".join(str(value) for value in (below, above) if value)
        yield Problem(
            f"train.global_batch = {batch} cannot be shared by {sharers}: "
            f"{batch} / {dp} = {batch / dp:.2f}",
            why="every rank takes the same number of samples of a step",
            mend=f"set train.global_batch to {legal}",
            keys=keys,
        )
    elif microbatch and (batch // dp) % microbatch:
        per_rank = batch // dp
        legal = _divisors_near(per_rank, microbatch)
        yield Problem(
            f"train.microbatch = {microbatch} does not divide a rank's share: "
            f"{batch} / {dp if config.server.servers else f'(dp={dp})'} = {per_rank} samples",
            why="a step is a whole number of microbatches on every rank",
            mend=f"set train.microbatch to one of {legal}",
            keys=("train.microbatch", *keys),
        )


def _heads(config: Config, world_size: int | None) -> Iterator[Problem]:
    model = config.model
    if isinstance(model, FactoryModel):
        return
    hidden, heads = model.hidden_size, model.num_heads
    if hidden % heads:
        legal = _divisors_near(hidden, heads)
        yield Problem(
            f"model.num_heads = {heads} does not divide model.hidden_size = {hidden}",
            why="each head takes an equal part of the hidden size",
            mend=f"set model.num_heads to one of {legal}",
            keys=("model.num_heads", "model.hidden_size"),
        )
    elif isinstance(model, LlamaModel) and (hidden // heads) % 2:
        yield Problem(
            f"model.hidden_size / model.num_heads = {hidden // heads} is odd",
            why="rotary positions turn pairs of channels inside a head",
            mend="choose num_heads so that a head has an even size",
            keys=("model.num_heads", "model.hidden_size"),
        )
    if isinstance(model, LlamaModel) and model.num_kv_heads and heads % model.num_kv_heads:
        legal = _divisors_near(heads, model.num_kv_heads)
        yield Problem(
            f"model.num_kv_heads = {model.num_kv_heads} does not divide model.num_heads = {heads}",
            why="each key-value head serves an equal group of query heads",
            mend=f"set model.num_kv_heads to one of {legal}",
            keys=("model.num_kv_heads", "model.num_heads"),
        )


def _tensor(config: Config, world_size: int | None) -> Iterator[Problem]:
    model, tp = config.model, config.parallel.tp
    legal = None
    if not isinstance(model, FactoryModel):
        heads = model.num_heads
        kv_heads = getattr(model, "num_kv_heads", None) or heads
        legal = legal_head_degrees(heads, kv_heads)
    if legal and tp not in legal:
        kinds = f"{heads} heads" + f" and {kv_heads} key-value heads" * (kv_heads < heads)
        yield Problem(
            f"parallel.tp = {tp} cannot share out {kinds}",
            why="every rank takes as many whole heads as the others"
            + "; of key-value heads too, or equally many ranks share each" * (kv_heads < heads),
            mend=f"set parallel.tp to one of {', '.join(map(str, legal))}",
            keys=("parallel.tp", "model.num_heads", "model.num_kv_heads"),
        )
    seq_len = getattr(config.data, "seq_len", None)
    if config.parallel.sequence_parallel and seq_len is not None and seq_len % tp:
        degrees = [n for n in legal or range(1, tp + 1) if seq_len % n == 0]
        yield Problem(
            f"data.seq_len = {seq_len} cannot be shared out to parallel.tp = {tp} ranks",
            why="with parallel.sequence_parallel each rank holds an equal part of every sequence",
            mend=f"set data.seq_len to {seq_len // tp * tp or tp}, "
            f"or parallel.tp to one of {', '.join(map(str, degrees))}",
            keys=("data.seq_len", "parallel.tp", "parallel.sequence_parallel"),
        )


def _pipeline(config: Config, world_size: int | None) -> Iterator[Problem]:
    world = world_size or fixed_world_size(config)
    pp, keys = config.parallel.pp, ("pipeline.schedule", "parallel.pp", "train.microbatch")
    if world is None or (pp == 1 and config.pipeline == PipelineSection()):
        return
    try:
        layout = layout_of(config, world)
    except BigtrainError:
        return  # reported by _world
    if config.train.global_batch % replicas_of(config, layout):
        return  # reported by _batch
    try:
        table = table_of(config, layout)
    except BigtrainError as error:
        it = error.problem
        # The loader will point at the key; where in a table it is must stay in the text.
        what = f"{it.where}: {it.what}" if it.where else it.what
        yield dataclasses.replace(it, what=what, where="", keys=keys)
        return
    model, split = config.model, config.pipeline.split
    if isinstance(model, FactoryModel):
        return
    halves = [
        f"blocks.{i}.{half}" for i in range(model.num_layers) for half in ("attention", "mlp")
    ]
    units = ["embedding", *halves, "head"]
    if len(units) < table.num_stages:
        yield Problem(
            f"model.num_layers = {model.num_layers}: {len(units)} units (embedding, attentions, "
            f"MLPs, head) cannot be cut into {table.num_stages} stages",
            why="every stage needs a unit at least",
            mend=f"use at most {len(units)} stages (parallel.pp times stages per rank), or set "
            f"model.num_layers to at least {-(-(table.num_stages - 2) // 2)}",
            keys=("parallel.pp", "model.num_layers", "pipeline.virtual_stages"),
        )
    if split:
        whole = {f"blocks.{i}": f"blocks.{i}.attention" for i in range(model.num_layers)}
        begins = [whole.get(name, name) for name in split]
        places = [units.index(name) if name in units else -1 for name in begins]
        if len(split) != table.num_stages - 1 or places != sorted({*places} - {-1, 0}):
            yield Problem(
                f"pipeline.split = [{', '.join(split)}] does not cut the model into "
                f"{table.num_stages} stages",
                why="it says where each stage but the first begins, in the model's order",
                mend=f"give {table.num_stages - 1} of blocks.0 to blocks.{model.num_layers - 1} "
                "(with .mlp: its second half) and head, or leave it empty",
                keys=("pipeline.split", "parallel.pp", "pipeline.virtual_stages"),
            )


def _sequence(config: Config, world_size: int | None) -> Iterator[Problem]:
    seq_len = getattr(config.data, "seq_len", None)
    if not isinstance(config.model, GptModel | LlamaModel) or seq_len is None:
        return
    if seq_len > config.model.max_seq_len:
        yield Problem(
            f"data.seq_len = {seq_len} is longer than "
            f"model.max_seq_len = {config.model.max_seq_len}",
            why="the model has no positions beyond max_seq_len",
            mend=f"set model.max_seq_len={seq_len}, or shorten data.seq_len",
            keys=("data.seq_len", "model.max_seq_len"),
        )
    if getattr(config.data, "kind", "") in ("stdlib", "text") and config.model.vocab_size < 256:
        yield Problem(
            f"model.vocab_size = {config.model.vocab_size} is too small for bytes",
            why=f"data.kind = {config.data.kind} gives bytes, which are 0 to 255",  # type: ignore[union-attr]
            mend="set model.vocab_size=256",
            keys=("model.vocab_size", "data.kind"),
        )


def _generate(config: Config, world_size: int | None) -> Iterator[Problem]:
    byte_level = getattr(config.data, "kind", "") in ("stdlib", "text")
    if config.eval.generate and not (
        byte_level and isinstance(config.model, GptModel | LlamaModel)
    ):
        yield Problem(
            f"eval.generate = {config.eval.generate} needs a gpt or llama model on bytes",
            why="other tokens cannot be shown as text without their tokenizer",
            mend="set eval.generate=0",
            keys=("eval.generate", "data.kind", "model.kind"),
        )


_ONLY_STAGE_3 = ("reshard_after_forward", "prefetch", "order", "persistent_numel")


def _zero(config: Config, world_size: int | None) -> Iterator[Problem]:
    zero, plain = config.zero, ZeroSection()
    changed = [key for key in ZeroSection.model_fields if getattr(zero, key) != getattr(plain, key)]
    idle = [key for key in changed if key != "stage"] if zero.stage == 0 else []
    if zero.stage in (1, 2):
        idle = [key for key in changed if key in _ONLY_STAGE_3]
    for key in idle:
        least = 3 if key in _ONLY_STAGE_3 else 1
        yield Problem(
            f"zero.{key} has no meaning for zero.stage = {zero.stage}",
            why="nothing is shared out" if least == 1 else "parameters are whole on every rank",
            mend=f"remove zero.{key}, or set zero.stage={least}",
            keys=(f"zero.{key}", "zero.stage"),
        )
    if zero.offload_dir is not None and zero.offload != "file" and zero.stage:
        yield Problem(
            f"zero.offload_dir has no meaning for zero.offload = {zero.offload}",
            why="it is where the files of zero.offload=file lie",
            mend="set zero.offload=file, or remove zero.offload_dir",
            keys=("zero.offload_dir", "zero.offload"),
        )
    world = world_size or fixed_world_size(config)
    if world is None or zero.shard_degree is None:
        return
    try:
        dp = layout_of(config, world).dp
    except BigtrainError:
        return  # reported by _world
    if dp % zero.shard_degree:
        yield Problem(
            f"zero.shard_degree = {zero.shard_degree} does not divide dp = {dp}",
            why="replicas share in groups of one size",
            mend=f"set zero.shard_degree to one of {_divisors_near(dp, zero.shard_degree)}",
            keys=("zero.shard_degree", "parallel.dp"),
        )


def _nodes(config: Config, world: int | None) -> Iterator[Problem]:
    degree = config.compression.node_degree
    if world is None or degree == 1:
        return
    try:
        dp = layout_of(config, world).dp
    except BigtrainError:
        return  # reported by _world
    if dp % degree:
        yield Problem(
            f"compression.node_degree = {degree} does not divide dp = {dp}",
            why="nodes have the same number of data-parallel ranks",
            mend=f"set compression.node_degree to one of {_divisors_near(dp, degree)}",
            keys=("compression.node_degree", "parallel.dp"),
        )


def _compression(config: Config, world_size: int | None) -> Iterator[Problem]:
    yield from compression_problems(config)
    if config.compression.kind != "none":
        yield from _nodes(config, world_size or fixed_world_size(config))


def _one_starter(config: Config, world_size: int | None) -> Iterator[Problem]:
    if config.launch.mpi is not None and config.launch.container is not None:
        yield Problem(
            "launch.mpi and launch.container exclude each other",
            why="mpiexec starts the ranks, and would start them outside of the image",
            mend="call mpiexec inside of the image, or have bigtrain start the ranks (mpi: null)",
            keys=("launch.container", "launch.mpi"),
        )


RULES: tuple[Rule, ...] = (
    _axes_that_exist,
    _one_starter,
    _world,
    _batch,
    _heads,
    _tensor,
    _pipeline,
    _sequence,
    _generate,
    *UPDATE_RULES,
    _zero,
    _compression,
    server_rule,
    deepspeed_rule,
)
