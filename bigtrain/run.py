"""One rank's run, from the config to the last line on the screen."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console

from bigtrain.binding import bind, is_bound
from bigtrain.checkpoint.manifest import checkpoint_name
from bigtrain.comm.collectives import together
from bigtrain.comm.init import choose_device, join, leave, set_timeout
from bigtrain.comm.mesh import Mesh
from bigtrain.comm.started import restart_warning, starter_of
from bigtrain.comm.world import World, read_world
from bigtrain.config.check import describe_schedule, layout_of, replicas_of
from bigtrain.config.load import load_config
from bigtrain.config.schema import Config
from bigtrain.errors import Stopped
from bigtrain.joined import check_joined
from bigtrain.lifetime import StopRequest
from bigtrain.machine import threads_per_rank
from bigtrain.models import GPT, Llama
from bigtrain.models.build import evaluating
from bigtrain.models.generate import generate
from bigtrain.observe.curve import draw_curve
from bigtrain.observe.jsonl import JsonLines, forget_after
from bigtrain.observe.metrics import Metrics
from bigtrain.observe.progress import make_display, setup_logging
from bigtrain.observe.records import EvalRecord, SaveRecord, StepRecord
from bigtrain.ops.library import library_of
from bigtrain.run_folder import RunFolder, begin, explained_io, open_run
from bigtrain.server.environment import Environment
from bigtrain.trainer import Trainer

log = logging.getLogger(__name__)

# Packing data, building models, hashing checkpoints take long; steps have their own timeout.
START_TIMEOUT_SECONDS = 3600.0


def run(
    config_path: str, overrides: Sequence[str], resume: bool, restart: bool, stop: StopRequest
) -> None:
    """Train as the config says, on this rank; rank 0 also shows, records and draws."""
    world = read_world()
    launched = "BIGTRAIN_LAUNCHER_PID" in os.environ
    console = setup_logging(world.rank, quiet=world.rank > 0 and not launched)
    config = load_config(config_path, overrides, world.world_size)
    if not launched:
        os.environ.update(config.launch.env)
        _say_who_started(config, world)
    device = choose_device(config.run.device, world)
    _configure_torch(config, world, device)
    if config.run.kernels != "off":
        _find_kernels(device, quiet=world.local_rank > 0)
    join(world, device, START_TIMEOUT_SECONDS)
    mesh = Mesh.build(layout_of(config, world.world_size), world, device)
    if not launched:
        check_joined(config, mesh, world)
    with _run_folder(config, resume, restart, mesh, launched) as folder:
        trainer = Trainer(config, mesh, folder.checkpoints, stop_requested=lambda: stop.signal)
        source = trainer.resume() if resume else None
        if not trainer.clock.has_begun:
            _announce(trainer, source, resume)
        if warning := restart_warning():
            log.warning(warning)
        together(lambda: _begin(trainer, folder), mesh.world, "start of the loop")
        set_timeout(config.parallel.timeout_seconds)
        stop.finishing = True  # from here on, a signal lets the step end and saves first
        try:
            validation_loss = _loop(trainer, folder, console)
            stop.finishing = False
            if trainer.speaks:
                sample = _sample(trainer) if config.eval.generate else None
                if mesh.rank == 0:
                    _farewell(trainer, folder, validation_loss, sample)
        except Stopped:
            trainer.clock.leave()
            raise
        trainer.clock.leave()
    leave()


def _say_who_started(config: Config, world: World) -> None:
    starter = starter_of()
    if starter is not None:
        log.info(
            "started by %s as one of %d ranks, which wait for each other", starter, world.world_size
        )
    if config.launch.container is not None and world.rank == 0:
        log.warning("launch.container is not used: %s has started this rank where it is", starter)


def _configure_torch(config: Config, world: World, device: torch.device) -> None:
    own = is_bound(os.environ)  # then the processors that we see are this rank's alone
    sharers = 1 if own else world.local_world_size
    if config.server.servers and not own:  # worlds of other workers, and servers, are here too
        all_here = sharers * config.server.workers + config.server.servers
        sharers = Environment.read().sharers or all_here
    torch.set_num_threads(threads_per_rank(config.launch.threads_per_rank, sharers))
    if config.launch.bind == "auto" and not own:
        bind(world.local_rank, world.local_world_size)
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _find_kernels(device: torch.device, *, quiet: bool) -> None:
    """Load the library now: building takes a while. One rank of a node says if there is none."""
    logging.getLogger("bigtrain.ops.library").setLevel(logging.ERROR if quiet else logging.INFO)
    library_of(device)


@contextmanager
def _run_folder(
    config: Config, resume: bool, restart: bool, mesh: Mesh, launched: bool
) -> Iterator[RunFolder]:
    """Hold the run folder: rank 0 opens and locks it, unless `bigtrain launch` has done so."""
    lock = None

    def open_it() -> None:
        nonlocal lock
        if mesh.rank == 0 and not launched:
            _, lock = open_run(config, resume=resume, restart=restart)

    together(open_it, mesh.world, "opening the run folder")
    try:
        yield RunFolder(Path(config.run.dir))
    finally:
        if lock is not None:
            lock.close()


def _begin(trainer: Trainer, folder: RunFolder) -> None:
    """On rank 0: nothing can refuse this run any more, so what it replaces is replaced."""
    if trainer.mesh.rank == 0 and not trainer.clock.has_begun:
        begin(folder, keep=bool(trainer.config.server.servers))
        with explained_io(folder.path):
            forget_after(folder.metrics, trainer.step)
            for path in folder.samples.glob("*.jsonl"):
                forget_after(path, trainer.step)


def _announce(trainer: Trainer, source: Path | None, resume: bool) -> None:
    train, source_unit = trainer.config.train, trainer.source.unit
    log.info(
        "%s  |  %s parameters, %s  |  %d x %s per step = %d replica(s) x %d microbatch(es) of %d",
        trainer.mesh,
        f"{trainer.pipeline.num_parameters:,}",
        train.precision,
        train.global_batch,
        f"{trainer.source.items_per_sample} {source_unit}",
        replicas_of(trainer.config, trainer.mesh.layout),
        trainer.num_microbatches,
        trainer.microbatch,
    )
    if trainer.mesh.pp.degree > 1:
        log.info("pipeline  |  %s", describe_schedule(trainer.config, trainer.mesh.layout))
    if trainer.config.compression.kind != "none":
        _announce_compression(trainer)
    if trainer.memory is not None:
        log.info("memory    |  %s on this rank, and activations", trainer.memory)
    if source is not None:
        log.info("resumed from %s, after step %d", source, trainer.step)
    elif resume:
        log.warning("no checkpoint in %s yet: starting from the beginning", trainer.checkpoints)
    if trainer.step >= train.steps:
        log.warning("step %d of %d is done already: raise train.steps", trainer.step, train.steps)


def _announce_compression(trainer: Trainer) -> None:
    share = trainer.share_compressed()
    if share == 0:
        log.warning(
            "compression.kind = %s compresses nothing: there is one data-parallel rank, or no "
            "parameter of compression.least_numel elements",
            trainer.config.compression.kind,
        )
    else:
        log.info("compression | %.1f %% of the parameters on this rank", 100 * share)


def _loop(trainer: Trainer, folder: RunFolder, console: Console | None) -> float | None:
    """Drive the trainer to its end; show, record, evaluate. Returns the last validation loss.

    Raises:
        Stopped: all ranks agreed to stop; the checkpoint is saved.
    """
    config, rank = trainer.config, trainer.mesh.rank
    with explained_io(folder.path):
        metrics = Metrics(folder.metrics, folder.tensorboard, trainer.step) if rank == 0 else None
        path = folder.samples / _samples_name(config, rank)
        mesh = trainer.mesh
    reads = config.log.sample_ids and mesh.pp.rank == mesh.cp.rank == mesh.tp.rank == 0
    samples = JsonLines(path) if reads else None  # ranks of one replica read the same

    def record_it(record: StepRecord | EvalRecord | SaveRecord) -> None:
        with explained_io(folder.path):
            if metrics is not None:
                metrics.add(record)

    def record_samples() -> None:
        if samples is not None:
            with explained_io(folder.path):
                for step, ids in trainer.clock.counted():
                    samples.add({"step": step, "ids": ids})

    display = make_display(
        console, trainer.step, config.train.steps, config.log.every, trainer.source.unit
    )
    recorded: SaveRecord | None = None
    validation_loss = None

    def record_save() -> None:
        nonlocal recorded
        if trainer.last_save is not None and trainer.last_save != recorded:
            recorded = trainer.last_save
            record_it(recorded)

    try:
        for record in trainer.steps():
            record_save()
            record_samples()
            if trainer.speaks:
                display.step(record)
                record_it(record)
            if _evaluation_is_due(config, record.step) and not trainer.stop_signal:
                validation_loss = trainer.evaluate()
                if validation_loss is not None and trainer.speaks:
                    evaluation = EvalRecord(record.step, validation_loss)
                    display.evaluation(evaluation)
                    record_it(evaluation)
        record_save()
    finally:
        display.close()
        for file in (metrics, samples):
            if file is not None:
                with contextlib.suppress(OSError):  # a full disk was told of when writing
                    file.close()
    if trainer.stop_signal and trainer.step < config.train.steps:
        raise Stopped(
            trainer.stop_signal,
            f"stopped after step {trainer.step} of {config.train.steps}; "
            f"the checkpoint is in {trainer.checkpoints}",
            mend=f"go on with: bigtrain launch {folder.config} --resume",
        )
    return validation_loss


def _samples_name(config: Config, rank: int) -> str:
    """Return the name of the file of what this rank reads; workers have ranks of their own."""
    worker = Environment.read().worker if config.server.servers else None
    return f"rank-{rank}.jsonl" if worker is None else f"worker-{worker}-rank-{rank}.jsonl"


def _evaluation_is_due(config: Config, step: int) -> bool:
    every = config.eval.every
    return step == config.train.steps or (every > 0 and step % every == 0)


def _farewell(
    trainer: Trainer, folder: RunFolder, validation_loss: float | None, sample: str | None
) -> None:
    """Say how good the model is, show what it says, and tell where everything is."""
    config = trainer.config
    references: dict[str, float] = {}
    entropies = trainer.source.entropies()
    if entropies is not None:
        references = {"unigram entropy": entropies[0], "bigram entropy": entropies[1]}
    if validation_loss is not None:
        beside = ", ".join(f"{name} {value:.4f}" for name, value in references.items())
        log.info(
            "validation loss %.4f%s",
            validation_loss,
            f" nats per token (the held-out text's own {beside})" if beside else "",
        )
    if sample is not None:
        log.info("a sample of the model:\n%s", _indent(sample))
    with explained_io(folder.path):
        draw_curve(folder.metrics, folder.curve, references)
    last = trainer.checkpoints / checkpoint_name(trainer.step)
    log.info("checkpoint   %s", last)
    log.info("metrics      %s, %s", folder.metrics, folder.tensorboard)
    log.info("loss curve   %s", folder.curve)
    more = f"train.steps={2 * config.train.steps}"
    log.info("to continue  bigtrain launch %s --resume %s", folder.config, more)


def _sample(trainer: Trainer) -> str:
    """Return the first lines of a Python file, as the model continues them.

    All ranks do this, since a model that is split speaks with all of them.
    """
    prompt = torch.tensor(list(b"import os\n\n\ndef "), device=trainer.mesh.device)
    assert isinstance(trainer.model, GPT | Llama)  # config/check.py sees to it
    with evaluating(trainer.model):
        tokens = generate(
            trainer.pipeline.forward,
            prompt,
            trainer.config.eval.generate,
            max_seq_len=trainer.model.max_seq_len,
            seed=trainer.config.run.seed,
            multiple_of=trainer.mesh.tp.degree if trainer.config.parallel.sequence_parallel else 1,
        )
    text = bytes(token % 256 for token in tokens.tolist()).decode("utf-8", errors="replace")
    # What a model says may hold control codes, which a terminal would obey.
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def _indent(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
