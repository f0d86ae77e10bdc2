"""What kernels.py measures: for each kernel the same work by bigtrain and by what else there is.

A system is a function of a case's tensors, called by keyword. What it returns is compared with what
ours returns. In-place systems keep changing their tensors; no number leaves the normal range.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from bigtrain.ops.activations import bias_gelu, swiglu
from bigtrain.ops.adagrad import adagrad_, adagrad_rows_
from bigtrain.ops.cross_entropy import cross_entropy
from bigtrain.ops.delta import delta_apply_, delta_pack_
from bigtrain.ops.dropout import bias_dropout_residual
from bigtrain.ops.grad_norm import grad_norm, unscale_
from bigtrain.ops.lamb import lamb_
from bigtrain.ops.lion import lion_
from bigtrain.ops.norms import layer_norm, rms_norm
from bigtrain.ops.optimizer import adamw_, sgd_
from bigtrain.ops.quantize import dequantize_mean, quantize_
from bigtrain.ops.rotary import rotary
from bigtrain.ops.signs import sign_pack_, sign_unpack_mean
from bigtrain.ops.softmax import masked_softmax

System = Callable[..., Any]
Inputs = dict[str, Any]

FP32, BF16 = torch.float32, torch.bfloat16
NAMES = {FP32: "fp32", BF16: "bf16"}


class Setting(NamedTuple):
    device: str
    numel: int  # of flat blocks
    compiles: bool


@dataclass(frozen=True)
class Case:
    group: str
    name: str
    bytes: float  # that an ideal implementation moves for each element
    inputs: Callable[[Setting], Inputs]
    ours: System
    peers: Mapping[str, System]
    compiled: Mapping[str, System] = field(default_factory=dict)  # by torch.compile, if wanted
    liger: System | None = None
    size: int = 0  # elements; 0: of a flat block
    direction: str = "call"  # forward: the same; backward; both
    compared: bool = True

    def elements(self, setting: Setting) -> int:
        return self.size or setting.numel

    def systems(self, setting: Setting) -> dict[str, System]:
        """Return what is measured: ours, then its peers."""
        found = {"ours": self.ours, **self.peers}
        if setting.device == "cuda":
            found = {name: it for name, it in found.items() if not name.startswith("numpy")}
            if self.liger is not None and importlib.util.find_spec("liger_kernel"):
                found["liger"] = self.liger
        if setting.compiles:
            import torch._functorch.config

            torch._dynamo.reset()
            torch._functorch.config.donated_buffer = False  # graphs are kept
            for name, system in self.compiled.items():
                found[f"{name}, compiled"] = torch.compile(system, dynamic=False)
        return found

    def bind(self, system: System, setting: Setting) -> Callable[[], Any]:
        """Return a call of `system` on tensors of its own, the same numbers for every system."""
        torch.manual_seed(0)
        with torch.device(setting.device):
            inputs = self.inputs(setting)
        if self.direction in ("call", "forward"):
            return lambda: system(**inputs)
        wanted = [t for t in inputs.values() if isinstance(t, torch.Tensor) and t.requires_grad]
        outputs = listed(system(**inputs))
        torch.manual_seed(1)
        grads = [random_like(out) if out.ndim else torch.ones_like(out) for out in outputs]
        if self.direction == "backward":
            return lambda: torch.autograd.grad(outputs, wanted, grads, retain_graph=True)
        return lambda: torch.autograd.grad(listed(system(**inputs)), wanted, grads)


def listed(outputs: Any) -> list[torch.Tensor]:
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


def random_like(out: torch.Tensor) -> torch.Tensor:
    """Return the same numbers for every memory layout."""
    return torch.empty_like(out).copy_(torch.randn(out.shape))


# -- optimizers ------------------------------------------------------------------------------------

LR, BETAS, EPS, DECAY, CLIP, MOMENTUM = 1e-3, (0.9, 0.95), 1e-8, 0.1, 1.0, 0.9
ADAM = {"step": 1, "lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}
FUSED = {
    **{"lr": LR, "beta1": BETAS[0], "beta2": BETAS[1], "eps": EPS, "weight_decay": DECAY},
    **{"amsgrad": False, "maximize": False},
}
MANY, EACH = 400, 10_000  # small tensors, and their elements
LAYERS = 64  # tensors of LAMB
TABLE, TOUCHED, WIDTH = 1_000_000, 100_000, 64  # rows of an embedding


def block(setting: Setting, size: int = 0, dtype: torch.dtype = FP32) -> Inputs:
    """Return a flat block in the middle of training."""
    n = size or setting.numel
    return {
        "main": torch.randn(n) * 1e-3,
        "grad": torch.randn(n).to(dtype),
        "exp_avg": torch.randn(n),
        "exp_avg_sq": torch.rand(n) + 0.1,
        "step": torch.tensor(1.0),
    }


def adamw_ours(main: Any, grad: Any, exp_avg: Any, exp_avg_sq: Any, **_: Any) -> Any:
    adamw_(main, grad, exp_avg, exp_avg_sq, **ADAM, kernels="on")
    return main


def adamw_fused(
    main: Any, grad: Any, exp_avg: Any, exp_avg_sq: Any, step: Any, **scaling: Any
) -> Any:
    blocks = ([main], [grad], [exp_avg], [exp_avg_sq], [], [step])
    torch._fused_adamw_(*blocks, **FUSED, **scaling)
    return main


def adamw_by_hand(main: Any, grad: Any, exp_avg: Any, exp_avg_sq: Any, **_: Any) -> Any:
    exp_avg.lerp_(grad, 1 - BETAS[0])
    exp_avg_sq.mul_(BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1])
    below = exp_avg_sq.sqrt().div_((1 - BETAS[1]) ** 0.5).add_(EPS)
    return main.mul_(1 - LR * DECAY).addcdiv_(exp_avg, below, value=-LR / (1 - BETAS[0]))


def mixed_block(setting: Setting) -> Inputs:
    more = {"param": torch.zeros(setting.numel, dtype=BF16), "wide": torch.zeros(setting.numel)}
    return {**block(setting, dtype=BF16), **more, "found_inf": torch.tensor(0.0)}


def step_ours(main: Any, param: Any, grad: Any, exp_avg: Any, exp_avg_sq: Any, **_: Any) -> Any:
    norm = grad_norm([grad], kernels="on").squares.sqrt()
    divisor = ((norm + 1e-6) / CLIP).clamp(min=1.0).float()
    moments = (exp_avg, exp_avg_sq)
    adamw_(main, grad, *moments, **ADAM, param=param, divisor=divisor, kernels="on")
    return main, param


def step_torch(
    main: Any, param: Any, grad: Any, wide: Any, found_inf: Any, adamw: System, **moments: Any
) -> Any:
    wide.copy_(grad)
    norm = torch.linalg.vector_norm(wide)
    wide.mul_((CLIP / (norm + 1e-6)).clamp(max=1.0))
    adamw(main=main, grad=wide, **moments)
    return main, param.copy_(main)


def step_scaled(main: Any, param: Any, grad: Any, wide: Any, found_inf: Any, **moments: Any) -> Any:
    """The fused kernel divides by the norm itself, as for loss scaling."""
    wide.copy_(grad)
    divisor = ((torch.linalg.vector_norm(wide) + 1e-6) / CLIP).clamp(min=1.0)
    adamw_fused(main, wide, **moments, grad_scale=divisor, found_inf=found_inf)
    return main, param.copy_(main)


def many_tensors(setting: Setting) -> Inputs:
    """A new block, and as many elements in small tensors that torch's optimizers update."""
    inputs = block(setting, MANY * EACH)
    for name in ("exp_avg", "exp_avg_sq"):
        inputs[name].zero_()
    pairs = zip(inputs["main"].split(EACH), inputs["grad"].split(EACH), strict=True)
    tensors = []
    for value, grad in pairs:
        tensors.append(torch.nn.Parameter(value.clone()))
        tensors[-1].grad = grad.clone()
    options = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}
    for kind in ("fused", "foreach"):
        inputs[kind] = torch.optim.AdamW(tensors, **options, **{kind: True})
    return {**inputs, "tensors": tensors}


def step_of(kind: str, tensors: Any, **inputs: Any) -> Any:
    inputs[kind].step()
    return tensors


def sgd_ours(main: Any, grad: Any, exp_avg: Any, **_: Any) -> Any:
    sgd_(main, grad, exp_avg, lr=LR, momentum=MOMENTUM, weight_decay=DECAY, kernels="on")
    return main


def sgd_fused(main: Any, grad: Any, exp_avg: Any, **_: Any) -> Any:
    flags = {"nesterov": False, "maximize": False, "is_first_step": False}
    numbers = {"weight_decay": DECAY, "momentum": MOMENTUM, "lr": LR, "dampening": 0.0}
    torch._fused_sgd_([main], [grad], [exp_avg], **numbers, **flags)
    return main


def sgd_by_hand(main: Any, grad: Any, exp_avg: Any, **_: Any) -> Any:
    exp_avg.mul_(MOMENTUM).add_(grad + DECAY * main)
    return main.sub_(LR * exp_avg)


def lion_ours(main: Any, grad: Any, exp_avg: Any, **_: Any) -> Any:
    lion_(main, grad, exp_avg, lr=LR, betas=BETAS, weight_decay=DECAY, kernels="on")
    return main


def lion_by_hand(main: Any, grad: Any, exp_avg: Any, **_: Any) -> Any:
    direction = exp_avg.lerp(grad, 1 - BETAS[0]).sign_()
    exp_avg.lerp_(grad, 1 - BETAS[1])
    return main.mul_(1 - LR * DECAY).sub_(direction, alpha=LR)


def dense_adagrad_ours(main: Any, grad: Any, exp_avg_sq: Any, **_: Any) -> Any:
    adagrad_(main, grad, exp_avg_sq, lr=LR, eps=EPS, kernels="on")
    return main


def dense_adagrad_fused(main: Any, grad: Any, exp_avg_sq: Any, step: Any, **_: Any) -> Any:
    numbers = {"lr": LR, "lr_decay": 0.0, "weight_decay": 0.0, "eps": EPS, "maximize": False}
    torch._fused_adagrad_([main], [grad], [exp_avg_sq], [step], **numbers)
    return main


def dense_adagrad_by_hand(main: Any, grad: Any, exp_avg_sq: Any, **_: Any) -> Any:
    exp_avg_sq.addcmul_(grad, grad)
    return main.addcdiv_(grad, exp_avg_sq.sqrt().add_(EPS), value=-LR)


def layers(setting: Setting) -> Inputs:
    """A block, and the same memory as LAYERS tensors."""
    inputs = block(setting)
    size = setting.numel // LAYERS
    lists = {f"{name}s": list(inputs[name].split(size)) for name in list(inputs)[:4]}
    return {**inputs, **lists, "offsets": torch.arange(LAYERS + 1) * size}


def lamb_ours(main: Any, grad: Any, exp_avg: Any, exp_avg_sq: Any, offsets: Any, **_: Any) -> Any:
    lamb_(main, grad, exp_avg, exp_avg_sq, offsets, **ADAM, kernels="on")
    return main


def lamb_foreach(mains: Any, grads: Any, exp_avgs: Any, exp_avg_sqs: Any, **_: Any) -> Any:
    torch._foreach_lerp_(exp_avgs, grads, 1 - BETAS[0])
    torch._foreach_mul_(exp_avg_sqs, BETAS[1])
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, value=1 - BETAS[1])
    below = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(below, (1 - BETAS[1]) ** 0.5)
    torch._foreach_add_(below, EPS)
    moves = torch._foreach_div(exp_avgs, 1 - BETAS[0])
    torch._foreach_div_(moves, below)
    torch._foreach_add_(moves, mains, alpha=DECAY)
    sizes, lengths = (torch.stack(torch._foreach_norm(list(t))) for t in (mains, moves))
    ratios = torch.where((sizes > 0) & (lengths > 0), sizes / lengths, 1.0)
    torch._foreach_mul_(moves, list(ratios.unbind()))
    torch._foreach_sub_(mains, moves, alpha=LR)
    return mains


def embedding(setting: Setting) -> Inputs:
    """A table, gradients of some rows, and torch's optimizer with sums of its own."""
    rows = torch.randperm(TABLE)[:TOUCHED].sort().values
    grad = torch.randn(TOUCHED, WIDTH)
    table = torch.nn.Parameter(torch.randn(TABLE, WIDTH) * 1e-4)
    torch.sparse.check_sparse_tensor_invariants.disable()  # the default; said, it does not warn
    table.grad = torch.sparse_coo_tensor(rows[None], grad, table.shape, is_coalesced=True)
    optimizer = torch.optim.Adagrad([table], lr=LR, eps=EPS, initial_accumulator_value=1.0)
    sums = torch.ones(TABLE, WIDTH)
    return {"main": table.data, "rows": rows, "grad": grad, "sums": sums, "optimizer": optimizer}


def adagrad_ours(main: Any, rows: Any, grad: Any, sums: Any, **_: Any) -> Any:
    adagrad_rows_(main, rows, grad, sums, lr=LR, eps=EPS, kernels="on")
    return main


def adagrad_by_hand(main: Any, rows: Any, grad: Any, sums: Any, **_: Any) -> Any:
    sums.index_add_(0, rows, grad * grad)
    below = sums.index_select(0, rows).sqrt_().add_(EPS)
    return main.index_add_(0, rows, grad / below, alpha=-LR)


def adagrad_torch(main: Any, optimizer: Any, **_: Any) -> Any:
    optimizer.step()
    return main


def many_gradients(setting: Setting, dtype: torch.dtype) -> Inputs:
    tensors = [torch.randn(EACH).to(dtype) for _ in range(MANY)]
    return {"tensors": tensors, "one": torch.tensor(1.0), "found_inf": torch.tensor(0.0)}


def norm_ours(tensors: Any, **_: Any) -> Any:
    return grad_norm(tensors, kernels="on").squares.sqrt()


def norm_torch(tensors: Any, **_: Any) -> Any:
    return torch.nn.utils.get_total_norm(tensors, foreach=True)


def unscale_ours(tensors: Any, one: Any, **_: Any) -> Any:
    return unscale_(tensors, one, kernels="on").squares.sqrt()


def unscale_torch(tensors: Any, one: Any, found_inf: Any) -> Any:
    torch._amp_foreach_non_finite_check_and_unscale_(tensors, found_inf, one)
    return torch.nn.utils.get_total_norm(tensors, foreach=True)


def optimizer_cases() -> Iterator[Case]:
    case = partial(Case, "optimizer")
    by_hand = partial(step_torch, adamw=adamw_by_hand)
    yield case(
        *("adamw_ fp32", 28, block, adamw_ours),
        peers={"torch fused": adamw_fused},
        compiled={"by hand": adamw_by_hand},
    )
    yield case(
        *("adamw_, one block of 400 x 10,000", 28, many_tensors, adamw_ours),
        peers={f"torch {kind}": partial(step_of, kind) for kind in ("fused", "foreach")},
        size=MANY * EACH,
    )
    yield case(
        *("bf16 gradient to bf16 parameter", 30, mixed_block, step_ours),
        peers={
            "torch": partial(step_torch, adamw=adamw_fused),
            "torch, grad_scale": step_scaled,
        },
        compiled={"by hand": by_hand},
    )
    yield case(
        *("sgd_ momentum", 20, block, sgd_ours),
        peers={"torch fused": sgd_fused},
        compiled={"by hand": sgd_by_hand},
    )
    yield case(
        *("lion_", 20, block, lion_ours),
        peers={"by hand": lion_by_hand},
        compiled={"by hand": lion_by_hand},
    )
    yield case(
        *("adagrad_", 20, block, dense_adagrad_ours),
        peers={"torch fused": dense_adagrad_fused, "by hand": dense_adagrad_by_hand},
        compiled={"by hand": dense_adagrad_by_hand},
    )
    yield case("lamb_", 40, layers, lamb_ours, peers={"torch foreach": lamb_foreach})
    yield case(
        *("adagrad_rows_", 20, embedding, adagrad_ours),
        peers={"torch Adagrad": adagrad_torch, "index_add_": adagrad_by_hand},
        compiled={"index_add_": adagrad_by_hand},
        size=TOUCHED * WIDTH,
    )
    for dtype, name in NAMES.items():
        inputs = partial(many_gradients, dtype=dtype)
        yield case(
            *(f"grad_norm of 400 {name}", dtype.itemsize, inputs, norm_ours),
            peers={"torch foreach": norm_torch},
            size=MANY * EACH,
        )
        yield case(
            *(f"unscale_ of 400 {name}", 2 * dtype.itemsize, inputs, unscale_ours),
            peers={"torch foreach": unscale_torch},
            size=MANY * EACH,
        )


# -- compression -----------------------------------------------------------------------------------

BLOCK, SOURCES = 1024, 8
MOST = {4: 7, 8: 127}
GATHER = 0x0102040810204080  # times 8 bytes that are 0 or 1: byte k becomes bit k of the highest


def signs(setting: Setting) -> Inputs:
    """A gradient, its residual, and room for all that torch would otherwise allocate."""
    n = setting.numel
    return {
        "x": torch.randn(n),
        "state": torch.randn(n) * 0.3,
        "state_scales": torch.zeros(n // BLOCK),
        "scales": torch.zeros(n // BLOCK),
        "bits": torch.zeros(n // 8, dtype=torch.uint8),
        "negative": torch.zeros(n, dtype=torch.bool),
        "room": torch.zeros(n // BLOCK, BLOCK),
        "weights": 1 << torch.arange(8, dtype=torch.uint8),
    }


def sign_ours(
    x: Any, state: Any, state_scales: Any, scales: Any, bits: Any, **_: Any
) -> tuple[Any, Any]:
    out = (scales, bits)
    return sign_pack_(x, state, state_scales, block=BLOCK, out=out, kernels="on")


def sign_feedback(x: Any, state: Any, scales: Any, negative: Any, room: Any, **_: Any) -> None:
    """Fill in scales and negative; the residual is in state, before and after."""
    v = state.add_(x).view(-1, BLOCK)
    torch.linalg.vector_norm(v, dim=1, out=scales).mul_(BLOCK**-0.5)
    torch.signbit(v, out=negative.view(-1, BLOCK))
    v.addcmul_(torch.sign(v, out=room), scales[:, None], value=-1)


def sign_by_weights(weights: Any, bits: Any, **inputs: Any) -> tuple[Any, Any]:
    sign_feedback(**inputs)
    weighted = inputs["negative"].view(-1, 8) * weights
    return inputs["scales"], torch.sum(weighted, 1, dtype=torch.uint8, out=bits)


def sign_by_product(weights: Any, bits: Any, **inputs: Any) -> tuple[Any, Any]:
    sign_feedback(**inputs)
    eight = inputs["negative"].view(torch.int64)
    return inputs["scales"], bits.copy_(eight.mul_(GATHER).bitwise_right_shift_(56))


def sign_plain(x: Any, state: Any, weights: Any, **_: Any) -> tuple[Any, Any]:
    """As one would write it at first, with results in new memory."""
    v = (x + state).view(-1, BLOCK)
    scales = v.square().mean(1).sqrt()
    state.copy_((v - scales[:, None] * v.sign()).view(-1))
    return scales, ((v < 0).view(-1, 8) * weights).sum(1).to(torch.uint8)


def sign_by_numpy(weights: Any, bits: Any, **inputs: Any) -> tuple[Any, Any]:
    sign_feedback(**inputs)
    packed = np.packbits(inputs["negative"].numpy(), bitorder="little")
    return inputs["scales"], torch.from_numpy(packed)


def sign_messages(setting: Setting) -> Inputs:
    n = setting.numel
    byte = torch.arange(256, dtype=torch.uint8)
    places = torch.arange(8, dtype=torch.uint8)
    return {
        "bits": torch.randint(0, 256, (SOURCES, n // 8), dtype=torch.uint8),
        "scales": torch.rand(SOURCES, n // BLOCK),
        "out": torch.zeros(n),
        "table": 1.0 - 2.0 * ((byte[:, None] >> places) & 1).float(),
        "room": torch.zeros(n // 8, 8),
        "places": places,
    }


def unpack_ours(bits: Any, scales: Any, out: Any, **_: Any) -> Any:
    return sign_unpack_mean(bits, scales, out.numel(), BLOCK, out=out, kernels="on")


def mean_of(rows: Any, scales: Any, out: Any, decode: Callable[[Any], Any]) -> Any:
    """Return the mean of decode(row) * its scales, over rows."""
    total = out.view(-1, BLOCK).zero_()
    for row, scale in zip(rows, scales, strict=True):
        total.addcmul_(decode(row).view(-1, BLOCK), scale[:, None])
    return total.mul_(1 / len(rows)).view(-1)


def unpack_by_table(bits: Any, scales: Any, out: Any, table: Any, room: Any, **_: Any) -> Any:
    def decode(row: Any) -> Any:
        return torch.index_select(table, 0, row.int(), out=room)

    return mean_of(bits, scales, out, decode)


def unpack_by_shifts(bits: Any, scales: Any, out: Any, places: Any, **_: Any) -> Any:
    def decode(row: Any) -> Any:
        return ((row[:, None] >> places) & 1).float().mul_(-2.0).add_(1.0)

    return mean_of(bits, scales, out, decode)


def unpack_by_numpy(bits: Any, scales: Any, out: Any, **_: Any) -> Any:
    def decode(row: Any) -> Any:
        unpacked = np.unpackbits(row.numpy(), bitorder="little")
        return torch.from_numpy(unpacked).float().mul_(-2.0).add_(1.0)

    return mean_of(bits, scales, out, decode)


def to_quantize(setting: Setting, num_bits: int) -> Inputs:
    n = setting.numel
    return {
        "x": torch.randn(n),
        "residual": torch.randn(n) * 1e-3,
        "scales": torch.zeros(n // BLOCK),
        "codes": torch.zeros(n * num_bits // 8, dtype=torch.uint8),
        "room": torch.zeros(n // BLOCK, BLOCK),
    }


def quantize_ours(num_bits: int, x: Any, residual: Any, scales: Any, codes: Any, **_: Any) -> Any:
    options = {"num_bits": num_bits, "block": BLOCK, "out": (scales, codes), "kernels": "on"}
    return quantize_(x, residual, **options)


def rounded(v: Any, scales: Any, num_bits: int, room: Any) -> Any:
    """Return the whole numbers of v [blocks, BLOCK] in room, and fill in scales."""
    low, high = torch.aminmax(v, dim=1)
    torch.maximum(low.neg_(), high, out=scales).div_(MOST[num_bits])
    return torch.div(v, scales[:, None], out=room).round_().clamp_(-MOST[num_bits], MOST[num_bits])


def encode(whole: Any, num_bits: int, codes: Any) -> Any:
    if num_bits == 8:
        return codes.view(torch.int8).copy_(whole.view(-1)).view(torch.uint8)
    pairs = (whole + 8.0).to(torch.uint8).view(-1, 2)
    return torch.bitwise_or(pairs[:, 0], pairs[:, 1] << 4, out=codes)


def decode(codes: Any, num_bits: int) -> Any:
    if num_bits == 8:
        return codes.view(torch.int8).float()
    return torch.stack((codes & 15, codes >> 4), dim=-1).float().sub_(8.0)


def quantize_torch(
    num_bits: int, x: Any, residual: Any, scales: Any, codes: Any, room: Any
) -> tuple[Any, ...]:
    v = residual.add_(x).view(-1, BLOCK)
    whole = rounded(v, scales, num_bits, room)
    v.addcmul_(whole, scales[:, None], value=-1)
    return scales, encode(whole, num_bits, codes)


def code_messages(setting: Setting, num_bits: int) -> Inputs:
    n = setting.numel
    return {
        "codes": torch.randint(1, 120, (SOURCES, n * num_bits // 8), dtype=torch.uint8),
        "scales": torch.rand(SOURCES, n // BLOCK),
        "out": torch.zeros(n),
    }


def dequantize_ours(num_bits: int, codes: Any, scales: Any, out: Any) -> Any:
    options = {"num_bits": num_bits, "block": BLOCK, "out": out, "kernels": "on"}
    return dequantize_mean(codes, scales, out.numel(), **options)


def dequantize_torch(num_bits: int, codes: Any, scales: Any, out: Any) -> Any:
    return mean_of(codes, scales, out, partial(decode, num_bits=num_bits))


def to_follow(setting: Setting, num_bits: int) -> Inputs:
    inputs = to_quantize(setting, num_bits)
    main, residual = inputs.pop("x"), inputs.pop("residual")
    return {**inputs, "main": main, "replica": (main + residual).to(BF16)}


def delta_pack_ours(
    num_bits: int, main: Any, replica: Any, scales: Any, codes: Any, **_: Any
) -> tuple[Any, ...]:
    options = {"num_bits": num_bits, "block": BLOCK, "out": (scales, codes), "kernels": "on"}
    return *delta_pack_(main, replica, **options), replica


def delta_pack_torch(
    num_bits: int, main: Any, replica: Any, scales: Any, codes: Any, room: Any
) -> tuple[Any, ...]:
    delta = (main - replica).view(-1, BLOCK)
    whole = rounded(delta, scales, num_bits, room)
    encode(whole, num_bits, codes)
    moved = torch.addcmul(replica.float().view(-1, BLOCK), whole, scales[:, None])
    return scales, codes, replica.copy_(moved.view(-1))


def to_apply(setting: Setting, num_bits: int) -> Inputs:
    inputs = code_messages(setting, num_bits)
    replica = torch.randn(setting.numel).to(BF16)
    return {"replica": replica, "codes": inputs["codes"][0], "scales": inputs["scales"][0]}


def delta_apply_ours(num_bits: int, replica: Any, codes: Any, scales: Any) -> Any:
    delta_apply_(replica, scales, codes, num_bits=num_bits, block=BLOCK, kernels="on")
    return replica


def delta_apply_torch(num_bits: int, replica: Any, codes: Any, scales: Any) -> Any:
    change = decode(codes, num_bits).view(-1, BLOCK).mul_(scales[:, None])
    return replica.copy_(change.view(-1).add_(replica))


def compression_cases() -> Iterator[Case]:
    case = partial(Case, "compression")
    yield case(
        *("sign_pack_", 12.125, signs, sign_ours),
        peers={
            "torch product": sign_by_product,
            "torch weights": sign_by_weights,
            "torch plain": sign_plain,
            "numpy.packbits": sign_by_numpy,
        },
        compiled={"torch product": sign_by_product, "torch plain": sign_plain},
    )
    yield case(
        *("sign_unpack_mean of 8", 5, sign_messages, unpack_ours),
        peers={
            "torch table": unpack_by_table,
            "torch shifts": unpack_by_shifts,
            "numpy.unpackbits": unpack_by_numpy,
        },
        compiled={"torch table": unpack_by_table, "torch shifts": unpack_by_shifts},
    )
    for bits in MOST:
        for name, moved, inputs, ours, peer in (
            ("quantize_", 12 + bits / 8, to_quantize, quantize_ours, quantize_torch),
            ("dequantize_mean of 8,", bits + 4, code_messages, dequantize_ours, dequantize_torch),
            ("delta_pack_ bf16", 8 + bits / 8, to_follow, delta_pack_ours, delta_pack_torch),
            ("delta_apply_ bf16", 4 + bits / 8, to_apply, delta_apply_ours, delta_apply_torch),
        ):
            torch_peer = {"torch": partial(peer, bits)}
            yield case(
                *(
                    f"{name} {bits} bits",
                    moved,
                    partial(inputs, num_bits=bits),
                    partial(ours, bits),
                ),
                peers=torch_peer,
                compiled=torch_peer,
            )


# -- model -----------------------------------------------------------------------------------------

SHAPES = ((2048, 192), (2048, 768), (4096, 4096))
NORM_EPS = 1e-5


class ModelOp(NamedTuple):
    """An operation of models; `passes`: tensors as large as x that each direction moves."""

    name: str
    inputs: Callable[[tuple[int, ...], torch.dtype], Inputs]
    ours: System
    torch: System
    passes: Mapping[str, float]
    liger: System | None = None
    shapes: tuple[tuple[int, ...], ...] = SHAPES
    compared: bool = True


def leaf(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def norm_inputs(shape: tuple[int, ...], dtype: torch.dtype, bias: bool, residual: bool) -> Inputs:
    inputs = {"x": leaf(*shape, dtype=dtype), "weight": leaf(shape[-1], dtype=dtype)}
    if bias:
        inputs["bias"] = leaf(shape[-1], dtype=dtype)
    if residual:
        inputs["residual"] = leaf(*shape, dtype=dtype)
    return inputs


def layer_norm_torch(x: Any, weight: Any, bias: Any, residual: Any = None) -> Any:
    total = x if residual is None else x + residual
    y = F.layer_norm(total, total.shape[-1:], weight, bias, NORM_EPS)
    return y if residual is None else (y, total)


def rms_norm_torch(x: Any, weight: Any, residual: Any = None) -> Any:
    total = x if residual is None else x + residual
    y = F.rms_norm(total, total.shape[-1:], weight, NORM_EPS)
    return y if residual is None else (y, total)


def liger_layer_norm(x: Any, weight: Any, bias: Any) -> Any:
    from liger_kernel.transformers.functional import liger_layer_norm

    return liger_layer_norm(x, weight, bias, NORM_EPS)


def liger_rms_norm(x: Any, weight: Any) -> Any:
    from liger_kernel.transformers.functional import liger_rms_norm

    return liger_rms_norm(x, weight, NORM_EPS, in_place=False)


def two_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    return {"gate": leaf(*shape, dtype=dtype), "up": leaf(*shape, dtype=dtype)}


def swiglu_torch(gate: Any, up: Any) -> Any:
    return F.silu(gate) * up


def liger_swiglu(gate: Any, up: Any) -> Any:
    from liger_kernel.transformers.functional import liger_swiglu

    return liger_swiglu(gate, up)


def gelu_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    return {"x": leaf(*shape, dtype=dtype), "bias": leaf(shape[-1], dtype=dtype)}


def gelu_torch(x: Any, bias: Any, approximate: str) -> Any:
    return F.gelu(x + bias, approximate=approximate)


def rotary_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    """Queries [B, H, T, D] as a projection leaves them: transposed."""
    angles = torch.outer(torch.arange(shape[1]), 1e4 ** -(torch.arange(0, shape[3], 2) / shape[3]))
    x = leaf(*shape, dtype=dtype)
    return {"x": x, "table": torch.stack((angles.cos(), angles.sin()))}


def rotary_ours(x: Any, table: Any) -> Any:
    return rotary(x.transpose(1, 2), table, seq_dim=2, kernels="on")


def rotary_torch(x: Any, table: Any) -> Any:
    x = x.transpose(1, 2)
    cos, sin = table[:, : x.shape[2]].to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def softmax_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    hidden = torch.ones(shape[-2:], dtype=torch.bool).triu(1)
    return {"x": leaf(*shape, dtype=dtype), "hidden": hidden}


def softmax_ours(x: Any, hidden: Any) -> Any:
    return masked_softmax(x, 0.125, causal=True, kernels="on")


def softmax_torch(x: Any, hidden: Any) -> Any:
    return (x * 0.125).masked_fill(hidden, -math.inf).softmax(-1)


def loss_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    return {"logits": leaf(*shape, dtype=dtype), "targets": torch.randint(shape[1], shape[:1])}


def loss_torch(logits: Any, targets: Any) -> Any:
    return F.cross_entropy(logits.float(), targets)


def liger_loss(logits: Any, targets: Any) -> Any:
    """It writes the gradient over the logits in forward; later rounds have other numbers."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy(logits, targets)


def dropout_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    inputs = norm_inputs(shape, dtype, bias=True, residual=True)
    del inputs["weight"]
    return {**inputs, "seeds": list(range(shape[0]))}


def dropout_ours(x: Any, bias: Any, residual: Any, seeds: Any) -> Any:
    return bias_dropout_residual(x, bias, residual, 0.1, seeds, kernels="on")


def dropout_torch(x: Any, bias: Any, residual: Any, seeds: Any) -> Any:
    return residual + F.dropout(x + bias, 0.1)


def model_ops() -> Iterator[ModelOp]:
    ours_layer, ours_rms, ours_swiglu, ours_loss = (
        partial(function, kernels="on")
        for function in (layer_norm, rms_norm, swiglu, cross_entropy)
    )
    one, fused = {"forward": 2, "backward": 3}, {"forward": 4, "backward": 4}
    layer, rms = (partial(norm_inputs, bias=bias, residual=False) for bias in (True, False))
    add_layer, add_rms = (partial(norm_inputs, bias=bias, residual=True) for bias in (True, False))
    yield ModelOp("layer_norm", layer, ours_layer, layer_norm_torch, one, liger_layer_norm)
    yield ModelOp("layer_norm + residual", add_layer, ours_layer, layer_norm_torch, fused)
    yield ModelOp("rms_norm", rms, ours_rms, rms_norm_torch, one, liger_rms_norm)
    yield ModelOp("rms_norm + residual", add_rms, ours_rms, rms_norm_torch, fused)
    yield ModelOp(
        *("swiglu", two_inputs, ours_swiglu, swiglu_torch, {"forward": 3, "backward": 5}),
        liger_swiglu,
    )
    for name, kind in (("bias_gelu tanh", "tanh"), ("bias_gelu exact", "none")):
        ours = partial(bias_gelu, approximate=kind, kernels="on")
        yield ModelOp(name, gelu_inputs, ours, partial(gelu_torch, approximate=kind), one)
    yield ModelOp(
        *("rotary", rotary_inputs, rotary_ours, rotary_torch, {"forward": 2, "backward": 2}),
        shapes=((8, 512, 12, 64),),
    )
    yield ModelOp(
        *("masked_softmax causal", softmax_inputs, softmax_ours, softmax_torch),
        {"forward": 1.5, "backward": 3},
        shapes=((8, 12, 256, 256),),
    )
    yield ModelOp(
        *("cross_entropy", loss_inputs, ours_loss, loss_torch),
        {"forward": 1, "backward": 2, "both": 3},
        liger_loss,
        shapes=((2048, 256), (2048, 32000)),
    )
    yield ModelOp(
        *("bias_dropout_residual", dropout_inputs, dropout_ours, dropout_torch),
        {"forward": 3, "backward": 2},
        shapes=((8, 512, 768),),
        compared=False,
    )


def model_cases() -> Iterator[Case]:
    for op in model_ops():
        for (dtype, short), shape, direction in product(NAMES.items(), op.shapes, op.passes):
            yield Case(
                *("model", f"{op.name} {direction} {short} {'x'.join(map(str, shape))}"),
                bytes=op.passes[direction] * dtype.itemsize,
                inputs=lambda _, op=op, shape=shape, dtype=dtype: op.inputs(shape, dtype),
                ours=op.ours,
                peers={"torch": op.torch},
                compiled={"torch": op.torch},
                liger=op.liger,
                size=math.prod(shape),
                direction=direction,
                compared=op.compared,
            )


CASES = [*optimizer_cases(), *compression_cases(), *model_cases()]
