"""Adagrad of flat blocks, and of some rows of a table, for the sparse gradients of embeddings.

Source: https://jmlr.org/papers/v12/duchi11a.html. Rows that are not named are not looked at.
"""

from __future__ import annotations

import torch

from bigtrain.ops.flat import (
    LOW,
    check_blocks,
    divided,
    dtype_of,
    quotient,
    root,
    sum_in_lanes,
    write,
)
from bigtrain.ops.library import Library
from bigtrain.ops.op import (
    Kernels,
    Op,
    check_alike,
    check_apart,
    check_dtype,
    check_flat,
    chosen,
    fail,
)


def adagrad_(
    main: torch.Tensor,
    grad: torch.Tensor,
    sum_sq: torch.Tensor,
    *,
    lr: float,
    eps: float = 1e-10,
    weight_decay: float = 0.0,
    param: torch.Tensor | None = None,
    divisor: torch.Tensor | None = None,
    kernels: Kernels = "auto",
) -> None:
    """Do an update of a flat block (see `optimizer`) in place; weight decay is L2.

    sum_sq: fp32, the sum of all squared gradients so far, of every element.

    Raises:
        BigtrainError: arguments that are not flat blocks of one size, or share memory.
    """
    check_blocks("adagrad_", main, grad, param, divisor, sum_sq=sum_sq)
    use = chosen("adagrad_", kernels, main, grad, param)
    (_ADAGRAD if use else _reference)(main, param, grad, sum_sq, divisor, lr, eps, weight_decay)


def _kernel(
    library: Library,
    main: torch.Tensor,
    param: torch.Tensor | None,
    grad: torch.Tensor,
    sum_sq: torch.Tensor,
    divisor: torch.Tensor | None,
    *numbers: float,
) -> None:
    library.call(
        "bt_adagrad",
        main.device,
        *(main.numel(), main, param, dtype_of(param), grad, grad.dtype, sum_sq, divisor),
        *numbers,
    )


def _reference(
    main: torch.Tensor,
    param: torch.Tensor | None,
    grad: torch.Tensor,
    sum_sq: torch.Tensor,
    divisor: torch.Tensor | None,
    lr: float,
    eps: float,
    weight_decay: float,
) -> None:
    g = divided(grad, divisor) + main * weight_decay
    total = sum_sq + g * g
    new = main - g * lr / (root(total) + eps)
    write(divisor, (sum_sq, total), (main, new), (param, new))


_ADAGRAD = Op(
    "adagrad_(Tensor(a!) main, Tensor(b!)? param, Tensor grad, Tensor(c!) sum_sq, "
    "Tensor? divisor, float lr, float eps, float weight_decay) -> ()",
    kernel=_kernel,
    reference=_reference,
)


# -- rows of a table -------------------------------------------------------------------------------


def adagrad_rows_(
    main: torch.Tensor,
    rows: torch.Tensor,
    grad: torch.Tensor,
    sums: torch.Tensor,
    *,
    lr: float,
    eps: float = 1e-10,
    weight_decay: float = 0.0,
    param: torch.Tensor | None = None,
    divisor: torch.Tensor | None = None,
    kernels: Kernels = "auto",
) -> None:
    """Update rows `rows` [k] int64 of the table `main` [num_rows, size] fp32 in place.

    grad: [k, size] fp32, bf16 or fp16, of those rows, which strictly increase (sum up the gradients
    of equal rows first). sums: squares so far, fp32, [num_rows, size], or [num_rows] for the mean
    squares of whole rows. param, divisor: as for the other optimizers.

    Raises:
        BigtrainError: shapes or dtypes that do not fit, rows that do not increase or are outside.
    """
    name = "adagrad_rows_"
    if main.ndim != 2:
        raise fail(name, f"main has shape {tuple(main.shape)}", mend="pass a table [rows, size]")
    per_row = sums.ndim == 1
    check_dtype(name, (torch.float32,), main=main, sums=sums, divisor=divisor)
    check_dtype(name, LOW, grad=grad, param=param)
    check_dtype(name, (torch.int64,), rows=rows)
    check_alike(name, main, rows=rows, grad=grad, sums=sums, param=param, divisor=divisor)
    check_flat(name, main.numel(), main=main, param=param)
    check_flat(name, len(main) if per_row else main.numel(), sums=sums)
    check_flat(name, len(rows), rows=rows)
    check_flat(name, len(rows) * main.shape[1], grad=grad)
    check_flat(name, 1, divisor=divisor)
    check_apart(name, main=main, rows=rows, grad=grad, sums=sums, param=param, divisor=divisor)
    use = chosen(name, kernels, main, grad, param)
    (_ROWS if use else _rows_reference)(
        main, param, rows, grad, sums, divisor, per_row, lr, eps, weight_decay
    )


def _check_rows(name: str, rows: torch.Tensor, num_rows: int) -> None:
    if not len(rows):
        return
    if bool((rows.diff() <= 0).any()):
        raise fail(
            name,
            "rows do not strictly increase",
            why="a row that is named twice would be updated by two threads at once",
            mend="sort them and sum the gradients of equal ones (sparse tensors: coalesce())",
        )
    first, last = int(rows[0]), int(rows[-1])
    if first < 0 or last >= num_rows:
        raise fail(
            name,
            f"rows reach from {first} to {last}, the table has {num_rows}",
            mend="pass numbers of rows of this table",
        )


def _rows_kernel(
    library: Library,
    main: torch.Tensor,
    param: torch.Tensor | None,
    rows: torch.Tensor,
    grad: torch.Tensor,
    sums: torch.Tensor,
    divisor: torch.Tensor | None,
    per_row: bool,
    *numbers: float,
) -> None:
    _check_rows("adagrad_rows_", rows, len(main))
    library.call(
        "bt_adagrad_rows",
        main.device,
        *(len(rows), main.shape[1], rows, main, param, dtype_of(param), grad, grad.dtype),
        *(sums, per_row, divisor, *numbers),
    )


def _rows_reference(
    main: torch.Tensor,
    param: torch.Tensor | None,
    rows: torch.Tensor,
    grad: torch.Tensor,
    sums: torch.Tensor,
    divisor: torch.Tensor | None,
    per_row: bool,
    lr: float,
    eps: float,
    weight_decay: float,
) -> None:
    _check_rows("adagrad_rows_", rows, len(main))
    size = main.shape[1]
    if not len(rows) or not size:
        return
    old, old_sums = main[rows], sums[rows]
    g = divided(grad.view(len(rows), size), divisor) + old * weight_decay
    total = old_sums + (quotient(sum_in_lanes(g * g, 64), float(size)) if per_row else g * g)
    below = root(total)[:, None] if per_row else root(total)
    new, kept = old - g * lr / (below + eps), (old_sums, old)
    write(divisor, (old_sums, total), (old, new))
    sums[rows], main[rows] = kept
    if param is not None:
        own = param.view_as(main)[rows]
        write(divisor, (own, new))
        param.view_as(main)[rows] = own


_ROWS = Op(
    "adagrad_rows_(Tensor(a!) main, Tensor(b!)? param, Tensor rows, Tensor grad, Tensor(c!) sums, "
    "Tensor? divisor, bool per_row, float lr, float eps, float weight_decay) -> ()",
    kernel=_rows_kernel,
    reference=_rows_reference,
)
