"""What workers and servers say to each other: nothing that comes by a network is believed."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import json
import math
import random
import struct
from typing import Any

import pytest
from unit_helpers import ROOT

from bigtrain.server.protocol import (
    HEADER_BYTES,
    MOST_BEFORE_WELCOME,
    MOST_TEXT,
    VERSION,
    Header,
    Kind,
    Malformed,
    Who,
    check_proof,
    new_token,
    nonce,
    number,
    numbers,
    proof,
    read_text,
    section,
    text_frame,
    whole_numbers,
)

TENSORS = {Kind.VALUES, Kind.PUSH, Kind.TENSOR, Kind.LOOKUP}
EARLY = {Kind.CHALLENGE, Kind.HELLO, Kind.WELCOME, Kind.REFUSE}
WHO = Who("worker", 1, incarnation=2, rank=3, ranks=4)


def raw_header(
    magic: bytes = b"btps", version: int = VERSION, kind: int = Kind.PING, length: int = 0
) -> bytes:
    return struct.pack("<4sBBHIQQ4x", magic, version, kind, 0, 0, 0, length)


# -- headers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", Kind)
def test_headers_come_through(kind: Kind) -> None:
    for header in (Header(kind), Header(kind, 77, key=2**32 - 1, step=2**64 - 1, part=2**16 - 1)):
        raw = header.pack()
        assert len(raw) == HEADER_BYTES == 32
        for form in (raw, bytearray(raw), memoryview(raw)):
            assert Header.unpack(form, welcome=True) == header
        assert header.is_tensor == (kind in TENSORS)


@pytest.mark.parametrize("kind", Kind)
def test_before_the_welcome_there_is_only_the_handshake(kind: Kind) -> None:
    if kind in EARLY:
        assert Header.unpack(Header(kind).pack(), welcome=False).kind is kind
    else:
        with pytest.raises(Malformed, match="before it has shown"):
            Header.unpack(Header(kind).pack(), welcome=False)


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (raw_header(magic=b"HTTP"), "does not speak this protocol"),
        (bytes(32), "does not speak this protocol"),
        (raw_header(version=VERSION + 1), f"version {VERSION + 1} of the protocol"),
        (raw_header(kind=0), "no frame of kind 0"),
        (raw_header(kind=255), "no frame of kind 255"),
        (raw_header(length=MOST_TEXT + 1), "PING of"),
        (raw_header(kind=Kind.HELLO, length=2**64 - 1), "HELLO of"),
    ],
)
def test_malformed_headers(raw: bytes, why: str) -> None:
    with pytest.raises(Malformed, match=why):
        Header.unpack(raw, welcome=True)


def test_strangers_send_little() -> None:
    longest = Header(Kind.HELLO, MOST_BEFORE_WELCOME)
    assert Header.unpack(longest.pack(), welcome=False) == longest
    longer = Header(Kind.HELLO, MOST_BEFORE_WELCOME + 1).pack()
    assert Header.unpack(longer, welcome=True).length == MOST_BEFORE_WELCOME + 1
    with pytest.raises(Malformed, match="at most"):
        Header.unpack(longer, welcome=False)


def test_tensors_may_be_larger_than_text() -> None:
    """Whoever makes room for them knows how large they are to be."""
    header = Header(Kind.PUSH, 2**40)
    assert Header.unpack(header.pack(), welcome=True) == header


def test_random_headers_are_refused_or_read() -> None:
    rng = random.Random(1)
    beginnings = [b"", b"btps", b"btps" + bytes([VERSION])]
    read = 0
    for trial in range(2000):
        start = beginnings[trial % 3]
        raw = start + rng.randbytes(HEADER_BYTES - len(start))
        try:
            header = Header.unpack(raw, welcome=bool(trial & 1))
        except Malformed:
            continue
        assert header.is_tensor or header.length <= MOST_TEXT
        read += 1
    assert read, "some must get as far as that"


# -- bodies ------------------------------------------------------------------------------------


def test_text_comes_through() -> None:
    content = {"a": [1, 2.5, None], "b": {"c": "\u00fc\ud800"}}
    frame = text_frame(Kind.READY, content, key=1, step=2, part=3)
    header = Header.unpack(frame[:HEADER_BYTES], welcome=True)
    assert header == Header(Kind.READY, len(frame) - HEADER_BYTES, key=1, step=2, part=3)
    assert read_text(frame[HEADER_BYTES:]) == content


def test_no_body_is_no_content() -> None:
    assert len(text_frame(Kind.PING)) == HEADER_BYTES
    assert read_text(b"") == read_text(memoryview(b"")) == {}


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"\xff\xfe\x00",
        b"\x80\x04}q\x00.",  # a pickle
        b"{} {}",
        b"{'a': 1}",
        b"\x00" * 9,
        b"[1, 2]",
        b"null",
        b'"text"',
        b"[" * 1_000_000,
        b'{"a":' * 1_000_000,
        b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        b'{"a": ' + b"9" * 100_000 + b"}",
    ],
    ids=lambda body: repr(bytes(body[:12])),
)
def test_malformed_text(body: bytes) -> None:
    with pytest.raises(Malformed):
        read_text(body)


def test_random_text_is_refused_or_read() -> None:
    rng = random.Random(2)
    for _ in range(2000):
        body = bytes(rng.choice(b'{}[]":,0123456789.eE-+ntfu\\ \xc3\x00') for _ in range(12))
        with contextlib.suppress(Malformed):
            assert isinstance(read_text(body), dict)


@pytest.mark.parametrize("value", [0, 1, 2**53])
def test_whole_numbers(value: int) -> None:
    assert number({"n": value}, "n") == value


@pytest.mark.parametrize(
    "value", [None, "1", 1.0, True, False, -1, 2**53 + 1, [1], {}, math.nan, math.inf]
)
def test_what_is_no_whole_number(value: Any) -> None:
    with pytest.raises(Malformed, match="no n "):
        number({"n": value}, "n")
    with pytest.raises(Malformed, match="no m "):
        number({"n": 1}, "m")


def test_whole_numbers_have_a_bound() -> None:
    assert number({"n": 7}, "n", 7) == 7
    with pytest.raises(Malformed):
        number({"n": 8}, "n", 7)


def test_lists_of_numbers() -> None:
    """Also of those that a gradient may have become."""
    body = json.dumps({"v": [1, -2.5, math.nan, math.inf, -math.inf]}).encode()
    one, two, nan, *infinite = numbers(read_text(body), "v", 5)
    assert (one, two, infinite) == (1.0, -2.5, [math.inf, -math.inf])
    assert type(one) is float
    assert math.isnan(nan)
    assert numbers({"v": []}, "v") == []


@pytest.mark.parametrize(
    "value",
    [None, 1, "12", {"0": 1}, [True], [1, "2"], [None], [[1]], [10**400], [1, 2, 3]],
    ids=lambda value: repr(value)[:12],
)
def test_what_is_no_list_of_two_numbers(value: Any) -> None:
    with pytest.raises(Malformed):
        numbers({"v": value}, "v", 2 if value == [1, 2, 3] else None)


def test_lists_of_whole_numbers() -> None:
    assert whole_numbers({"v": [0, 2**53]}, "v", 2) == [0, 2**53]
    assert whole_numbers({"v": []}, "v") == []


@pytest.mark.parametrize(
    "value", [None, 1, "12", [1.0], [math.nan], [True], [-1], ["1"], [2**53 + 1], [[1]], [1, 2, 3]]
)
def test_what_is_no_list_of_two_whole_numbers(value: Any) -> None:
    with pytest.raises(Malformed):
        whole_numbers({"v": value}, "v", 2 if value == [1, 2, 3] else None)


def test_sections() -> None:
    assert section({"s": {"a": 1}}, "s") == {"a": 1}
    assert section({}, "s") is section({"s": None}, "s") is None
    for value in ([], "x", 1, True, 0):
        with pytest.raises(Malformed):
            section({"s": value}, "s")


# -- who may speak -----------------------------------------------------------------------------


@pytest.mark.parametrize("who", [WHO, Who("server", 0), Who("worker", 2**31, 2**31, 0, 2**31)])
def test_who_comes_through(who: Who) -> None:
    assert Who.read(json.loads(json.dumps(dataclasses.asdict(who)))) == who


@pytest.mark.parametrize(
    "changed",
    [
        {"role": "board"},
        {"role": ["worker"]},
        {"role": None},
        {"index": -1},
        {"index": "1"},
        {"index": 2**31 + 1},
        {"incarnation": 0.5},
        {"incarnation": True},
        {"rank": 4},
        {"rank": None},
        {"ranks": 0, "rank": 0},
        {"ranks": {}},
    ],
)
def test_who_is_nobody(changed: dict[str, Any]) -> None:
    content = dataclasses.asdict(WHO) | changed
    with pytest.raises(Malformed):
        Who.read(content)


@pytest.mark.parametrize("name", ["role", "index", "incarnation", "rank", "ranks"])
def test_who_leaves_something_out(name: str) -> None:
    content = dataclasses.asdict(WHO)
    del content[name]
    with pytest.raises(Malformed):
        Who.read(content)


def test_who_is_called() -> None:
    assert str(Who("server", 2)) == "server 2"
    assert str(WHO) == "worker 1 rank 3"


def test_secrets_are_new_each_time() -> None:
    for make in (new_token, nonce):
        assert len({make() for _ in range(100)}) == 100


def proof_of(**changed: Any) -> str:
    """Return worker 1's proof; or that of somebody who differs."""
    who = {name: value for name, value in changed.items() if hasattr(WHO, name)}
    said = {"token": "token", "speaker": "client", "theirs": "theirs", "own": "own"}
    said |= {name: value for name, value in changed.items() if name in said}
    return proof(**said, who=dataclasses.replace(WHO, **who))


@pytest.mark.parametrize(
    "changed",
    [
        {"token": "other"},
        {"speaker": "server"},
        {"theirs": "their"},
        {"own": "owns"},
        {"theirs": "own", "own": "theirs"},
        {"theirs": "theirso", "own": "wn"},
        {"own": 'own", "worker'},
        {"role": "server"},
        {"index": 7},
        {"incarnation": 7},
        {"rank": 0},
        {"ranks": 7},
    ],
    ids=str,
)
def test_a_proof_is_of_all_that_it_tells(changed: dict[str, Any]) -> None:
    assert proof_of(**changed) != proof_of()
    check_proof(proof_of(), "token", "client", "theirs", "own", WHO)
    with pytest.raises(Malformed, match="worker 1 rank 3 does not have the token"):
        check_proof(proof_of(**changed), "token", "client", "theirs", "own", WHO)


@pytest.mark.parametrize(
    "given",
    ["", None, 0, True, b"proof", [], {}, "x" * 64, "\u00fc" * 64, "\ud800" * 64],
    ids=lambda given: repr(given)[:9],
)
def test_what_is_no_proof(given: Any) -> None:
    with pytest.raises(Malformed, match="does not have the token"):
        check_proof(given, "token", "client", "theirs", "own", WHO)


def test_part_of_a_proof_is_none() -> None:
    right = proof("token", "client", "theirs", "own", WHO)
    for given in (right[:-1], right + "0", right.upper(), right[::-1]):
        with pytest.raises(Malformed):
            check_proof(given, "token", "client", "theirs", "own", WHO)


def test_nothing_from_the_network_is_unpickled() -> None:
    """Nor run or imported by its name."""
    forbidden = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
    for path in sorted((ROOT / "bigtrain" / "server").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in getattr(node, "names", []) if hasattr(alias, "name")]
            names += [str(getattr(node, "module", ""))] if isinstance(node, ast.ImportFrom) else []
            assert not forbidden & {name.split(".")[0] for name in names}, path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"eval", "exec", "__import__", "torch.load"}, path
                assert not called.endswith(("object_list", "all_gather_object")), path
