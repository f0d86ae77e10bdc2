"""Training: build everything a rank needs, take steps, evaluate, save, resume.

The Trainer prints nothing and writes nothing but checkpoints; `run.py` drives it.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bigtrain.checkpoint.load import find_last_good, load_blocks
from bigtrain.checkpoint.manifest import LossScaleEntry, Manifest, State
from bigtrain.checkpoint.save import prune, save
from bigtrain.comm.collectives import (
    Pending,
    all_gather_object,
    all_reduce,
    start_all_reduce,
    together,
)
from bigtrain.comm.gradient import GradientPath
from bigtrain.comm.mesh import Mesh
from bigtrain.compose import build_pipeline
from bigtrain.config.check import microbatches_of, schedule_of
from bigtrain.config.schema import Config, PipelineSection
from bigtrain.data.build import open_source
from bigtrain.data.microbatches import Microbatch, Microbatches
from bigtrain.data.permutation import derive_seed
from bigtrain.data.stream import TrainStream, rank_positions, seed_everything, validation_batches
from bigtrain.engines.deepspeed_engine import DeepSpeedEngine
from bigtrain.engines.deepspeed_setup import load_deepspeed
from bigtrain.engines.local import LocalState
from bigtrain.engines.native import ERRORS, OUTER, NativeState, OwnClock, predict_memory
from bigtrain.engines.seam import Clock, Gradients, Holder, Place, Runner, Updater
from bigtrain.engines.served import Served, check_tables, zero_of_worker
from bigtrain.engines.table_files import TableFiles, is_table_file
from bigtrain.errors import BigtrainError, CheckpointError, NonFiniteError, Overtaken
from bigtrain.lifetime import STOP_SIGNALS
from bigtrain.models.build import Batch, build_loss, build_model, evaluating
from bigtrain.observe.records import SaveRecord, StepRecord
from bigtrain.observe.replicas import find_divergence
from bigtrain.ops.dropout import Dropout, seed_dropout
from bigtrain.optim import build_optimizer, kinds_for, learning_rate
from bigtrain.optim.clip import grad_divisor
from bigtrain.optim.loss_scale import build_loss_scale
from bigtrain.pipeline.run import Pipeline
from bigtrain.server.environment import Environment
from bigtrain.server.worker import Pushing
from bigtrain.zero.memory import Memory

log = logging.getLogger(__name__)

STAGE_SEEDS = 2**40  # seeds of a stage are so far from those of the one before
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MOST_SKIPS = 10  # skipped updates in a row after which a run is given up


class Trainer:
    """One rank's part of a run.

    config is checked already; mesh is this rank's. `stop_requested()` gives the signal that asked
    this rank to stop, if any; every step all ranks agree on it.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        checkpoints: Path,
        *,
        stop_requested: Callable[[], int | None] = lambda: None,
    ) -> None:
        self.config, self.mesh, self.checkpoints = config, mesh, checkpoints
        self.stop_requested = stop_requested
        if config.engine.kind == "deepspeed":
            together(lambda: load_deepspeed(mesh.device), mesh.world, "importing DeepSpeed")
        self.num_skipped = 0
        self.stop_signal: int | None = None
        self.last_save: SaveRecord | None = None
        self.dtype = DTYPES[config.train.precision]
        self.loss_scale = build_loss_scale(config.train)
        self.microbatch, self.num_microbatches = microbatches_of(config, mesh.layout)
        seed_everything(config.run.seed)  # for what the factories draw, on every rank alike
        vocab_size = getattr(config.model, "vocab_size", None)
        self.source = open_source(config.data, vocab_size, mesh)
        seed_everything(config.run.seed)
        kernels = config.run.kernels
        self.model = together(
            lambda: build_model(config.model, kernels), mesh.world, "building the model"
        )
        check_tables(self.model, mesh, config.server)
        self.loss_of = together(lambda: build_loss(config.model), mesh.world, "finding the loss")
        self.pipeline: Runner
        self.path: Gradients
        self.optimizer: Updater
        self.state: Holder
        self.memory: Memory | None = None  # what is known ahead of this rank's
        self.clock: Clock = OwnClock(mesh.dp)
        self.tables: TableFiles | None = None  # of a model whose tables are on servers
        if config.engine.kind == "deepspeed":
            engine = self._deepspeed()
            self.pipeline = self.path = self.optimizer = self.state = engine
        elif config.server.servers and config.server.mode != "local":
            self.pipeline = pipeline = self._native()
            served = Served(self.model, pipeline.path, mesh, config, Environment.read())
            self.path = self.optimizer = self.state = served
            self.clock, self.tables = served.clock, served.table_files
        else:
            pipeline = self._native()
            path = pipeline.path
            kind = config.compression.kind
            optimizer = build_optimizer(path, config.optimizer, config.run.kernels, kind)
            self.pipeline, self.path, self.optimizer = pipeline, path, optimizer
            self.state = NativeState(self.model, path, optimizer, mesh.dp)
            if config.server.servers:
                env = Environment.read()
                local = LocalState(self.model, path, optimizer, mesh, config, env)
                self.state, self.clock = local, local.clock
            self.memory = predict_memory(pipeline, optimizer, config.zero, self.num_microbatches)
        self._draws_per_sample = any(isinstance(m, Dropout) for m in self.model.modules())
        self._stream: TrainStream | None = None
        self._stream_at: Place | None = None  # what it will yield next

    def _deepspeed(self) -> DeepSpeedEngine:
        return DeepSpeedEngine(
            self.model,
            self.mesh,
            self.config,
            dtype=self.dtype,
            microbatch=self.microbatch,
            num_microbatches=self.num_microbatches,
        )

    def _native(self) -> Pipeline:
        config, mesh, server = self.config, self.mesh, self.config.server
        return build_pipeline(
            self.model,
            mesh,
            schedule=together(lambda: schedule_of(config), mesh.world, "reading the schedule"),
            virtual_stages=config.pipeline.virtual_stages,
            split=config.pipeline.split,
            cost=config.pipeline.cost,
            example=self._example(),
            loss_of=self.loss_of,
            tensor_plan=config.parallel.tensor_plan,
            sequence_parallel=config.parallel.sequence_parallel,
            tp_chunks=config.parallel.tp_chunks,
            dtype=self.dtype,
            bucket_mb=config.parallel.bucket_mb,
            zero=zero_of_worker(config.zero, mesh, server.mode) if server.servers else config.zero,
            compression=config.compression,
            kind_of=kinds_for(config.optimizer, self.model),
            **({"around": Pushing} if server.servers and server.mode != "local" else {}),
        )

    def _example(self) -> Batch | None:
        """Return a batch of one microbatch, if the model may be cut: to see what its parts cost."""
        if self.mesh.pp.degree == 1 and self.config.pipeline == PipelineSection():
            return None
        some = validation_batches(
            self.source.train, self.microbatch, seed=0, microbatch=self.microbatch, rank=0, degree=1
        )
        return next(some)[1]

    @property
    def step(self) -> int:
        """Updates that are done."""
        return self.clock.step

    @property
    def cursor(self) -> int:
        """Samples of the stream that are read."""
        return self.clock.cursor

    @property
    def speaks(self) -> bool:
        """Is it for this world to show, record and save what came of the last step?"""
        return self.clock.speaks

    # -- the loop ------------------------------------------------------------------------------

    def steps(self) -> Iterator[StepRecord]:
        """Take steps until the run is complete or all ranks agreed to stop; yield each.

        Saves when a checkpoint is due, and at the end, after the caller has handled the record.
        """
        self.clock.begin(self.source.items_per_sample)
        began = saved = self.step
        while self.step < self.config.train.steps and not self.stop_signal:
            yield self.train_step()
            every = self.config.parallel.check_replicas_every
            if every and self.step % every == 0:
                self.check_replicas()
            if self.config.checkpoint.every and self.step % self.config.checkpoint.every == 0:
                self._save_if_ours()
                saved = self.step
        if saved != self.step:
            self._save_if_ours()
        self._see_it_saved(began)
        self.path.settle()

    def _see_it_saved(self, began: int) -> None:
        """Save the end, if the world that was to save it is gone."""
        if self.stop_signal and self.config.server.mode == "async":
            return  # each has a last step of its own
        done = self.last_save is not None and self.last_save.step == self.step
        done = done or (began == self.step and not self.clock.has_begun)  # nothing was to be done
        while self.clock.must_save(done):
            self.save()
            done = True

    def _save_if_ours(self) -> None:
        if self.speaks:
            self.save()

    def train_step(self) -> StepRecord:
        """Do one optimizer update over one global batch.

        Communicates: gradient buckets during the last backward, and beside them four numbers
        (sum of losses, number of items, votes to stop).

        Raises:
            NonFiniteError: a NaN or infinity, if the config says stop, or too many in a row.
            CommError: another rank went away.
        """
        begin = time.perf_counter()
        nominal = self.config.train.global_batch * self.source.items_per_sample
        scale = self.loss_scale.scale
        self.path.rescale(scale)
        totals = torch.zeros(4, dtype=torch.float64, device=self.mesh.device)
        micros = Microbatches(self._next_microbatch, self.num_microbatches)
        losses: dict[int, torch.Tensor] = {}
        summing: list[Pending] = []

        def loss_of(model: Any, number: int, batch: Batch) -> torch.Tensor:
            loss = self.loss_of(model, batch)
            count = loss.count if loss.count is not None else nominal / self._num_shares
            losses[number] = loss.mean.detach()
            totals[0] += loss.mean.detach().double() * count
            totals[1] += count
            # In fp32, since a loss that a user's model returns in fp16 would overflow.
            mean = loss.mean.float() * scale if self.dtype is torch.float16 else loss.mean
            return mean * (count * self.mesh.dp.degree / nominal)

        def forwards_done() -> None:
            self._vote(totals[2:])
            what = "all_reduce of the loss"
            summing.append(start_all_reduce(totals, self.mesh.world, what))

        self.pipeline.run(
            micros,
            loss_of,
            prepare=lambda stage, number, forward: self._seed(
                stage, micros.places[number], forward
            ),
            forwards_done=forwards_done,
        )
        self.path.finish()
        summing[0].wait()
        samples = [int(i) for number in sorted(micros.ids) for i in micros.ids[number]]
        self.clock.read(samples)
        loss_sum, items, *votes = self.clock.agree(totals / self._num_holders).tolist()

        # Losses were weighted as if there were `nominal` items, and scaled; `correction` makes
        # that right.
        correction = scale * (items / nominal if items > 0 else 1.0)
        norm = float(self.path.grad_norm(self.config.run.kernels)) / correction
        rate = learning_rate(
            self.config.schedule, self.optimizer.lr, self.step, self.config.train.steps
        )
        finite = math.isfinite(loss_sum) and math.isfinite(norm)
        if finite:
            self.num_skipped = 0
            self.loss_scale.found(overflow=False)
            self.optimizer.step(rate, self._divisor(norm, correction), self.path.publish)
            self.path.publish()
        elif self.loss_scale.dynamic and math.isfinite(loss_sum):
            self._on_overflow()
        else:
            self._on_nonfinite(micros.ids, losses)
        votes = self.clock.advance(self.config.train.global_batch, votes)
        for number, vote in zip(STOP_SIGNALS, votes, strict=True):
            self.stop_signal = number if vote else self.stop_signal
        speed = items * self.clock.fellows / (time.perf_counter() - begin)
        mean = loss_sum / items if items > 0 else 0.0
        shown = scale if self.dtype is torch.float16 else None
        skipped = not finite
        return StepRecord(self.step, mean, norm, rate, round(items), speed, skipped, samples, shown)

    @property
    def _num_shares(self) -> int:
        """Into how many microbatches a global batch is cut, over all ranks."""
        return self.num_microbatches * self.clock.place.degree

    @property
    def _num_holders(self) -> int:
        """How many ranks of the world count the same losses: those of one last stage."""
        return self.mesh.world.degree // (self.mesh.dp.degree * self.mesh.pp.degree)

    def _next_microbatch(self, number: int) -> Microbatch:
        place = self.clock.place
        here = Place(place.cursor + number, place.rank, place.degree)
        if self._stream is None or self._stream_at != here:
            self._stream = TrainStream(
                self.source.train,
                seed=self.config.run.seed,
                cursor=place.cursor,
                microbatch=self.microbatch,
                num_microbatches=self.num_microbatches,
                rank=place.rank,
                degree=place.degree,
                num_workers=getattr(self.config.data, "num_workers", 0),
                pin_memory=self.mesh.device.type == "cuda",
            )
        ids, batch = self._stream.next()
        last = number + 1 == self.num_microbatches
        ahead = self.config.train.global_batch if last else number + 1
        self._stream_at = Place(place.cursor + ahead, place.rank, place.degree)
        places = rank_positions(place.cursor, number, self.microbatch, place.rank, place.degree)
        return Microbatch(ids, self._to_device(batch), places.tolist())

    def _seed(self, stage: int, places: Sequence[int], forward: bool) -> None:
        """Seed what the model will draw for a microbatch, before a forward and a backward.

        Seeds belong to places in the stream, not to ranks. Our dropout draws for each sample, so it
        is the same under every layout; other draws of a user's model are for a microbatch and a
        stage, so they are the same under every layout with the same microbatch size and stages.
        """
        seed = self.config.run.seed
        if self._draws_per_sample:
            seeds = [derive_seed(seed, 4, place) for place in places]
            seed_dropout(self.model, seeds, recompute=not forward)
        if forward:
            seed_everything(derive_seed(seed, 2, places[0] + stage * STAGE_SEEDS))

    def _to_device(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Move a batch to the device; its floating-point tensors take the model's dtype."""
        device = self.mesh.device
        return {
            name: t.to(device, self.dtype if t.is_floating_point() else t.dtype, non_blocking=True)
            for name, t in batch.items()
        }

    def _vote(self, votes: torch.Tensor) -> None:
        asked = self.stop_requested()
        for index, number in enumerate(STOP_SIGNALS):
            votes[index] = float(asked == number)

    def _divisor(self, norm: float, correction: float) -> torch.Tensor | None:
        """Return what to divide gradients by: item count, loss scale, clipping; None for 1."""
        divisor = grad_divisor(norm, correction, self.config.train.max_grad_norm)
        if divisor == 1.0:
            return None
        return torch.tensor(divisor, dtype=torch.float32, device=self.mesh.device)

    def _on_overflow(self) -> None:
        """Skip this update and halve the loss scale, or end the run if that does not help.

        All ranks get here together: the losses and the norm are the same on all of them.
        """
        self.num_skipped += 1
        self.path.abandon()
        scale = self.loss_scale.scale
        self.loss_scale.found(overflow=True)
        if self.num_skipped < MOST_SKIPS and not self.loss_scale.exhausted:
            text = "step %d: the gradient overflowed fp16; update skipped, loss scale now %g"
            log.info(text, self.step + 1, self.loss_scale.scale)
            return
        names = self._nonfinite_parameters(gradients=True)
        raise NonFiniteError(
            f"step {self.step + 1}: with loss scale {scale:g}, the gradient of "
            f"{', '.join(names[:3])} is NaN or infinite",
            why=f"this is number {self.num_skipped} in a row, and halving the scale did not help; "
            "the update was not done",
            mend="set train.precision to bf16 or fp32, which shows if backward itself makes a NaN; "
            "or lower optimizer.lr",
        )

    def _on_nonfinite(
        self, ids: Mapping[int, np.ndarray], losses: Mapping[int, torch.Tensor]
    ) -> None:
        """Skip this update, or end the run, naming the rank, the samples, the parameters at fault.

        All ranks get here together: what they looked at was summed over all of them.
        """
        self.num_skipped += 1
        self.path.abandon()
        bad = [number for number, loss in losses.items() if not loss.isfinite()]
        mine = [int(i) for number in bad for i in ids[number][:8]]
        everyone = all_gather_object(mine, self.mesh.world, "search for a NaN")
        guilty = [f"rank {rank} (samples {ids})" for rank, ids in enumerate(everyone) if ids]
        names = self._nonfinite_parameters(gradients=True)
        what = f"step {self.step + 1}: " + (
            f"the loss on {' and '.join(guilty)} is NaN or infinite"
            if guilty
            else f"the gradient of {', '.join(names[:3])} is NaN or infinite"
        )
        if self.config.train.on_nonfinite == "skip" and self.num_skipped < MOST_SKIPS:
            log.warning("%s; this update is skipped", what)
            return
        fp16 = "set train.precision=bf16, " if guilty else "set train.loss_scale=dynamic, "
        fp16 = fp16 if self.dtype is torch.float16 else ""
        in_a_row = f"this is number {self.num_skipped} in a row; " if self.num_skipped > 1 else ""
        raise NonFiniteError(
            what,
            why=in_a_row + "the update was not done; checkpoints hold finite parameters only",
            mend=f"look at those samples, lower optimizer.lr, {fp16}or set train.on_nonfinite=skip",
        )

    # -- evaluation ----------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self) -> float | None:
        """Return the mean loss over `eval.samples` held-out samples; None for none.

        Each replica computes a share; two numbers are summed over the data-parallel axis, and
        over the pipeline's, where only the last stage has them.
        """
        place = self.clock.evaluation() if self.config.eval.samples else None
        if place is None:
            return None
        totals = torch.zeros(2, dtype=torch.float64, device=self.mesh.device)
        batches = validation_batches(
            self.source.validation,
            self.config.eval.samples,
            seed=self.config.run.seed,
            microbatch=self.microbatch,
            rank=place.rank,
            degree=place.degree,
            even=self.config.zero.stage == 3,  # whose forward communicates
        )

        def add_up(model: Any, number: int, batch: Batch) -> None:
            loss = self.loss_of(model, batch)
            if not some[number][0]:
                return  # computed only because others have one batch more
            items = some[number][0] * self.source.items_per_sample
            count = loss.count if loss.count is not None else items
            totals.add_(torch.tensor([float(loss.mean) * count, count]).to(totals))

        at_once = 2 * self.mesh.pp.degree  # enough to keep all stages busy
        with evaluating(self.model):
            while some := list(itertools.islice(batches, at_once)):
                self.pipeline.evaluate([self._to_device(batch) for _, batch in some], add_up)
        for axis in (self.mesh.dp, self.mesh.pp):
            all_reduce(totals, axis, "all_reduce of the validation loss")
        totals = self.clock.add_up(totals, "evaluation")
        return float(totals[0] / totals[1])

    # -- checkpoints ---------------------------------------------------------------------------

    def save(self) -> Path | None:
        """Save a checkpoint of this step and remove those that need not be kept.

        None: it was given up, on all ranks alike, since other workers have gone on meanwhile.

        Raises:
            CheckpointError: on every rank, if any could not write.
            NonFiniteError: a parameter is NaN or infinite, and such a checkpoint would be no help.
        """
        began = time.perf_counter()
        self._refuse_nonfinite()
        scale = self.loss_scale
        state = State(
            step=self.step,
            cursor=self.cursor,
            seed=self.config.run.seed,
            num_updates=self.optimizer.num_updates,
            data_fingerprint=self.source.fingerprint,
            layout=self.mesh.layout.degrees,
            config=self.config.model_dump(),
            loss_scale=LossScaleEntry(scale=scale.scale, good_steps=scale.good_steps)
            if scale.dynamic
            else None,
            compression=self.state.progress,
        )
        try:
            self.state.consolidate()
            blocks = [*self.state.blocks(), *self.state.errors()]
            further = self.tables.write if self.tables is not None else None
            alone = not self.config.server.servers
            where = save(self.checkpoints, state, blocks, self.mesh.world, further, alone=alone)
        except Overtaken as error:
            log.warning("no checkpoint of step %d was written: %s", self.step, error)
            return None
        finally:
            self.state.saved()
        if self.mesh.rank == 0:
            keep = self.config.checkpoint
            prune(self.checkpoints, self.step, keep.keep_last, keep.keep_every)
        self.last_save = SaveRecord(self.step, round(time.perf_counter() - began, 3))
        return where

    def _refuse_nonfinite(self) -> None:
        names = self._nonfinite_parameters(gradients=False)
        if names:
            raise NonFiniteError(
                f"after step {self.step}, {', '.join(names[:3])} is NaN or infinite",
                why="the update overflowed; no checkpoint of it was written",
                mend="lower optimizer.lr, and --resume from the checkpoint before",
            )

    def _nonfinite_parameters(self, *, gradients: bool) -> list[str]:
        """Return the names of those that are NaN or infinite on any rank, each once."""
        mine = self.path.nonfinite_parameters(gradients=gradients)
        everyone = all_gather_object(mine, self.mesh.world, "search for a NaN")
        return list(dict.fromkeys(name for names in everyone for name in names))

    def share_compressed(self) -> float:
        """Return which share of what this rank trains travels in few bits."""
        buckets = self.path.buckets if isinstance(self.path, GradientPath) else []
        numel = sum(bucket.numel for bucket in buckets)
        return sum(b.numel for b in buckets if b.sharing.in_few_bits) / max(1, numel)

    def check_replicas(self) -> None:
        """Compare, bit for bit, what several ranks hold: parameters and optimizer state.

        Communicates one hash a block over all ranks.

        Raises:
            BigtrainError: on every rank, naming what differs and between which ranks.
        """
        self.path.settle()
        blocks = itertools.chain(self.state.blocks(), self.state.replicas())
        differences = find_divergence(blocks, self.mesh.world)
        if differences:
            raise BigtrainError(
                f"after step {self.step}, replicas are not equal: {'; '.join(differences[:3])}",
                why="a rank computed something else from the same numbers: an operation that is "
                "not deterministic, a parameter changed by hand, or faulty hardware",
                mend="resume from the checkpoint before, with run.deterministic=true to find out",
            )

    def resume(self) -> Path | None:
        """Take up the newest good checkpoint, of whatever layout; None if there is none.

        Raises:
            CheckpointError: it does not fit the model, the optimizer, the seed or the data.
        """
        if self.clock.has_begun:
            return None
        found = find_last_good(self.checkpoints, self.mesh.world)
        if found is None:
            return None
        blocks = itertools.chain(self.state.blocks(), self.state.errors())
        names = sorted({block.name for block in blocks})
        everyone = all_gather_object(names, self.mesh.world, "names of what the ranks have")
        known = {name for names in everyone for name in names}
        together(lambda: self._take_up(*found, known), self.mesh.world, "loading a checkpoint")
        self.path.publish()
        return found[0]

    def _take_up(self, where: Path, manifest: Manifest, known: Set[str]) -> None:
        state = manifest.state
        must_agree: dict[str, tuple[Any, Any, str]] = {
            "model": (
                *_differences(state.config["model"], self.config.model.model_dump()),
                "set the model section back, or start a new run in another run.dir",
            ),
            "seed": (state.seed, self.config.run.seed, f"set run.seed={state.seed}"),
            "data": (
                state.data_fingerprint,
                self.source.fingerprint,
                "put the data and data.seq_len back, or start a new run in another run.dir",
            ),
        }
        for name, (was, now, mend) in must_agree.items():
            if was != now:
                raise CheckpointError(
                    f"{where} is of a run with another {name}: {was}, now {now}",
                    why="it would not go on as the run that it is",
                    mend=mend,
                )
        kept = {name for name in manifest.tensors if name.startswith((ERRORS, OUTER))}
        left_over = sorted(manifest.tensors.keys() - known - kept)
        if left_over:
            raise CheckpointError(
                f"{where} has {len(left_over)} tensors that this run has not, like {left_over[0]}",
                why="the checkpoint is of another model or of another optimizer",
                mend="resume with the config that wrote it (it is in its manifest)",
            )
        files = [name for name in manifest.files if is_table_file(name)]
        if self.tables is not None:
            self.tables.take_up(where, files)
        elif files:
            raise CheckpointError(
                f"{where} has rows of tables that servers kept, and this run has no such tables",
                why="they are in no worker, and in no model without ServerEmbedding",
                mend="resume with servers, and with the model that wrote it",
            )
        self.state.take_up(partial(load_blocks, where, manifest), manifest.tensors.keys())
        self.clock.go_to(state.step, state.cursor)
        self.optimizer.num_updates = state.num_updates
        if state.loss_scale is not None and self.loss_scale.dynamic:
            saved = state.loss_scale
            self.loss_scale.scale, self.loss_scale.good_steps = saved.scale, saved.good_steps
        self.state.progress = state.compression
        self._stream = None


def _differences(was: dict[str, Any], now: dict[str, Any]) -> tuple[str, str]:
    """Return what differs between two model sections, as text, but for what a run may change."""
    free = {"dropout", "args", "loss"}  # a factory may take other arguments
    keys = [key for key in {**was, **now} if key not in free and was.get(key) != now.get(key)]
    before, after = (", ".join(f"{k}={section.get(k)}" for k in keys) for section in (was, now))
    return before, after
