"""Compression: the same bits in every library, what they mean in fp64, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from bigtrain.errors import BigtrainError
from bigtrain.ops.delta import delta_apply_, delta_pack_
from bigtrain.ops.library import Library
from bigtrain.ops.message import num_blocks, num_bytes
from bigtrain.ops.quantize import dequantize_mean, quantize_
from bigtrain.ops.signs import sign_pack_, sign_residual, sign_unpack_mean

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# The last but one has a block larger than what a CUDA block has in shared memory.
SIZES = [0, 1, 7, 63, 64, 65, 1000, 5000, 9001, 100_003]
BLOCKS = [64, 128, 1024, 4096, 8256]
SMALLEST = 2.0**-149
SPECIAL = [0.0, -0.0, 1e-40, -1e-45, 3e-39, 1e-20, -65504.0, 1.0]


def blocks_of(library: Library, n: int) -> list[int]:
    """Return the blocks to try, of which the emulation gets few where n is large."""
    if library.target != "emulated":
        return BLOCKS
    if n > 10_000:
        pytest.skip("too slow in the emulation")
    return [8256] if n > 5000 else [block for block in BLOCKS if block <= max(2 * n, 128)][-3:]


def numbers(
    n: int, seed: int, device: torch.device, dtype: torch.dtype = FP32, skip: int = 0
) -> torch.Tensor:
    """Random numbers of many sizes, and special ones, from element `skip` of their memory on.

    Whole blocks of them are zeros, minus zeros or denormal.
    """
    draw = torch.Generator().manual_seed(seed)
    powers = torch.randint(-3, 2, (n + skip,), generator=draw).float()
    x = torch.randn(n + skip, generator=draw) * 10**powers
    special = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), x.shape, generator=draw)]
    x = torch.where(torch.rand(x.shape, generator=draw) < 0.02, special, x)
    x[skip + 128 : skip + 192] = 0.0
    x[skip + 192 : skip + 256] = -0.0
    x[skip + 256 : skip + 320] *= 1e-42
    x[skip + 320 : skip + 384] = 10 * SMALLEST  # of which a seventh is rounded down by much
    x[skip + 384 : skip + 448] = -180 * SMALLEST
    return x.to(dtype).to(device)[skip:]


def like(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy that begins as far into its memory."""
    skip = tensor.storage_offset()
    memory = torch.zeros(skip + tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    return memory[skip:].copy_(tensor)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype == torch.uint8:
        return torch.equal(one, other)
    same = (one == other) & (torch.signbit(one) == torch.signbit(other))
    return one.shape == other.shape and bool((same | one.isnan() & other.isnan()).all())


def on_and_off(call: Callable[..., Any], *tensors: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """Return what `call(*tensors, kernels=...)` returns, and the tensors after it.

    All of it must be the same with kernels and without.
    """
    results = []
    for kernels in ("on", "off"):
        own = [None if tensor is None else like(tensor) for tensor in tensors]
        returned = call(*own, kernels=kernels)
        returned = returned if isinstance(returned, tuple) else (returned,)
        results.append([tensor for tensor in (*returned, *own) if tensor is not None])
    for number, (ours, reference) in enumerate(zip(*results, strict=True)):
        assert same_bits(ours, reference), f"result {number}"
    return tuple(results[0])


def message(
    num_sources: int, n: int, num_bits: int, block: int, scale_dtype: torch.dtype, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random bytes and scales of several sources, as odd views of one message a source."""
    draw = torch.Generator().manual_seed(seed)
    size = scale_dtype.itemsize
    before, scales = 8, size * num_blocks(n, block)
    row = before + scales + num_bytes(n, num_bits) + 5
    buffer = torch.randint(256, (num_sources, row + -row % size), generator=draw, dtype=torch.uint8)
    view = buffer[:, before : before + scales].view(scale_dtype)
    view.copy_(torch.rand(view.shape, generator=draw))
    first = before + scales + 1
    return buffer[:, first : first + num_bytes(n, num_bits)], view


# -- the same bits ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mean_abs", [False, True])
@pytest.mark.parametrize(
    ("dtype", "scale_dtype"), [(FP32, FP32), (BF16, BF16), (FP16, FP32)], ids=str
)
@pytest.mark.parametrize("n", SIZES)
def test_sign_pack_bits(
    library: Library,
    device: torch.device,
    n: int,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    mean_abs: bool,
) -> None:
    for block in blocks_of(library, n):
        pack = partial(sign_pack_, block=block, mean_abs=mean_abs, scale_dtype=scale_dtype)
        x = numbers(n, 1, device, dtype, n % 2)
        state = numbers(n, 2, device, skip=n % 2)
        s = numbers(num_blocks(n, block), 3, device).abs()
        for _ in range(2):
            *_, state, s = on_and_off(pack, x, state, s)
        on_and_off(partial(sign_residual, block=block), state, s)


@pytest.mark.parametrize("scale_dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("num_sources", [0, 1, 3])
@pytest.mark.parametrize("n", SIZES)
def test_sign_unpack_mean_bits(
    library: Library, device: torch.device, n: int, num_sources: int, scale_dtype: torch.dtype
) -> None:
    for block in blocks_of(library, n):
        bits, scales = (t.to(device) for t in message(num_sources, n, 1, block, scale_dtype, n))
        for weight in (None, 0.3):
            on_and_off(partial(sign_unpack_mean, bits, scales, n, block, weight=weight))


@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize(
    ("dtype", "scale_dtype"), [(FP32, FP32), (BF16, BF16), (FP16, FP32)], ids=str
)
@pytest.mark.parametrize("n", SIZES)
def test_quantize_bits(
    library: Library,
    device: torch.device,
    n: int,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    num_bits: int,
) -> None:
    for block in blocks_of(library, n):
        x = numbers(n, 1, device, dtype, n % 2)
        quantize = partial(quantize_, num_bits=num_bits, block=block, scale_dtype=scale_dtype)
        for residual in (None, numbers(n, 2, device, skip=n % 2)):
            on_and_off(quantize, x, residual)


@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize(("scale_dtype", "out_dtype"), [(FP32, BF16), (BF16, FP32)], ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_dequantize_mean_bits(
    library: Library,
    device: torch.device,
    n: int,
    num_bits: int,
    scale_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> None:
    for block in blocks_of(library, n):
        for num_sources in (0, 1, 3):
            sent = message(num_sources, n, num_bits, block, scale_dtype, n)
            codes, scales = (t.to(device) for t in sent)
            how: dict[str, Any] = {"num_bits": num_bits, "block": block, "out_dtype": out_dtype}
            on_and_off(partial(dequantize_mean, codes, scales, n, **how))


@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize(
    ("dtype", "scale_dtype"), [(FP32, BF16), (BF16, FP32), (FP16, FP32)], ids=str
)
@pytest.mark.parametrize("n", SIZES)
def test_delta_bits(
    library: Library,
    device: torch.device,
    n: int,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    num_bits: int,
) -> None:
    for block in blocks_of(library, n):
        main = numbers(n, 1, device, skip=n % 2)
        start = numbers(n, 2, device, dtype, n % 2)
        how: dict[str, Any] = {"num_bits": num_bits, "block": block}
        pack = partial(delta_pack_, **how, scale_dtype=scale_dtype)
        scales, codes, _, sender = on_and_off(pack, main, start)
        receiver, *_ = on_and_off(partial(delta_apply_, **how), start, scales, codes)
        assert same_bits(sender, receiver)


class OneBadElement:
    """Blocks of which one has a number that makes its scale not finite."""

    n, block = 500, 64

    def __init__(self, bad: float, place: int, device: torch.device) -> None:
        self.clean = torch.randn(self.n, device=device)
        self.x = self.clean.clone()
        self.x[place] = bad
        self.kept = torch.randn(self.n, device=device)
        self.b = place // self.block
        self.bad_blocks = torch.arange(num_blocks(self.n, self.block), device=device) == self.b
        self.bad = self.bad_blocks.repeat_interleave(self.block)[: self.n]

    def stays(self, data: torch.Tensor, num_bits: int, scales: torch.Tensor) -> None:
        assert torch.equal(scales.isnan(), self.bad_blocks)
        size = self.block * num_bits // 8
        assert not data[self.b * size : (self.b + 1) * size].any()


@pytest.mark.parametrize("place", [0, 130, 499])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 3e38])
@pytest.mark.parametrize("scale_dtype", [FP32, BF16], ids=str)
def test_signs_of_a_bad_block(
    library: Library, device: torch.device, bad: float, place: int, scale_dtype: torch.dtype
) -> None:
    it = OneBadElement(bad, place, device)
    kept_s = torch.rand(len(it.bad_blocks), device=device)
    pack = partial(sign_pack_, block=it.block, scale_dtype=scale_dtype)
    scales, bits, _, v, s = on_and_off(pack, it.x, it.kept, kept_s)
    it.stays(bits, 1, scales)
    clean_scales, _, _, clean_v, clean_s = on_and_off(pack, it.clean, it.kept, kept_s)
    assert torch.equal(v, torch.where(it.bad, it.kept, clean_v))
    assert torch.equal(s, torch.where(it.bad_blocks, kept_s, clean_s))
    assert same_bits(scales, torch.where(it.bad_blocks, torch.nan, clean_scales))
    mean = partial(sign_unpack_mean, bits[None], scales[None], it.n, it.block)
    assert torch.equal(on_and_off(mean)[0].isnan(), it.bad)


@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize("place", [0, 130, 499])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_codes_of_a_bad_block(
    library: Library, device: torch.device, bad: float, place: int, num_bits: int
) -> None:
    it = OneBadElement(bad, place, device)
    how: dict[str, Any] = {"num_bits": num_bits, "block": it.block}
    scales, codes, _, residual = on_and_off(partial(quantize_, **how), it.x, it.kept)
    it.stays(codes, num_bits, scales)
    *_, clean = on_and_off(partial(quantize_, **how), it.clean, it.kept)
    assert torch.equal(residual, torch.where(it.bad, it.kept, clean))
    mean = partial(dequantize_mean, codes[None], scales[None], it.n, **how)
    assert torch.equal(on_and_off(mean)[0].isnan(), it.bad)

    replica = it.kept.bfloat16()
    scales, codes, _, moved = on_and_off(partial(delta_pack_, **how), it.x, replica)
    it.stays(codes, num_bits, scales)
    assert torch.equal(moved[it.bad], replica[it.bad])
    assert not torch.equal(moved[~it.bad], replica[~it.bad])
    received, *_ = on_and_off(partial(delta_apply_, **how), replica, scales, codes)
    assert torch.equal(received, moved)


# -- what they mean --------------------------------------------------------------------------------


def decoded(scales: torch.Tensor, bits: torch.Tensor, n: int, block: int) -> torch.Tensor:
    """Return +-scale in fp64, element by element."""
    place = torch.arange(n)
    minus = (bits.cpu()[place // 8] >> (place % 8)) & 1
    return (1 - 2 * minus.double()) * scales.cpu().double()[place // block]


@pytest.mark.parametrize("mean_abs", [False, True])
def test_signs_and_residual_are_what_went_in(
    library: Library, device: torch.device, mean_abs: bool
) -> None:
    n, block = 1000, 128
    state, s = torch.zeros(n, device=device), torch.zeros(num_blocks(n, block), device=device)
    sent = torch.zeros(n, dtype=torch.float64)
    given = torch.zeros(n, dtype=torch.float64)
    for step in range(20):
        x = numbers(n, step, device).clamp(-10, 10)
        before = sign_residual(state, s, block).cpu().double()
        scales, bits = sign_pack_(x, state, s, block=block, mean_abs=mean_abs)
        v = x.cpu().double() + before
        for b, part in enumerate(v.split(block)):
            want = part.abs().mean() if mean_abs else part.square().mean().sqrt()
            assert scales[b].item() == pytest.approx(want.item(), rel=1e-5)
        now = decoded(scales, bits, n, block)
        after = sign_residual(state, s, block).cpu().double()
        torch.testing.assert_close(now + after, v, rtol=1e-5, atol=1e-5)
        unpacked = sign_unpack_mean(bits[None], scales[None], n, block)
        assert torch.equal(unpacked.cpu().double(), now)
        sent, given = sent + now, given + x.cpu().double()
    torch.testing.assert_close(sent, given - after, rtol=1e-4, atol=1e-4)


def test_state_is_restored_from_a_residual(library: Library, device: torch.device) -> None:
    n, block = 300, 64
    state, s = numbers(n, 1, device), numbers(5, 2, device).abs()
    residual = sign_residual(state, s, block)
    restored = [residual.clone(), torch.zeros_like(s)]
    assert torch.equal(sign_residual(*restored, block), residual)
    x = numbers(n, 3, device)
    one = sign_pack_(x, state, s, block=block)
    other = sign_pack_(x, *restored, block=block)
    for got, want in zip((*other, *restored), (*one, state, s), strict=True):
        assert same_bits(got, want)


@pytest.mark.parametrize("num_bits", [4, 8])
def test_quantise_error(library: Library, device: torch.device, num_bits: int) -> None:
    n, block = 1000, 64
    given, sent = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    residual = torch.zeros(n, device=device)
    how: dict[str, Any] = {"num_bits": num_bits, "block": block}
    for step in range(20):
        x = torch.randn(n, generator=torch.Generator().manual_seed(step)).to(device)
        v = x.cpu().double() + residual.cpu().double()
        scales, codes = quantize_(x, residual, **how)
        out = dequantize_mean(codes[None], scales[None], n, **how).cpu().double()
        s = scales.cpu().double().repeat_interleave(block)[:n]
        assert ((v - out).abs() <= s / 2 * (1 + 1e-5)).all()
        torch.testing.assert_close(out + residual.cpu().double(), v, rtol=1e-6, atol=1e-6)
        given, sent = given + x.cpu().double(), sent + out
    torch.testing.assert_close(sent, given - residual.cpu().double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("num_bits", [4, 8])
def test_replicas_stay_equal_and_follow(
    library: Library, device: torch.device, num_bits: int, dtype: torch.dtype
) -> None:
    n, block = 500, 64
    main = torch.randn(n, generator=torch.Generator().manual_seed(1)).to(device)
    sender, receiver = (torch.zeros(n, dtype=dtype, device=device) for _ in range(2))
    how: dict[str, Any] = {"num_bits": num_bits, "block": block}
    for _ in range(15):
        delta_apply_(receiver, *delta_pack_(main, sender, **how, scale_dtype=BF16), **how)
        assert torch.equal(sender, receiver)
    # What is lost when the largest of a block are rounded to bf16 is sent again and again: it keeps
    # the scale large.
    close = {"rtol": 0, "atol": 1e-6 if dtype == FP32 else main.abs().max().item() * 2**-8}
    torch.testing.assert_close(sender.float(), main, **close)


def test_mean_of_sources(library: Library, device: torch.device) -> None:
    n, block, sources = 200, 64, 8
    bits, scales = (t.to(device) for t in message(sources, n, 1, block, FP32, 1))
    want = torch.stack([decoded(*pair, n, block) for pair in zip(scales, bits, strict=True)])
    got = sign_unpack_mean(bits, scales, n, block)
    torch.testing.assert_close(got.cpu().double(), want.mean(0), rtol=1e-5, atol=1e-6)
    weighted = sign_unpack_mean(bits, scales, n, block, weight=2.0)
    torch.testing.assert_close(weighted.cpu().double(), 2 * want.sum(0), rtol=1e-5, atol=1e-5)


def test_results_go_into_a_message(library: Library, device: torch.device) -> None:
    n, block = 333, 64
    x = numbers(n, 1, device)
    buffer = torch.full((400,), 255, dtype=torch.uint8, device=device)
    out = buffer[8:20].view(BF16), buffer[21 : 21 + num_bytes(n, 1)]
    kept = [(torch.zeros(n, device=device), torch.zeros(6, device=device)) for _ in range(2)]
    given = sign_pack_(x, *kept[0], block=block, scale_dtype=BF16, out=out)
    assert all(one is other for one, other in zip(given, out, strict=True))
    for got, want in zip(out, sign_pack_(x, *kept[1], block=block, scale_dtype=BF16), strict=True):
        assert same_bits(got, want)
    assert (buffer[:8] == 255).all()
    assert buffer[20] == 255
    assert (buffer[21 + num_bytes(n, 1) :] == 255).all()


def test_streaming_stores_and_threads_give_the_same(library: Library, device: torch.device) -> None:
    if library.target == "emulated":
        pytest.skip("too slow in the emulation")
    n, block, before = (4 << 20) + 77, 1024, torch.get_num_threads()
    bits = torch.randint(256, (2, num_bytes(n, 1)), dtype=torch.uint8, device=device)
    scales = torch.rand(2, num_blocks(n, block), device=device)
    torch.set_num_threads(2)
    try:
        whole = sign_unpack_mean(bits, scales, n, block, kernels="on")
    finally:
        torch.set_num_threads(before)
    part = (1 << 20) + 1024 * 3
    out = torch.empty(part + 1, device=device)[1:]
    sign_unpack_mean(bits[:, : part // 8], scales[:, : part // block], part, block, out=out)
    assert torch.equal(whole[:part], out)
    end = n - 77 - 1024
    last = sign_unpack_mean(bits[:, end // 8 :], scales[:, end // block :], n - end, block)
    assert torch.equal(whole[end:], last)


# -- arguments -------------------------------------------------------------------------------------


def z(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def u(*shape: int) -> torch.Tensor:
    return z(*shape, dtype=torch.uint8)


def shared(call: Callable[[torch.Tensor], Any]) -> Any:
    return call(z(128))


Q: dict[str, Any] = {"num_bits": 4, "block": 64}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "block": (lambda: sign_pack_(z(64), z(64), z(1), block=100), "block is 100"),
    "no block": (lambda: sign_residual(z(64), z(1), 0), "block is 0"),
    "x dtype": (
        lambda: sign_pack_(z(64, dtype=torch.float64), z(64), z(1), block=64),
        "x is torch.float64",
    ),
    "state dtype": (
        lambda: sign_pack_(z(64), z(64, dtype=BF16), z(1), block=64),
        "state is torch.bfloat16",
    ),
    "state size": (lambda: sign_pack_(z(64), z(63), z(1), block=64), "state has 63 elements"),
    "scales size": (lambda: sign_pack_(z(65), z(65), z(1), block=64), "state_scales has 1"),
    "strided": (lambda: sign_pack_(z(64, 2)[:, 0], z(64), z(1), block=64), "x is not contiguous"),
    "device": (
        lambda: sign_pack_(z(64), torch.zeros(64, device="meta"), z(1), block=64),
        "state is on meta",
    ),
    "overlap": (
        lambda: shared(lambda m: sign_pack_(m[:64], m[32:96], z(1), block=64)),
        "x and state share memory",
    ),
    "scale_dtype": (
        lambda: sign_pack_(z(64), z(64), z(1), block=64, scale_dtype=FP16),
        "scale_dtype is torch.float16",
    ),
    "out scales": (
        lambda: sign_pack_(z(64), z(64), z(1), block=64, out=(z(1, dtype=BF16), u(8))),
        "out has torch.bfloat16 scales",
    ),
    "out bits": (
        lambda: sign_pack_(z(64), z(64), z(1), block=64, out=(z(1), u(9))),
        "bits has 9 elements",
    ),
    "kernels": (
        lambda: sign_pack_(z(64), z(64), z(1), block=64, kernels="maybe"),
        "kernels='maybe'",
    ),
    "rows": (lambda: sign_unpack_mean(u(2, 7), z(2, 1), 64, 64), "bits has shape [2, 7]"),
    "flat rows": (lambda: sign_unpack_mean(u(8), z(1), 64, 64), "bits has shape [8]"),
    "sources": (lambda: sign_unpack_mean(u(2, 8), z(3, 1), 64, 64), "bits has 2 rows, scales 3"),
    "strided rows": (
        lambda: sign_unpack_mean(u(8, 2).T, z(2, 1), 64, 64),
        "the rows of bits are not contiguous",
    ),
    "negative n": (lambda: sign_unpack_mean(u(1, 0), z(1, 0), -1, 64), "n is -1"),
    "bits dtype": (lambda: sign_unpack_mean(z(1, 8), z(1, 1), 64, 64), "bits is torch.float32"),
    "out dtype": (
        lambda: sign_unpack_mean(u(1, 8), z(1, 1), 64, 64, out=z(64, dtype=BF16)),
        "out is torch.bfloat16",
    ),
    "out in message": (
        lambda: shared(
            lambda m: sign_unpack_mean(m.view(torch.uint8)[None, :8], z(1, 1), 64, 64, out=m[:64])
        ),
        "share memory",
    ),
    "num_bits": (lambda: quantize_(z(64), None, num_bits=5, block=64), "num_bits is 5"),
    "residual": (lambda: quantize_(z(64), z(65), **Q), "residual has 65 elements"),
    "codes": (lambda: dequantize_mean(u(1, 31), z(1, 1), 64, **Q), "codes has shape [1, 31]"),
    "mean dtype": (
        lambda: dequantize_mean(u(1, 32), z(1, 1), 64, **Q, out_dtype=torch.float64),
        "out is torch.float64",
    ),
    "main": (lambda: delta_pack_(z(64, dtype=BF16), z(64), **Q), "main is torch.bfloat16"),
    "replica": (
        lambda: delta_pack_(z(64), z(64, dtype=torch.float64), **Q),
        "replica is torch.float64",
    ),
    "apply codes": (lambda: delta_apply_(z(64), z(1), u(31), **Q), "codes has 31 elements"),
    "apply scales": (lambda: delta_apply_(z(64), z(1, dtype=FP16), u(32), **Q), "scales is"),
    "apply overlap": (
        lambda: shared(lambda m: delta_apply_(m[:64], z(1), m.view(torch.uint8)[:32], **Q)),
        "share memory",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    call, what = REFUSED[case]
    with pytest.raises(BigtrainError) as error:
        call()
    assert what in str(error.value)


def test_registered_operations(library: Library, device: torch.device) -> None:
    ops = torch.ops.bigtrain
    n, block, scales, bits = 100, 64, z(2).to(device), u(13).to(device)
    x, kept, codes = torch.randn(n, device=device), z(n).to(device), u(50).to(device)
    rows = bits[None], scales[None]
    for op, arguments in (
        (ops.sign_pack_, (x, kept, z(2).to(device), scales, bits, block, True)),
        (ops.sign_residual, (x, scales, kept, block)),
        (ops.sign_unpack_mean, (*rows, kept, block, 0.5)),
        (ops.quantize_, (x, kept, scales, codes, 4, block)),
        (ops.quantize_, (x, None, scales, codes, 4, block)),
        (ops.dequantize_mean, (codes[None], scales[None], kept, 4, block, 0.5)),
        (ops.delta_pack_, (x, kept, scales, codes, 4, block)),
        (ops.delta_apply_, (kept, scales, codes, 4, block)),
    ):
        torch.library.opcheck(op.default, arguments)
