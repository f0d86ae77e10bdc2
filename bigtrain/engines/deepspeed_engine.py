"""DeepSpeed's engine (https://www.deepspeed.ai) in the place of our own.

It shares out and reduces (ZeRO stages 0 to 3) and offloads; the loss, its weights, the norm,
clipping, the learning rate, the update's formula and checkpoints are those of a native run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from typing import Any

import torch
from torch import nn

from bigtrain.comm.block import Block, NamedBlock, Shard
from bigtrain.comm.buckets import Bucket, check_trainable
from bigtrain.comm.collectives import all_reduce, broadcast, explained
from bigtrain.comm.failure import telling_others
from bigtrain.comm.mesh import Mesh
from bigtrain.comm.model_buffers import ModelBuffers
from bigtrain.config.schema import AdamwOptimizer, Config, SgdOptimizer
from bigtrain.engines.deepspeed_config import deepspeed_config
from bigtrain.engines.deepspeed_setup import initialize, load_deepspeed, prepare_world
from bigtrain.engines.flat_optimizer import FlatOptimizer
from bigtrain.engines.fragments import Linked, Partitioned, Parts, Whole
from bigtrain.engines.native import saved_tensors
from bigtrain.errors import BigtrainError
from bigtrain.ops.dropout import number_dropout
from bigtrain.ops.grad_norm import grad_norm
from bigtrain.ops.op import Kernels
from bigtrain.optim.kinds import DECAY, decay_kind
from bigtrain.pipeline.passage import LossOf, Prepare


class DeepSpeedEngine:
    """Trains `model` over the data-parallel axis of `mesh` with DeepSpeed: all that seam.py asks.

    Raises:
        BigtrainError: nothing to train; DeepSpeed does not take this configuration.
        CommError: a rank went away.
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: Mesh,
        config: Config,
        *,
        dtype: torch.dtype,
        microbatch: int,
        num_microbatches: int,
    ) -> None:
        deepspeed = load_deepspeed(mesh.device)
        check_trainable(model)
        number_dropout(model)
        self._mesh, self._module = mesh, model.to(mesh.device)
        self.num_parameters = sum(p.numel() for p in model.parameters())
        self._equalize(dtype)
        self._buffers = ModelBuffers(model, mesh.dp)
        self._buffers.equalize()
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._trained: list[tuple[str, Any]] = named
        self._shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        exact = {name: p.data for name, p in named} if dtype != torch.float32 else {}
        for p in model.parameters():
            p.data = p.data.to(dtype) if p.is_floating_point() else p.data
        self.lr = config.optimizer.lr
        assert isinstance(config.optimizer, AdamwOptimizer | SgdOptimizer)  # checked
        self._optimizer = FlatOptimizer(
            _groups(named, config.optimizer.weight_decay), config.optimizer, config.run.kernels
        )
        settings = deepspeed_config(config, microbatch, num_microbatches, mesh.dp.degree)
        prepare_world(mesh)
        with explained("setting up DeepSpeed", mesh.world):
            self._engine = initialize(deepspeed, model, self._optimizer, settings)
        self._stage = config.zero.stage
        self._parts = self._find_parts()
        for name, param in named:  # DeepSpeed rounds its fp32 values to the model's dtype
            if exact and self._length(param):
                start, stop = self._parts.span(param)
                self._parts.put(param, exact.pop(name).reshape(-1)[start:stop].float())
        self._bad: list[str] = []
        self._stale = False
        self._model = _caller(self._engine)

    def _equalize(self, dtype: torch.dtype) -> None:
        """Give every rank the first one's parameters; let what is not trained have `dtype`."""
        for name, param in self._module.named_parameters():
            param.data = param.data.contiguous()
            if param.requires_grad:
                param.data = param.data.float()
            broadcast(param, self._mesh.dp, f"broadcast of {name}")
        for _, tensor in saved_tensors(self._module):
            if not isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)

    def _find_parts(self) -> Parts:
        first = self._trained[0][1]
        if hasattr(first, "ds_id"):
            flats = self._engine.optimizer.fp32_partitioned_groups_flat
            for flat in flats:
                for name in self._optimizer.moments:
                    self._optimizer.moment(flat, name)
            return Partitioned(self._optimizer, self._mesh.dp.rank)
        return Linked(self._optimizer) if hasattr(first, "_hp_mapping") else Whole(self._optimizer)

    # -- a step --------------------------------------------------------------------------------

    def run(
        self,
        batches: Sequence[Any],
        loss_of: LossOf,
        *,
        prepare: Prepare | None = None,
        forwards_done: Callable[[], None] | None = None,
    ) -> None:
        """Run forward and backward of all microbatches; gradients are final afterwards."""
        last = len(batches) - 1
        with telling_others(self._mesh.world):
            for number in range(len(batches)):
                batch = batches[number]
                self._engine.set_gradient_accumulation_boundary(number == last)
                if prepare is not None:
                    prepare(0, number, True)
                with explained("a forward of DeepSpeed", self._mesh.dp):
                    loss = loss_of(self._model, number, batch)
                if number == last and forwards_done is not None:
                    forwards_done()
                if prepare is not None:
                    prepare(0, number, False)
                self._backward(loss)

    def _backward(self, loss: torch.Tensor) -> None:
        if loss.grad_fn is None or not self._model.called:
            raise BigtrainError(
                "a microbatch whose loss does not come from calling the model",
                why="DeepSpeed reduces gradients while backward runs, the same ones on all ranks",
                mend="let the loss call model(...) and count an item in every microbatch, "
                "or set engine.kind=native",
            )
        self._model.called = False
        with explained("a backward of DeepSpeed", self._mesh.dp):
            self._engine.backward(loss, scale_wrt_gas=False)

    def finish(self) -> None:
        """Nothing is under way after `run`."""

    def grad_norm(self, kernels: Kernels = "auto") -> torch.Tensor:
        """Return the 2-norm of the gradient. One number is summed over the axis."""
        total = torch.zeros((), dtype=torch.float64, device=self._mesh.device)
        mine = [self._parts.grad(p) for _, p in self._trained if self._length(p)]
        if mine:
            total += grad_norm(mine, kernels=kernels).squares
        if not isinstance(self._parts, Whole):
            all_reduce(total, self._mesh.dp, "all_reduce of the gradient norm")
        return total.sqrt().float()

    def step(
        self,
        lr: float | None = None,
        grad_divisor: torch.Tensor | None = None,
        done: Callable[[Bucket], None] | None = None,
    ) -> None:
        """Do one update, and bring the new parameters to all ranks; there are no buckets."""
        optimizer = self._optimizer
        optimizer.rate = self.lr if lr is None else lr
        optimizer.divisor = grad_divisor
        for group in self._engine.optimizer.param_groups:  # for what DeepSpeed shows
            group["lr"] = optimizer.rate
        optimizer.num_updates += 1
        optimizer.armed = True
        try:
            self._finish_step()
        finally:
            optimizer.armed = False

    def rescale(self, scale: float) -> None:
        """Nothing is kept that would be in units of it."""

    def settle(self) -> None:
        """Nothing is on the wire between steps."""

    def abandon(self) -> None:
        """Forget the gradient: DeepSpeed does its step, and the optimizer in it nothing."""
        self._bad = self._nonfinite(self._parts.grad)
        self._finish_step()
        self._buffers.restore()

    def _finish_step(self) -> None:
        with explained("a step of DeepSpeed", self._mesh.dp):
            self._engine.step()

    @property
    def num_updates(self) -> int:
        """Updates so far."""
        return self._optimizer.num_updates

    @num_updates.setter
    def num_updates(self, number: int) -> None:
        self._optimizer.num_updates = number

    @torch.no_grad()
    def publish(self, bucket: Bucket | None = None) -> None:
        """Bring the first rank's buffers to all, and after `take_up` parameters to the model."""
        if self._stale:
            self._refresh()
            self._stale = False
        self._buffers.equalize()

    def nonfinite_parameters(self, *, gradients: bool) -> list[str]:
        """Return the names of parameters with a NaN or an infinity in what this rank updates.

        Of gradients: of those that were last abandoned.
        """
        return self._bad if gradients else self._nonfinite(self._parts.main)

    def _nonfinite(self, part_of: Callable[[Any], torch.Tensor]) -> list[str]:
        mine = [(name, p) for name, p in self._trained if self._length(p)]
        return [name for name, p in mine if not part_of(p).isfinite().all()]

    def _length(self, param: Any) -> int:
        start, stop = self._parts.span(param)
        return stop - start

    # -- forward only --------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Any], loss_of: LossOf) -> None:
        """Run forward only. In stage 3 all ranks must have as many batches."""
        with telling_others(self._mesh.world), explained("a forward of DeepSpeed", self._mesh.dp):
            for number, batch in enumerate(batches):
                loss_of(self._model, number, batch)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model returns."""
        return self._model(*args, **kwargs)

    # -- checkpoints ---------------------------------------------------------------------------

    def blocks(self) -> Iterator[NamedBlock]:
        """Yield everything that a checkpoint holds, as this rank's parts. No communication."""
        for (name, _, moment), param, tensor in self._pieces():
            prefix = "model." if moment is None else f"optimizer.{moment}."
            yield from self._named(prefix + name, self._shapes[name], param, tensor)
        dp = self._mesh.dp
        trained = {param for _, param in self._trained}
        for name, tensor in saved_tensors(self._module):
            if tensor in trained:
                continue
            if hasattr(tensor, "ds_tensor"):  # frozen, and cut by stage 3
                start, stop = self._parts.span(tensor)
                flat = tensor.ds_tensor.data[: stop - start]
                yield from self._named(f"model.{name}", self._shapes[name], tensor, flat)
            else:
                shard, block = Shard.whole(tensor.shape), Block.whole(tensor.shape)
                replica = (dp.rank, dp.degree)
                yield from shard.named_blocks(f"model.{name}", block, tensor.data, replica)

    def consolidate(self) -> None:
        """Nothing is kept for later."""

    def saved(self) -> None:
        """Nothing was brought."""

    @property
    def progress(self) -> dict[str, Any] | None:
        return None

    @progress.setter
    def progress(self, saved: dict[str, Any] | None) -> None:
        pass

    def errors(self) -> Iterator[NamedBlock]:
        return iter(())

    def replicas(self) -> Iterator[NamedBlock]:
        return iter(())

    def take_up(self, load: Callable[[Iterable[NamedBlock]], None], saved: Set[str]) -> None:
        """Let `load` fill this rank's parts. No communication."""
        blocks = list(self.blocks())
        load(blocks)
        loaded = {(block.name, block.block.offsets): block.tensor for block in blocks}
        for (name, prefix, moment), param, tensor in self._pieces():
            flat = torch.cat(
                [
                    loaded[block.name, block.block.offsets].reshape(-1)
                    for block in self._named(prefix + name, self._shapes[name], param, tensor)
                ]
            )
            self._parts.put(param, flat, moment)
        self._stale = True

    def _pieces(self) -> Iterator[tuple[tuple[str, str, str | None], Any, torch.Tensor]]:
        """Yield ((parameter, prefix, moment), the parameter, this rank's part of it or of it)."""
        for moment in (None, *self._optimizer.moments):
            prefix = "model." if moment is None else f"optimizer.{moment}."
            for name, param in self._trained:
                if self._length(param):
                    yield (name, prefix, moment), param, self._parts.main(param, moment)

    def _named(
        self, name: str, shape: tuple[int, ...], param: Any, flat: torch.Tensor
    ) -> Iterator[NamedBlock]:
        """Yield `flat`, this rank's part of a tensor, as blocks."""
        start, stop = self._parts.span(param)
        dp = self._mesh.dp
        alike = (dp.rank, dp.degree) if isinstance(self._parts, Whole) else (0, 1)
        done = 0
        for block in Block.cover(shape, start, stop):
            part = flat[done : done + block.numel].view(block.sizes)
            done += block.numel
            yield NamedBlock(name, shape, block, part, *alike)

    def _refresh(self) -> None:
        """Let the model compute with the main parameters; one parameter at a time is whole."""
        if isinstance(self._parts, Whole):
            return
        for name, param in self._module.named_parameters():
            if not param.requires_grad and not hasattr(param, "ds_tensor"):
                continue
            source = self._parts.main if param.requires_grad else _frozen_part
            full = torch.zeros(self._shapes[name], device=self._mesh.device)
            start, stop = self._parts.span(param)
            if stop > start:
                full.view(-1)[start:stop] = source(param)[: stop - start]
            all_reduce(full, self._mesh.dp, f"gathering {name}")
            with _gathered(param):
                param.data.copy_(full)


def _frozen_part(param: Any) -> torch.Tensor:
    found: torch.Tensor = param.ds_tensor.data
    return found


def _gathered(param: Any) -> Any:
    """Return a context in which a parameter of stage 3 is whole and may be changed."""
    import deepspeed

    whole = deepspeed.zero.GatheredParameters
    return whole([param], modifier_rank=0, enabled=hasattr(param, "ds_id"))


def _groups(named: Sequence[tuple[str, Any]], weight_decay: float) -> list[dict[str, Any]]:
    kinds = {name: decay_kind(name, param) for name, param in named}
    return [
        {
            "params": [param for name, param in named if kinds[name] == kind],
            "weight_decay": weight_decay if kind == DECAY else 0.0,
        }
        for kind in dict.fromkeys(kinds.values())
    ]


class _Caller:
    """Calls the model through DeepSpeed's engine; in all else it is the model."""

    called = False

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.called = True
        return self._engine(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine.module, name)


def _caller(engine: Any) -> Any:
    """Return a _Caller that messages call by the name of the model's class."""
    return type(type(engine.module).__name__, (_Caller,), {})(engine)
