"""Muon for hidden matrices, AdamW for all else."""

from __future__ import annotations

from typing import Literal

import torch

from bigtrain.comm.buckets import Segment
from bigtrain.comm.gradient import GradientPath
from bigtrain.errors import BigtrainError
from bigtrain.ops.flat import divided, write
from bigtrain.ops.op import Kernels
from bigtrain.optim.adamw import AdamW
from bigtrain.optim.kinds import MATRIX
from bigtrain.optim.optimizer import Source

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Muon(AdamW):
    """Muon (https://kellerjordan.github.io/posts/muon/): momentum, made nearly orthogonal.

    Of segments of kind MATRIX (see `matrix_kinds`); a parameter of more than two dims is a matrix
    [first dim, all others]. Other segments are updated by AdamW, at `adamw_lr_ratio` times the
    rate. Weight decay is decoupled, and the same for both.

    scale: the length of a step for a matrix [rows, cols]: "match_rms" 0.2 * sqrt(max(rows, cols)),
        about the length of AdamW's steps (https://arxiv.org/abs/2502.16982), or "keller"
        sqrt(max(1, rows / cols)). precision: of Newton-Schulz; "auto" is bf16 on GPUs, else fp32.

    Raises:
        BigtrainError: a matrix of which this rank has a part only; a model without matrices.
    """

    takes_momentum = False  # of matrices it needs gradients

    def __init__(
        self,
        source: Source,
        lr: float = 1e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.1,
        scale: Literal["match_rms", "keller"] = "match_rms",
        num_iterations: int = 5,
        precision: Literal["auto", "fp32", "bf16"] = "auto",
        adamw_lr_ratio: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        kernels: Kernels = "auto",
    ) -> None:
        super().__init__(source, lr, betas, eps, weight_decay, kernels)
        self.momentum, self.nesterov = momentum, nesterov
        self.scale, self.num_iterations, self.precision = scale, num_iterations, precision
        self.adamw_lr_ratio = adamw_lr_ratio
        self._add_moment("momentum")
        _check_matrices(source, self.segments)

    def _keeps(self, name: str, kind: str) -> bool:
        return (name == "momentum") == (kind == MATRIX)

    def _update(
        self,
        index: int,
        segment: Segment,
        lr: float,
        weight_decay: float,
        divisor: torch.Tensor | None,
    ) -> None:
        if segment.kind != MATRIX:
            super()._update(index, segment, lr * self.adamw_lr_ratio, weight_decay, divisor)
            return
        for slot, start, stop in segment.parts():
            self._update_matrix(
                slot.shard.local_shape[0],
                segment.main_params[start:stop],
                segment.main_grads[start:stop],
                self._moment("momentum", index)[start:stop],
                None if segment.low_params is None else segment.low_params[start:stop],
                lr,
                weight_decay,
                divisor,
            )

    def _update_matrix(
        self,
        rows: int,
        main: torch.Tensor,
        grad: torch.Tensor,
        momentum: torch.Tensor,
        low: torch.Tensor | None,
        lr: float,
        weight_decay: float,
        divisor: torch.Tensor | None,
    ) -> None:
        """Update one matrix of `rows` rows, given as flat tensors."""
        g = divided(grad, divisor)
        moved = momentum.lerp(g, 1 - self.momentum)
        direction = (g.lerp(moved, self.momentum) if self.nesterov else moved).view(rows, -1)
        low_precision = self.precision == "bf16" or (self.precision == "auto" and main.is_cuda)
        dtype = torch.bfloat16 if low_precision else torch.float32
        step = orthogonalize(direction.to(dtype), self.num_iterations).float().flatten()
        length = lr * self._scale(rows, main.numel() // rows)
        new = main * (1 - lr * weight_decay) - step * length
        write(divisor, (momentum, moved), (main, new), (low, new))

    def _scale(self, rows: int, cols: int) -> float:
        if self.scale == "keller":
            return float(max(1.0, rows / cols) ** 0.5)
        return float(0.2 * max(rows, cols) ** 0.5)


def orthogonalize(matrix: torch.Tensor, num_iterations: int = 5, eps: float = 1e-7) -> torch.Tensor:
    """Return about U V^T of the matrix U S V^T [rows, cols], by Newton-Schulz, in its dtype.

    The coefficients are steep at zero and do not converge: singular values become 0.7 to 1.2.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix  # so that the products below are of the smaller side
    x = x / x.norm().clamp(min=eps)
    for _ in range(num_iterations):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def _check_matrices(source: Source, segments: list[Segment]) -> None:
    for segment in segments:
        for slot, start, stop in segment.parts() if segment.kind == MATRIX else ():
            shard = slot.shard
            if shard.local_shape != shard.shape or stop - start != slot.stop - slot.start:
                raise BigtrainError(
                    f"Muon: this rank has only a part of {slot.name} {list(shard.shape)}",
                    why="Newton-Schulz needs whole matrices",
                    mend="use another optimizer with tensor parallelism, or leave this parameter "
                    "to AdamW (kind_of, optimizer.exclude)",
                )
    if not isinstance(source, GradientPath) or any(a.degree > 1 for a in source.model_axes):
        return  # a stage of a pipeline may have none
    if all(slot.kind != MATRIX for slot in source.slots):
        raise BigtrainError(
            "Muon: none of the parameters is a matrix for it",
            why="it would do nothing, and AdamW everything: the kinds of parameters do not mark "
            "any, or all are excluded",
            mend="build the path with kind_of=matrix_kinds(model), exclude fewer names "
            "(optimizer.exclude), or use AdamW",
        )
