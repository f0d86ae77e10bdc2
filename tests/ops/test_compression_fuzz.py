"""Ten thousand messages of random numbers: what is sent and what is kept is what there was.

Through the library that this machine uses, beside the references, to the bit.
"""

from __future__ import annotations

import random

import pytest
import torch
from test_compression import BF16, FP16, FP32, numbers, on_and_off

from bigtrain.ops.delta import delta_pack_
from bigtrain.ops.message import num_blocks
from bigtrain.ops.quantize import dequantize_mean, quantize_
from bigtrain.ops.signs import sign_pack_, sign_residual, sign_unpack_mean

CPU = torch.device("cpu")
CASES, PARTS = 10_000, 10


def drawn(draw: random.Random, seed: int) -> tuple[torch.Tensor, int, torch.dtype]:
    """Return numbers, a block and the dtype of scales; some with NaN or infinity among them."""
    n = draw.choice([0, 1, 2, 7, 63, 64, 65, draw.randrange(1, 700)])
    x = numbers(n, seed, CPU, draw.choice([FP32, FP32, BF16, FP16]), skip=draw.randrange(3))
    if n and draw.random() < 0.1:
        x[draw.randrange(n)] = draw.choice([float("nan"), float("inf"), -float("inf")])
    return x, draw.choice([64, 128, 256, 1024]), draw.choice([FP32, BF16])


def bad_of(scales: torch.Tensor, n: int, block: int) -> torch.Tensor:
    return scales.isnan().repeat_interleave(block)[:n]


def all_there(
    given: torch.Tensor, sent: torch.Tensor, left: torch.Tensor, bad: torch.Tensor
) -> bool:
    """Is it, but for the rounding of one sum in fp32?"""
    gap = (given.double() - sent.double() - left.double()).abs()
    room = 2.0**-22 * (given.double().abs() + sent.double().abs()) + 2.0**-148
    return bool((gap <= room)[~bad].all())


@pytest.mark.parametrize("part", range(PARTS))
def test_signs_and_codes(part: int) -> None:
    draw = random.Random(part)
    for seed in range(part * CASES // PARTS, (part + 1) * CASES // PARTS):
        x, block, scale_dtype = drawn(draw, seed)
        kept = numbers(x.numel(), seed + 1, CPU)
        kind = draw.choice(["signs", "codes", "deltas"])
        if kind == "signs":
            signs_of(x, kept, block, scale_dtype)
        elif kind == "codes":
            codes_of(x, kept, block, scale_dtype, draw.choice([4, 8]))
        else:
            deltas_of(x, kept, block, scale_dtype, draw.choice([4, 8]))


def signs_of(x: torch.Tensor, kept: torch.Tensor, block: int, scale_dtype: torch.dtype) -> None:
    n = x.numel()

    def pack(x: torch.Tensor, state: torch.Tensor, s: torch.Tensor, **kernels: str) -> object:
        return sign_pack_(x, state, s, block=block, scale_dtype=scale_dtype, **kernels)  # type: ignore[arg-type]

    scales, bits, _, state, s = on_and_off(pack, x, kept, torch.zeros(num_blocks(n, block)))
    sent = sign_unpack_mean(bits[None], scales[None], n, block, weight=1.0)
    left = sign_residual(state, s, block)
    assert all_there(x.float() + kept, sent, left, bad_of(scales, n, block))


def codes_of(
    x: torch.Tensor, kept: torch.Tensor, block: int, scale_dtype: torch.dtype, num_bits: int
) -> None:
    def pack(x: torch.Tensor, residual: torch.Tensor, **kernels: str) -> object:
        return quantize_(
            x,
            residual,
            num_bits=num_bits,
            block=block,
            scale_dtype=scale_dtype,
            **kernels,  # type: ignore[arg-type]
        )

    scales, codes, _, left = on_and_off(pack, x, kept)
    sent = mean_of(codes, scales, x.numel(), num_bits, block)
    assert all_there(x.float() + kept, sent, left, bad_of(scales, x.numel(), block))


def mean_of(
    codes: torch.Tensor, scales: torch.Tensor, n: int, num_bits: int, block: int
) -> torch.Tensor:
    return dequantize_mean(codes[None], scales[None], n, num_bits=num_bits, block=block, weight=1.0)


def deltas_of(
    x: torch.Tensor, replica: torch.Tensor, block: int, scale_dtype: torch.dtype, num_bits: int
) -> None:
    def pack(main: torch.Tensor, replica: torch.Tensor, **kernels: str) -> object:
        return delta_pack_(
            main,
            replica,
            num_bits=num_bits,
            block=block,
            scale_dtype=scale_dtype,
            **kernels,  # type: ignore[arg-type]
        )

    scales, codes, _, moved = on_and_off(pack, x.float(), replica)
    sent = mean_of(codes, scales, x.numel(), num_bits, block)
    assert all_there(moved, replica, sent, bad_of(scales, x.numel(), block))
