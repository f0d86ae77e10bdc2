"""LAMB on flat segments: moments and norms of all, one collective, then the steps."""

from __future__ import annotations

import torch

from bigtrain.comm.buckets import Segment
from bigtrain.comm.gradient import GradientPath
from bigtrain.ops.lamb import lamb_apply_, lamb_moments_, trust_ratios
from bigtrain.ops.op import Kernels
from bigtrain.optim.kinds import NO_DECAY
from bigtrain.optim.optimizer import Optimizer


class LAMB(Optimizer):
    """LAMB (https://arxiv.org/abs/1904.00962), with bias correction, moments in fp32.

    The length of a parameter's step is its learning rate times the parameter's own norm, whatever
    parts of it several ranks have: a step communicates three fp64 numbers a parameter, once.
    Beside compressed momentum the length of a direction stays as it was (OneBitLAMB, for momentum
    that all ranks have, goes by the paper).
    """

    takes_momentum = True

    def __init__(
        self,
        source: GradientPath,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        kernels: Kernels = "auto",
    ) -> None:
        super().__init__(source, lr, weight_decay, kernels)
        self.path = source
        self.betas, self.eps = betas, eps
        self._add_moment("exp_avg")
        self._add_moment("exp_avg_sq")
        rows = {slot.name: row for row, slot in enumerate(source.slots)}
        self._num_slots = len(rows)
        self._places = [_Place(segment, rows, source.device) for segment in self.segments]
        self._ratios = [torch.empty(0)] * len(self.segments)
        lengths = torch.zeros(self._num_slots, dtype=torch.float64, device=source.device)
        self._lengths = lengths  # squares of directions, where the first moment was exact
        self._exact = {bucket.index for bucket in source.buckets}  # of an exact first moment

    @property
    def decays(self) -> tuple[float, float]:
        return self.betas

    @property
    def progress(self) -> dict[str, float] | None:
        old = [b for b in self.path.buckets if b.index not in self._exact]
        names = {slot.name for bucket in old for slot in bucket.slots}
        lengths = zip(self.path.slots, self._lengths.tolist(), strict=True)
        return {slot.name: length for slot, length in lengths if length > 0 and slot.name in names}

    @progress.setter
    def progress(self, saved: dict[str, float] | None) -> None:
        for row, slot in enumerate(self.path.slots):
            self._lengths[row] = (saved or {}).get(slot.name, 0.0)
        known = set(saved or {})
        unknown = [b for b in self.path.buckets if not {s.name for s in b.slots} <= known]
        self._exact = {bucket.index for bucket in unknown}

    def _prepare(self, divisor: torch.Tensor | None) -> None:
        """Update all moments, and find the trust ratio of every parameter.

        A first moment that came in few bits is longer than what it stands for. So where it does,
        the direction is taken to be as long as it was with the last exact one, as 1-bit LAMB does.
        """
        values = torch.zeros(self._num_slots, 3, dtype=torch.float64, device=self.path.device)
        came = torch.zeros(self._num_slots, dtype=torch.bool, device=self.path.device)
        for index, (segment, place) in enumerate(zip(self.segments, self._places, strict=True)):
            given, rows = segment.bucket.momentum is not None, place.rows
            came[rows] |= given
            if given and segment.bucket.index in self._exact:
                values[rows, 2] = self._norms(index, None, True)[:, 1].to(values.device)
            if given:
                self._take_momentum(index, segment, divisor)
            norms = self._norms(index, None if given else divisor, given)
            values[rows, :2] = norms.to(values.device)
        values = self.path.sum_over_parts(values)
        ratios = self._ratios_of(values, came, counts=divisor is None or bool(divisor.isfinite()))
        self._ratios = [ratios[place.rows].to(place.offsets.device) for place in self._places]

    def _ratios_of(self, values: torch.Tensor, came: torch.Tensor, *, counts: bool) -> torch.Tensor:
        """Return the trust ratios of all slots.

        values: squares of parameters, of directions, and of directions that are the last exact
        ones. came: where the first moment came in few bits. counts: will there be an update?
        """
        self._lengths = torch.where(values[:, 2] > 0, values[:, 2], self._lengths)
        if counts:
            self._exact = {b.index for b in self.path.buckets if b.momentum is None}
        values[:, 1] = torch.where(came & (self._lengths > 0), self._lengths, values[:, 1])
        return trust_ratios(values[:, :2])

    def _norms(self, index: int, divisor: torch.Tensor | None, moments_stay: bool) -> torch.Tensor:
        """Return the squares of a segment's parameters and their directions [parts, 2]."""
        segment = self.segments[index]
        return lamb_moments_(
            segment.main_params,
            segment.main_grads,
            self._moment("exp_avg", index),
            self._moment("exp_avg_sq", index),
            self._places[index].offsets,
            step=self.num_updates,
            betas=self.betas,
            eps=self.eps,
            weight_decay=0.0 if segment.kind == NO_DECAY else self.weight_decay,
            divisor=divisor,
            moments_stay=moments_stay,
            kernels=self.kernels,
        )

    def _update(
        self,
        index: int,
        segment: Segment,
        lr: float,
        weight_decay: float,
        divisor: torch.Tensor | None,
    ) -> None:
        lamb_apply_(
            segment.main_params,
            self._moment("exp_avg", index),
            self._moment("exp_avg_sq", index),
            self._places[index].offsets,
            self._ratios[index],
            step=self.num_updates,
            lr=lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=weight_decay,
            param=segment.low_params,
            divisor=divisor,
            kernels=self.kernels,
        )


class _Place:
    """Where the parameters of a segment are: in it (`offsets`), and among all slots (`rows`).

    What is between two parameters counts to the first: it is padding, and zero.
    """

    def __init__(self, segment: Segment, rows: dict[str, int], device: torch.device) -> None:
        parts = list(segment.parts())
        bounds = [start for _, start, _ in parts] + [stop for _, _, stop in parts[-1:]]
        numbers = [rows[slot.name] for slot, _, _ in parts]
        self.offsets = torch.tensor(bounds or [0], device=segment.main_params.device)
        self.rows = torch.tensor(numbers, dtype=torch.int64, device=device)
