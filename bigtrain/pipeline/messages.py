"""What travels between stages: activations with the microbatch's flow, gradients against it.

A message is any nesting of tuples, lists and dicts with tensors, None and constants in it. What it
is made of is agreed once for every shape of batch: since all ranks of a pipeline see the batch,
sender and receiver know by themselves when a new agreement is needed, and only then the sender puts
one in front of the message. Everything else travels as bare tensors.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from bigtrain.comm.collectives import Pending
from bigtrain.comm.p2p import Links
from bigtrain.errors import BigtrainError
from bigtrain.pipeline.schedule import Action


class Constant:
    """What travels as one constant, of a class that derives from this (a frozen dataclass)."""


_CONSTANTS = (
    Constant,
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    torch.dtype,
    torch.device,
)
MOST_UNSENT = 4  # messages on their way to one rank before the next has to wait


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a message. Its gradient, of the same shape and dtype, travels back if wanted."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool


@dataclass(frozen=True)
class Spec:
    """What a message is made of.

    nesting: the message with the number of each leaf in its place. leaves: of each, a TensorSpec or
    the constant itself.
    """

    nesting: Any
    leaves: tuple[Any, ...]

    @classmethod
    def of(cls, value: Any) -> Spec:
        """Return the spec of `value`."""
        leaves, tree = pytree.tree_flatten(value)
        nesting = pytree.tree_unflatten(range(len(leaves)), tree)
        return cls(nesting, tuple(_spec_of(leaf) for leaf in leaves))

    @property
    def tensors(self) -> list[TensorSpec]:
        return [leaf for leaf in self.leaves if isinstance(leaf, TensorSpec)]

    def build(self, tensors: Sequence[Any]) -> Any:
        """Return the message with these in the places of its tensors."""
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, TensorSpec) else leaf for leaf in self.leaves]
        return pytree.tree_map(lambda number: leaves[number], self.nesting)

    def check(self, other: Spec, stage: int) -> None:
        """Refuse a message that is not as agreed.

        Raises:
            BigtrainError: it differs from `other`, which a batch of the same shape had.
        """
        if self == other:
            return
        raise BigtrainError(
            f"stage {stage} gives something else than for an earlier batch of the same shape",
            why=f"it was {_shown(self)}, now it is {_shown(other)}; the next stage cannot know",
            mend="let shapes and constants depend on the shapes of the batch only (pad what "
            "varies), or return what varies as a tensor",
        )


def _spec_of(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return TensorSpec(tuple(leaf.shape), leaf.dtype, leaf.requires_grad)
    return constant(leaf)


def constant(leaf: Any) -> Any:
    """Return `leaf`, which is no tensor, if it may travel.

    Raises:
        BigtrainError: it may not.
    """
    if isinstance(leaf, _CONSTANTS):
        return leaf
    raise BigtrainError(
        f"a stage gives the next one a {type(leaf).__name__}",
        why="between stages travel tensors, None, numbers, texts, dtypes and devices, in tuples, "
        "lists and dicts",
        mend="cut the model elsewhere, or let what is cut return one of these",
    )


def _shown(spec: Spec) -> str:
    leaves = [
        f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}"
        if isinstance(leaf, TensorSpec)
        else repr(leaf)[:40]
        for leaf in spec.leaves
    ]
    return f"({', '.join(leaves)})"


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Return the tensors of a message, in order."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


class Exchange:
    """The messages of one rank in one step, lane by lane in the order of the table.

    placement: the rank (on the axis of `links`) of each stage. `specs` outlives the step; it has
    what was agreed: (stage that sends activations, shape of the batch) -> Spec. shape_of(number of
    a microbatch) says which agreement its messages are under.
    """

    def __init__(
        self,
        links: Links,
        placement: Sequence[int],
        specs: dict[tuple[int, Hashable], Spec],
        shape_of: Callable[[int], Hashable],
    ) -> None:
        self.links, self.placement, self.specs = links, placement, specs
        self.shape_of = shape_of
        self._awaited: dict[int, deque[Action]] = {}  # by source: announced, not posted yet
        self._posted: dict[Action, list[Pending]] = {}
        self._unsent: dict[int, deque[list[Pending]]] = {}

    # -- what comes in -------------------------------------------------------------------------

    def expect(self, receive: Action) -> None:
        """Announce that a message comes; what it is made of being known, receive it meanwhile."""
        source = self._source(receive)
        self._awaited.setdefault(source, deque()).append(receive)
        self._post_known(source)

    def take(self, receive: Action) -> list[torch.Tensor]:
        """Wait for the tensors of a message that was announced."""
        source = self._source(receive)
        self._post_known(source)
        while receive not in self._posted:
            self._agree(self._awaited[source][0])
            self._post_known(source)
        return [pending.wait() for pending in self._posted.pop(receive)]

    def spec(self, sender: int, microbatch: int) -> Spec:
        """Return what the activations are made of that stage `sender` gives for a microbatch."""
        return self.specs[sender, self.shape_of(microbatch)]

    def _post_known(self, source: int) -> None:
        awaited = self._awaited[source]
        while awaited and self._key(awaited[0]) in self.specs:
            receive = awaited.popleft()
            wanted = self.specs[self._key(receive)].tensors
            if receive.kind == "RECV_B":
                wanted = [spec for spec in wanted if spec.requires_grad]
            self._posted[receive] = [
                self.links.receive(
                    torch.empty(spec.shape, dtype=spec.dtype, device=self.links.device),
                    source,
                    _what(receive),
                )
                for spec in wanted
            ]

    def _agree(self, receive: Action) -> None:
        assert receive.kind == "RECV_F", "a gradient comes back before its activations have left"
        what = f"agreement on {_what(receive)}"
        self.specs[self._key(receive)] = self.links.receive_object(self._source(receive), what)

    def _key(self, receive: Action) -> tuple[int, Hashable]:
        """Return which agreement a message is under: that on the activations it belongs to."""
        sender = receive.stage - 1 if receive.kind == "RECV_F" else receive.stage
        return sender, self.shape_of(receive.microbatch)

    def _source(self, receive: Action) -> int:
        return self.placement[receive.stage + (-1 if receive.kind == "RECV_F" else 1)]

    # -- what goes out -------------------------------------------------------------------------

    def agree_on(self, stage: int, microbatch: int, value: Any) -> bool:
        """Check what `stage` gives against what was agreed; is it new?"""
        key, spec = (stage, self.shape_of(microbatch)), Spec.of(value)
        if key in self.specs:
            self.specs[key].check(spec, stage)
            return False
        self.specs[key] = spec
        return True

    def send_activations(self, send: Action, value: Any) -> None:
        """Send what a stage gives to the next one."""
        to = self.placement[send.stage + 1]
        pending = []
        if self.agree_on(send.stage, send.microbatch, value):
            spec = self.spec(send.stage, send.microbatch)
            pending += self.links.send_object(spec, to, f"agreement on {_what(send)}")
        self._send(send, to, [t.detach() for t in tensors_in(value)], pending)

    def send_gradients(self, send: Action, grads: Sequence[torch.Tensor]) -> None:
        """Send the gradients of what a stage was given back to the stage before."""
        self._send(send, self.placement[send.stage - 1], grads, [])

    def _send(
        self, send: Action, to: int, tensors: Sequence[torch.Tensor], pending: list[Pending]
    ) -> None:
        what = _what(send)
        pending += [self.links.send(tensor.contiguous(), to, what) for tensor in tensors]
        unsent = self._unsent.setdefault(to, deque())
        unsent.append(pending)
        if len(unsent) > MOST_UNSENT:
            _wait(unsent.popleft())

    def finish(self) -> None:
        """Wait until everything has left."""
        for unsent in self._unsent.values():
            while unsent:
                _wait(unsent.popleft())


def _wait(sent: list[Pending]) -> None:
    for pending in sent:
        pending.wait()


def _what(wire: Action) -> str:
    """Return what a message is, in words, for errors."""
    what = "activations" if wire.kind.endswith("F") else "gradients"
    verb = "send" if wire.kind.startswith("SEND") else "receive"
    return f"{verb} of {what} of stage {wire.stage}, microbatch {wire.microbatch}"
