"""Brings parameters where they are used: waits for what was published, gathers what is sharded.

Modules announce the use of their own parameters, before their forward and in backward; any other
use is noticed by the parameters themselves. A gathered bucket is given up again once it is out of
use and others have been used since. In what order all ranks gather, `order` says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from bigtrain.comm.buckets import Bucket
from bigtrain.comm.collectives import Pending, start_all_gather_into
from bigtrain.comm.mesh import Axis
from bigtrain.comm.sync import Passage
from bigtrain.errors import BigtrainError
from bigtrain.zero.order import Journey, Orders
from bigtrain.zero.parameter import KeptParameter, keep, release

_SEEN = (torch.Tensor, bool, int, float, str, type(None))  # leaves with no tensor hidden inside
WINDOW = 2  # buckets used last that stay: what lies on the border of two is used with both


@dataclass(eq=False)
class Home:
    """Where the parameters of a bucket are."""

    bucket: Bucket
    here: bool = True
    pending: Pending[torch.Tensor] | None = None
    users: int = 0  # modules whose forward or backward runs with it
    pinned: bool = False  # stays until the passage is over
    direct: bool = False  # used by other code than its own modules': backward will not announce it

    @property
    def sharded(self) -> bool:
        return self.bucket.sharing.sharded_params


class _Call:
    """One call of a module: its backward uses what its forward has used.

    It begins when the gradient of an output is there, and is over when those of all inputs are.
    """

    def __init__(self, keeper: Keeper, homes: Sequence[Home], inputs: int) -> None:
        self.keeper, self.homes, self.inputs = keeper, homes, inputs
        self.begun, self.left = False, inputs

    def begin(self, grad: torch.Tensor) -> None:
        if not self.begun:
            self.begun = True
            self.keeper.calls.append(self)
            self.keeper.enter(self.homes)

    def end(self, grad: torch.Tensor) -> None:
        self.left -= 1
        if self.left == 0 and self.begun:
            self.keeper.calls.remove(self)
            self.keeper.leave(self.homes)
            self.reset()

    def reset(self) -> None:
        self.begun, self.left = False, self.inputs


class Keeper:
    """Knows of every bucket whether its parameters are here, and brings them.

    axis: the ranks that share parameters, with a process group of its own, so that gathers need
    not be in one order with the gradients' collectives. `reshard_after_forward`: give up what was
    gathered before backward gathers it again. prefetch: buckets that are gathered ahead of use.
    agreed: ask all ranks before each gather, instead of following the order of earlier steps.
    """

    def __init__(
        self,
        axis: Axis,
        device: torch.device,
        *,
        reshard_after_forward: bool = True,
        prefetch: int = 1,
        agreed: bool = False,
    ) -> None:
        self.axis, self.reshard_after_forward = axis, reshard_after_forward
        self.orders = Orders(axis, device, prefetch, agreed)
        self.homes: dict[int, Home] = {}
        self.calls: list[_Call] = []  # whose backward runs
        self.peak_whole = 0  # elements of sharded buckets that were whole at once, at most
        self._stack: list[_Call | None] = []  # of modules whose forward runs
        self._recent: list[Home] = []
        self._journey: Journey | None = None
        self._opened_by_model = self._all_whole = False

    # -- who uses what -------------------------------------------------------------------------

    def attach(self, model: nn.Module, buckets: Sequence[Bucket]) -> None:
        """Look after `buckets`, of `model`; give up the parameters of those that are sharded."""
        shared = [bucket for bucket in buckets if bucket.sharing.inner.degree > 1]
        self.homes = {bucket.index: Home(bucket) for bucket in shared}
        of = {slot.param: home for home in self.homes.values() for slot in home.bucket.slots}
        if any(home.sharded for home in self.homes.values()):
            model.register_forward_pre_hook(self._before_model)
        for module in model.modules():
            homes = dict.fromkeys(of[p] for p in module._parameters.values() if p in of)
            if homes:
                before = partial(self._before, tuple(homes))
                module.register_forward_pre_hook(before, with_kwargs=True)
                after = partial(self._after, tuple(homes))
                module.register_forward_hook(after, with_kwargs=True, always_call=True)
        if any(home.sharded for home in self.homes.values()):
            model.register_forward_hook(self._after_model)
        for home in self.homes.values():
            if home.sharded:
                for slot in home.bucket.slots:
                    keep(slot.param, partial(self._used_directly, home, slot.name))
                self._reshard(home)

    def _before_model(self, *_: Any) -> None:
        if self._opened_by_model:  # and not closed: the forward before has raised
            self._drop()
        if self._journey is None:
            self._opened_by_model = True
            self._open("forward" if torch.is_grad_enabled() else "evaluation", 0)

    def _after_model(self, *_: Any) -> None:
        if self._opened_by_model:
            self._opened_by_model = False
            self._close()

    def _before(self, homes: Sequence[Home], module: nn.Module, args: Any, kwargs: Any) -> None:
        self.enter(homes)
        call = None
        if torch.is_grad_enabled() and any(home.sharded for home in homes):
            inputs = [t for t in pytree.tree_leaves((args, kwargs)) if _has_gradient(t)]
            call = _Call(self, homes, len(inputs))
            for tensor in inputs:
                tensor.register_hook(call.end)
        self._stack.append(call)

    def _after(
        self, homes: Sequence[Home], module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> None:
        self.leave(homes)
        call = self._stack.pop()
        if call is None:
            return
        leaves = pytree.tree_leaves(output)
        for tensor in filter(_has_gradient, leaves):
            tensor.register_hook(call.begin)
            if tensor._base is not None and _has_gradient(tensor._base):
                tensor._base.register_hook(call.begin)  # a view that is changed loses its hooks
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if not tensors or any(not isinstance(leaf, _SEEN) for leaf in leaves):
            for home in homes:  # what leaves in an object of its own cannot announce backward
                home.direct = home.direct or home.sharded

    def _used_directly(self, home: Home, name: str) -> None:
        """Bring a bucket that is used by other code than the modules that hold its parameters."""
        if home.users or self._all_whole:
            return
        if home.sharded:
            if self._journey is None:
                raise BigtrainError(
                    f"the values of {name} are not here",
                    why=f"each of {self.axis.degree} ranks holds a part of them, outside of "
                    "forward and backward",
                    mend="look at them, or change them, inside `with path.unsharded():`, which all "
                    "ranks enter together",
                )
            home.direct = home.pinned = True
        self.need([home])

    # -- what is needed ------------------------------------------------------------------------

    def enter(self, homes: Sequence[Home]) -> None:
        """Have these buckets whole, from now on until `leave`."""
        for home in homes:
            home.users += 1
        self.need(homes)

    def leave(self, homes: Sequence[Home]) -> None:
        """Need these buckets no longer, for what `enter` was called."""
        for home in homes:
            home.users -= 1

    def need(self, homes: Sequence[Home]) -> None:
        """Return when these buckets are whole on this rank."""
        sharded = [home for home in homes if home.sharded]
        for home in sharded:  # before any is gathered, so that room is made by what is out of use
            self._note(home)
        for home in sharded:
            if self._journey is not None:
                self._journey.go_to(home.bucket.index)
        for home in homes:
            self._arrive(home)

    def expect(self, bucket: Bucket, pending: Pending[torch.Tensor]) -> None:
        """Wait for an all-gather of `bucket`, which has begun, when its parameters are used."""
        home = self.homes[bucket.index]
        home.pending, home.here = pending, False
        for slot in bucket.slots:
            keep(slot.param, partial(self._used_directly, home, slot.name))

    def forget(self) -> None:
        """Give up all that is gathered: it is out of date."""
        self.orders.carry = ()
        for home in self.homes.values():
            if home.sharded and home.here:
                self._reshard(home)

    def _arrive(self, home: Home) -> None:
        if home.pending is not None:
            home.pending.wait()
            home.pending, home.here = None, True
            if not home.sharded:
                for slot in home.bucket.slots:
                    release(slot.param)

    def is_here(self, index: int) -> bool:
        """Is the bucket whole, or about to be?"""
        home = self.homes[index]
        return home.here or home.pending is not None

    def arrive(self, index: int) -> None:
        """Return when the bucket is whole, once its gather has begun."""
        self._arrive(self.homes[index])

    def give_up(self, index: int) -> None:
        """Reshard a bucket that was gathered for others only."""
        home = self.homes[index]
        if not (home.users or home.pinned):
            self._arrive(home)
            self._reshard(home)

    def gather(self, index: int) -> bool:
        """Begin to make a bucket whole, whether this rank wants it or another; say if it is new."""
        home = self.homes[index]
        new = not home.here and home.pending is None
        if home.pending is not None:
            self._arrive(home)
        bucket = home.bucket
        params = bucket.params
        if new:
            params.untyped_storage().resize_(params.numel() * params.element_size())
        rows = params.view(self.axis.degree, -1)
        rows[self.axis.rank].copy_(bucket.shard)
        what = f"all_gather of bucket {index}"
        home.pending = start_all_gather_into(rows, self.axis, what)
        whole = [h for h in self.homes.values() if h.sharded and (h.here or h.pending)]
        self.peak_whole = max(self.peak_whole, sum(h.bucket.numel for h in whole))
        return new

    def _reshard(self, home: Home) -> None:
        home.bucket.params.untyped_storage().resize_(0)
        home.here = False

    def _note(self, home: Home) -> None:
        """Note a use, and give up what is out of use."""
        if home in self._recent:
            self._recent.remove(home)
        self._recent.append(home)
        if self._journey is None or self._journey.keeps_all:
            return
        for other in self._recent[:-WINDOW]:
            free = not (other.users or other.pinned or other.pending)
            if other.here and free and not self._journey.keeps(other.bucket.index):
                self._reshard(other)
                self._recent.remove(other)

    # -- passages ------------------------------------------------------------------------------

    @contextmanager
    def passage(self, kind: Passage, stage: int) -> Iterator[None]:
        """Surround what computes with parameters of `stage`."""
        if not any(home.sharded for home in self.homes.values()):
            yield
            return
        self._open(kind, stage)
        try:
            yield
        except BaseException:
            self._drop()
            raise
        self._close()

    def _open(self, kind: Passage, stage: int) -> None:
        mine = [h for h in self.homes.values() if h.sharded and stage in h.bucket.stages]
        keeps_all = kind == "forward" and not self.reshard_after_forward
        self._journey = self.orders.begin(
            kind, stage, [home.bucket.index for home in mine], self, keeps_all=keeps_all
        )
        if kind in ("backward", "inputs"):
            direct = [home for home in mine if home.direct]
            for home in direct:
                home.pinned = True
            self.need(direct)

    def _close(self) -> None:
        assert self._journey is not None
        journey, self._journey = self._journey, None
        self._end(journey.end())

    def _drop(self) -> None:
        """End a passage that has failed, on all ranks alike."""
        self._journey, self._opened_by_model = None, False
        self.orders.carry = ()
        self._end(())

    def _end(self, stay: Sequence[int]) -> None:
        """End a passage, after which the buckets `stay` are here and no others."""
        for call in self.calls:
            call.reset()
        self.calls.clear()
        self._stack.clear()
        self._recent.clear()
        for index, home in self.homes.items():
            if home.sharded:
                home.users, home.pinned = 0, False
                if home.pending is not None:
                    self._arrive(home)
                if home.here and index not in stay:
                    self._reshard(home)

    def settle(self) -> None:
        """Return when everything that is expected has arrived."""
        for home in self.homes.values():
            self._arrive(home)

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        """Have everything whole inside, and take up what was changed in there."""
        for home in self.homes.values():
            if home.sharded and not home.here:
                self.gather(home.bucket.index)
            self._arrive(home)
            for slot in home.bucket.slots:
                slot.version = slot.param._version if home.sharded else slot.version
        self._all_whole = True
        try:
            yield
        finally:
            self._all_whole = False
            for home in self.homes.values():
                if home.sharded:
                    for slot in home.bucket.slots:
                        if slot.param._version != slot.version:
                            home.bucket.take_up(slot)
            self.forget()


def _has_gradient(leaf: Any) -> bool:
    is_value = isinstance(leaf, torch.Tensor) and type(leaf) is not KeptParameter
    return is_value and leaf.requires_grad
