"""What gradients look like on the wire. Whatever they are, their sum is taken in fp32."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bigtrain.comm.buckets import Bucket
from bigtrain.comm.collectives import Pending, add_up, start_all_to_all, start_reduce_scatter
from bigtrain.comm.mesh import Axis
from bigtrain.comm.wire import PlainWire, Wire
from bigtrain.ops.message import num_blocks
from bigtrain.ops.op import Kernels
from bigtrain.ops.quantize import dequantize_mean, quantize_

BLOCK = 256  # elements of one scale, of gradients that travel as int8


class CastWire(PlainWire):
    """Gradients as fp32, or rounded to a dtype of fewer bits: (n-1)/n of their bytes per rank."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def bytes_per_element(self, bucket: Bucket) -> float:
        return float(self.dtype.itemsize)

    def leave(self, bucket: Bucket, rows: torch.Tensor, axis: Axis) -> Pending[list[torch.Tensor]]:
        what = f"reduce_scatter of gradient bucket {bucket.index}"
        if rows.dtype == self.dtype and rows.device.type != "cpu":
            return start_reduce_scatter(rows, axis, what).then(lambda row: [row])
        return start_all_to_all(rows.to(self.dtype), axis, what)

    def add_up(
        self, bucket: Bucket, arrived: Sequence[torch.Tensor], out: torch.Tensor, *, first: bool
    ) -> None:
        add_up(arrived, out, first)


class Int8Wire(PlainWire):
    """Gradients as 8-bit codes with one fp32 scale for each 256: a quarter of fp32's bytes.

    Nothing is kept of what rounding loses (no error feedback). Source of the idea: ZeRO++'s qgZ
    (https://arxiv.org/abs/2306.10209); here each gradient is rounded once.
    """

    def __init__(self, kernels: Kernels = "auto") -> None:
        self.kernels: Kernels = kernels

    def bytes_per_element(self, bucket: Bucket) -> float:
        return 1 + 4 / BLOCK

    def leave(self, bucket: Bucket, rows: torch.Tensor, axis: Axis) -> Pending[list[torch.Tensor]]:
        n = rows.shape[1]
        messages = torch.empty(len(rows), self._size(n), dtype=torch.uint8, device=rows.device)
        for row, message in zip(rows, messages, strict=True):
            out = self._split(message, n)
            quantize_(row, None, num_bits=8, block=BLOCK, out=out, kernels=self.kernels)
        return start_all_to_all(messages, axis, f"all_to_all of gradient bucket {bucket.index}")

    def add_up(
        self, bucket: Bucket, arrived: Sequence[torch.Tensor], out: torch.Tensor, *, first: bool
    ) -> None:
        n = out.numel()
        pairs = [self._split(message, n) for message in arrived]
        codes, scales = torch.stack([p[1] for p in pairs]), torch.stack([p[0] for p in pairs])
        total = dequantize_mean(
            codes, scales, n, num_bits=8, block=BLOCK, weight=1.0, kernels=self.kernels
        )
        out.copy_(total) if first else out.add_(total)

    @staticmethod
    def _size(n: int) -> int:
        return 4 * num_blocks(n, BLOCK) + n

    @staticmethod
    def _split(message: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        scales, codes = message.split([4 * num_blocks(n, BLOCK), n])
        return scales.view(torch.float32), codes


def make_wire(dtype: str, kernels: Kernels = "auto") -> Wire:
    """Return the wire of that name: fp32, bf16 or int8."""
    if dtype == "int8":
        return Int8Wire(kernels)
    return CastWire({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
