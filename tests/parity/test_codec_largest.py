"""The largest of each group, its place and its sign: beside a slow reference, and fuzzed."""

from __future__ import annotations

import math

import pytest
import torch

from bigtrain.engines.coding import Packed, coding_of
from bigtrain.onebit.codec import Largest

pytestmark = pytest.mark.parity
GROUPS = [1, 2, 5, 8, 100]


def slow(values: list[float], group: int) -> tuple[list[float], list[int], list[bool]]:
    """Return scales, places and minus signs, one number after the other."""
    groups = [values[i : i + group] for i in range(0, len(values), group)]
    places = [max(range(len(g)), key=lambda i: (abs(g[i]), -i)) for g in groups]
    chosen = [g[i] for g, i in zip(groups, places, strict=True)]
    blocks = [chosen[i : i + 128] for i in range(0, len(chosen), 128)]
    scales = [math.sqrt(sum(v * v for v in b) / len(b)) for b in blocks]
    return scales, places, [v < 0 for v in chosen]


def sizes(group: int, draws: torch.Generator) -> list[int]:
    edges = [n for k in (group, 128 * group) for n in (k - 1, k, k + 1) if n]
    return [1, *edges, *torch.randint(1, 3000, (6,), generator=draws).tolist()]


@pytest.mark.parametrize("group", GROUPS)
def test_messages_are_those_of_a_slow_reference(group: int) -> None:
    draws, coding = torch.Generator().manual_seed(3), Packed(Largest(group))
    for n in sizes(group, draws):
        values = torch.randn(n, generator=draws)
        values[:: max(2, n // 7)] = 0.5  # equals
        message = torch.zeros(coding.num_bytes(n), dtype=torch.uint8)
        coding.pack(values, coding.keep(n), message)
        scales, places, minus = slow(values.tolist(), group)
        got = message[: 2 * len(scales)].view(torch.bfloat16).float()
        assert torch.allclose(got, torch.tensor(scales), rtol=2**-8, atol=0)
        bits = [int(byte) >> k & 1 for byte in message[2 * len(scales) :] for k in range(8)]
        width = max(group - 1, 0).bit_length()
        planes = [bits[k * len(places) : (k + 1) * len(places)] for k in range(width + 1)]
        assert [sum(p[i] << k for k, p in enumerate(planes[:-1])) for i in range(len(places))] == (
            places
        )
        assert [bool(bit) for bit in planes[-1]] == minus
        out = torch.full((n,), torch.nan)
        coding.add_up([message], out)
        wanted = torch.zeros(n)
        for number, (place, is_minus) in enumerate(zip(places, minus, strict=True)):
            s = got[number // 128]
            wanted[number * group + place] = -s if is_minus else s
        assert torch.equal(out, wanted)


@pytest.mark.parametrize("group", GROUPS)
def test_sums_and_copies(group: int) -> None:
    draws, coding = torch.Generator().manual_seed(4), Packed(Largest(group))
    for n in sizes(group, draws):
        messages, singles = [], []
        for _ in range(3):
            message = torch.zeros(coding.num_bytes(n), dtype=torch.uint8)
            coding.pack(torch.randn(n, generator=draws), coding.keep(n), message)
            singles.append(torch.empty(n))
            coding.add_up([message], singles[-1])
            messages.append(message)
        out = torch.empty(n)
        coding.add_up(messages, out)
        assert torch.equal(out, singles[0] + singles[1] + singles[2])
        main, replica = torch.randn(n, generator=draws), torch.zeros(n)
        copy, lacks = replica.clone(), []
        for _ in range(40):
            coding.follow(main, replica, messages[0])
            coding.move(copy, messages[0])
            assert torch.equal(copy, replica)
            lacks.append(float((main - replica).norm()))
        assert lacks[-1] < lacks[0] or n <= group


@pytest.mark.parametrize("group", GROUPS)
def test_whatever_a_message_says_stays_inside_of_its_block(group: int) -> None:
    draws, coding = torch.Generator().manual_seed(5), Packed(Largest(group))
    for n in sizes(group, draws):
        for _ in range(5):
            size = coding.num_bytes(n)
            message = torch.randint(0, 256, (size,), generator=draws, dtype=torch.uint8)
            room = torch.full((n + 64,), 7.0)
            coding.add_up([message, message], room[32:-32])
            assert (room[:32] == 7).all()
            assert (room[-32:] == 7).all()
        for wrong in (message[:-1], torch.cat([message, message[:1]])):
            with pytest.raises(RuntimeError):
                coding.add_up([wrong], torch.empty(n))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
def test_a_block_with_what_is_no_number_becomes_nan_and_its_rest_is_kept(bad: float) -> None:
    coding, values = Packed(Largest(8)), torch.ones(3000)
    values[1500] = bad
    kept = coding.keep(3000)
    kept.set(0.25)
    message, out = torch.zeros(coding.num_bytes(3000), dtype=torch.uint8), torch.empty(3000)
    coding.pack(values, kept, message)
    coding.add_up([message], out)
    assert out[1024:2048].isnan().all()
    assert (kept.values[0, 1024:2048] == 0.25).all()
    assert out[:1024].isfinite().all()
    assert out[2048:].isfinite().all()


def test_what_the_servers_default_costs() -> None:
    assert coding_of("topk").num_bytes(1 << 20) * 8 / (1 << 20) == 0.5 + 16 / 1024
    assert coding_of("topk", 1 / 32).num_bytes(1 << 20) * 8 / (1 << 20) == 6 / 32 + 16 / 4096
