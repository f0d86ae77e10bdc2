"""What doctor makes of facts and measurements: each fault is found and named, and nothing else."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from bigtrain.doctor.facts import code_digest, facts_of, processor
from bigtrain.doctor.findings import (
    Finding,
    culprits,
    differences,
    findings,
    named,
    size,
    slow_links,
    usual_gbit,
)
from bigtrain.doctor.measured import AllReduce, Device, Link, Measured, Node
from bigtrain.doctor.report import report_lines
from bigtrain.errors import BigtrainError

GIB = 1 << 30
VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "bigtrain": "0.1.0", "code": "abc"}


def facts(name: str, **changes: Any) -> dict[str, Any]:
    sound = {
        "host": name,
        "versions": VERSIONS,
        "cores": 4,
        "memory_bytes": 16 * GIB,
        "folder": "/runs/one",
        "disk_free_bytes": 100 * GIB,
        "shm_free_bytes": 8 * GIB,
        "time": 1e9,
    }
    return {**sound, **changes}


def node(name: str, **changes: Any) -> Node:
    sound = {"facts": facts(name), "kernels": {"cpu": "avx2"}}
    rates = {"write_mb_per_second": 500.0, "read_mb_per_second": 900.0}
    return Node(name, **{**sound, **rates, **changes})


def test_gpus_that_nobody_looked_at() -> None:
    """Where --hosts is given, the machine that one calls from knows nothing of their GPUs."""
    devices = (Device(0, 0, "cuda", "H100", 0.01, 1e9), Device(1, 1, "cuda", "H100", 0.01, 1e9))
    nodes = (node("n1", facts=facts("n1", gpus=8)), node("n2", facts=facts("n2", gpus=1)))
    [found] = findings(Measured(nodes, devices))
    assert found.what == "n1: not all of its 8 GPUs were examined"
    assert "--ranks-per-node 8" in found.mend
    assert not findings(Measured(nodes, devices), all_gpus=False), "so many were asked for"


def test_drivers_that_differ_are_no_reason_to_refuse_a_run() -> None:
    one = facts("n1", versions={**VERSIONS, "NVIDIA driver": "550.1"})
    other = facts("n2", versions={**VERSIONS, "NVIDIA driver": "560.2"})
    [found] = differences([one, other])
    assert (found.kind, "NVIDIA driver is" in found.what) == ("driver", True)


def world(count: int, rate: Callable[[int, int], float] = lambda a, b: 9.4) -> Measured:
    """Return nodes with nothing wrong, but for what `rate` makes of the links."""
    nodes = tuple(node(f"n{i + 1}") for i in range(count))
    devices = tuple(Device(i, i, "cpu", "processors", 0.01, 1e9) for i in range(count))
    links = tuple(Link(a, b, rate(a, b), 1e-4) for a, b in permutations(range(count), 2))
    reduced = AllReduce(16 << 20, count, 0.03) if count > 1 else None
    return Measured(nodes, devices, links, reduced)


def with_node(measured: Measured, number: int, **changes: Any) -> Measured:
    nodes = list(measured.nodes)
    nodes[number] = replace(nodes[number], **changes)
    return replace(measured, nodes=tuple(nodes))


def with_facts(measured: Measured, number: int, **changes: Any) -> Measured:
    return with_node(measured, number, facts={**measured.nodes[number].facts, **changes})


def only(found: list[Finding], kind: str, *nodes: str) -> str:
    """Return the text of the one finding, which is of that kind and blames these nodes."""
    assert [one.kind for one in found] == [kind], [one.render() for one in found]
    assert found[0].nodes == nodes
    assert found[0].why
    assert found[0].mend
    return found[0].render()


# -- nothing is wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9, 12])
def test_good_nodes(count: int) -> None:
    measured = world(count)
    assert findings(measured) == []
    assert list(report_lines(measured, []))[-1] == "nothing is wrong"


def test_small_differences_are_good() -> None:
    measured = world(4, lambda a, b: 9.4 - a - 0.3 * b)
    measured = with_node(measured, 2, ahead_seconds=0.3)
    devices = [replace(d, matmul_seconds=0.01 + 0.002 * d.rank) for d in measured.devices]
    assert findings(replace(measured, devices=tuple(devices))) == []


# -- facts ---------------------------------------------------------------------------------------


def test_version_of_one_of_four() -> None:
    measured = with_facts(world(4), 2, versions={**VERSIONS, "torch": "2.12.1"})
    text = only(findings(measured), "versions", "n3")
    assert "torch is 2.12.1 on n3; 2.13.0 on the others" in text
    assert "install torch 2.13.0 on n3" in text


def test_version_of_one_of_two_blames_neither() -> None:
    measured = with_facts(world(2), 1, versions={**VERSIONS, "torch": "2.12.1"})
    text = only(findings(measured), "versions")
    assert "torch is 2.13.0 on n1; 2.12.1 on n2" in text


def test_code_of_the_same_version() -> None:
    measured = with_facts(world(3), 0, versions={**VERSIONS, "code": "def"})
    text = only(findings(measured), "versions", "n1")
    assert "the code of bigtrain is def on n1" in text
    assert "checkout" in text


def test_package_that_one_node_lacks() -> None:
    without = {key: value for key, value in VERSIONS.items() if key != "torch"}
    text = only(
        differences([facts("a"), facts("b"), facts("c", versions=without)]), "versions", "c"
    )
    assert "torch is missing on c" in text


def test_package_that_all_nodes_lack() -> None:
    missing = {**VERSIONS, "torch": "missing"}
    text = only(differences([facts("a", versions=missing)]), "versions")
    assert "torch is missing" in text


def test_several_versions() -> None:
    every = [facts(f"n{i}", versions={**VERSIONS, "torch": f"2.{i // 2}"}) for i in range(6)]
    (found,) = differences(every)
    assert found.what == "torch is 2.0 on n0, n1; 2.1 on n2, n3; 2.2 on n4, n5"


def test_little_room() -> None:
    measured = with_facts(world(3), 1, shm_free_bytes=3 << 20)
    assert "n2: 3.0 MiB free in /dev/shm" in only(findings(measured), "shm", "n2")
    measured = with_facts(world(3), 1, disk_free_bytes=0)
    text = only(findings(measured), "disk", "n2")
    assert "n2: 0 B free" in text
    assert "/runs/one" in text


def test_a_full_file_system_that_all_share_is_one_finding() -> None:
    every = [facts(f"n{i}", disk_free_bytes=GIB) for i in range(3)]
    assert "1.0 GiB free" in only(differences(every), "disk", "n0", "n1", "n2")


def test_room_that_is_not_known_is_not_judged() -> None:
    assert differences([facts("a", shm_free_bytes=None, disk_free_bytes=None)]) == []


@pytest.mark.parametrize(
    "bad",
    [
        None,
        3,
        [],
        {},
        {"host": "n2"},
        facts("n2", versions=3),
        facts("n2", versions={"torch": 2}),
        facts("n2", time="noon"),
        facts("n2", time=None),
        facts("n2", shm_free_bytes="much"),
        facts("n2", disk_free_bytes=True),
    ],
)
def test_facts_that_make_no_sense(bad: Any) -> None:
    found = differences([facts("n1"), bad, facts("n3")])
    who = "n2" if isinstance(bad, dict) and bad else "node 1"
    assert "its facts make no sense" in only(found, "facts", who)


def test_facts_of_this_machine(tmp_path: Path) -> None:
    facts_of(tmp_path)
    began = time.perf_counter()
    mine = facts_of(tmp_path / "not" / "there")
    assert time.perf_counter() - began < 0.1
    assert differences([json.loads(json.dumps(mine))] * 2) == []
    assert mine["disk_free_bytes"] > 0
    assert mine["versions"]["torch"]


def test_code_digest(tmp_path: Path) -> None:
    digests = set()
    for text in ("a = 1", "a = 2"):
        folder = tmp_path / text
        folder.mkdir()
        (folder / "a.py").write_text(text)
        digests.add(code_digest(folder))
    assert len(digests) == 2


def test_processor(tmp_path: Path) -> None:
    assert processor(tmp_path / "nothing")
    (tmp_path / "info").write_text("processor : 0\nmodel name\t: Some CPU @ 3 GHz\n")
    assert processor(tmp_path / "info") == "Some CPU @ 3 GHz"


# -- clocks --------------------------------------------------------------------------------------


def test_clock_of_one_of_four() -> None:
    text = only(findings(with_node(world(4), 1, ahead_seconds=7.0)), "clock", "n2")
    assert "n2: its clock is 7.0 s ahead of" in text


def test_clock_of_the_first_node() -> None:
    measured = world(4)
    for number in (1, 2, 3):
        measured = with_node(measured, number, ahead_seconds=60.0)
    text = only(findings(measured), "clock", "n1")
    assert "n1: its clock is 60.0 s behind" in text


def test_clocks_of_two() -> None:
    text = only(findings(with_node(world(2), 1, ahead_seconds=-3.0)), "clock", "n1", "n2")
    assert "n2: its clock is 3.0 s behind that of n1" in text


def test_clock_behind_a_slow_wire_is_not_known_better() -> None:
    measured = with_node(world(3), 1, ahead_seconds=0.8, round_trip_seconds=1.0)
    assert findings(measured) == []


def test_clocks_by_when_facts_arrived() -> None:
    every = [facts(f"n{i}", time=1e9 + i, received=1e9 + i + 0.2) for i in range(3)]
    assert differences(every) == []
    every[1]["time"] += 30
    assert "30.0 s ahead" in only(differences(every), "clock", "n1")


# -- what each node does -------------------------------------------------------------------------


def test_missing_kernels() -> None:
    why = "no kernels on the cpu: there is no C++ compiler"
    measured = with_node(world(3), 2, missing=why, kernels={"cpu": "torch"})
    assert f"n3: {why}" in only(findings(measured), "kernels", "n3")
    for number in (0, 1):
        measured = with_node(measured, number, missing=why)
    only(findings(measured), "kernels", "n1", "n2", "n3")


@pytest.mark.parametrize(
    ("kind", "times", "slow"),
    [
        ("cpu", [1.0, 1.9], []),
        ("cpu", [1.0, 2.1], ["n2"]),
        ("cpu", [1.0, 1.0, 1.9, 1.0], []),
        ("cpu", [1.0, 1.1, 2.5, 1.0], ["n3"]),
        ("cuda", [1.0, 1.4], []),
        ("cuda", [1.6, 1.0], ["n1"]),
        ("cuda", [1.0, 1.25, 1.0], []),
        ("cuda", [1.0, 1.4, 1.0], ["n2"]),
        ("cuda", [5.0], []),
    ],
)
def test_slow_devices(kind: str, times: list[float], slow: list[str]) -> None:
    devices = tuple(Device(i, i, kind, "X", t / 100, 1e9) for i, t in enumerate(times))
    found = findings(replace(world(len(times)), devices=devices, links=(), all_reduce=None))
    assert [one.nodes for one in found] == [(name,) for name in slow]
    assert all(one.kind == "device" for one in found)


def test_devices_of_other_names_are_not_compared() -> None:
    devices = (Device(0, 0, "cuda", "A100", 0.004, 1e9), Device(1, 1, "cuda", "H100", 0.001, 1e9))
    assert findings(replace(world(2), devices=devices, links=(), all_reduce=None)) == []


def test_rank_without_the_gpu_it_should_have() -> None:
    measured = world(2)
    devices = (measured.devices[0], replace(measured.devices[1], fault="it has 8 GPU(s)"))
    text = only(findings(replace(measured, devices=devices)), "device", "n2")
    assert "rank 1 on n2" in text


def test_files() -> None:
    measured = with_node(world(3), 0, write_mb_per_second=3.0)
    assert "3 MB/s" in only(findings(measured), "files", "n1")
    changes = {"write_mb_per_second": None, "file_error": "No space left on device"}
    measured = with_node(world(3), 0, **changes)
    assert "No space left" in only(findings(measured), "files", "n1")
    assert any("failed" in line for line in report_lines(measured, findings(measured)))


# -- links ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [3, 4, 5, 16])
@pytest.mark.parametrize(
    ("way", "words"),
    [("both", "its links are"), ("out", "what it sends is"), ("in", "what it receives is")],
)
def test_slow_node(count: int, way: str, words: str) -> None:
    def rate(source: int, target: int) -> float:
        bad = {"both": 1 in (source, target), "out": source == 1, "in": target == 1}[way]
        return 2.0 if bad else 9.4

    text = only(findings(world(count, rate)), "link", "n2")
    assert f"n2: {words} slow: 2 " in text
    assert "usual are 9.4" in text


@pytest.mark.parametrize("count", [2, 3, 4])
def test_one_slow_link_names_both_ends(count: int) -> None:
    measured = world(count, lambda a, b: 2.0 if (a, b) == (1, 0) else 9.4)
    text = only(findings(measured), "link", "n2", "n1")
    assert "one link is slow: 2 from n2 to n1" in text


def test_two_slow_nodes_of_six() -> None:
    measured = world(6, lambda a, b: 1.0 if {a, b} & {2, 4} else 9.4)
    found = findings(measured)
    assert [one.nodes for one in found] == [("n3",), ("n5",)]


def test_slow_everywhere() -> None:
    text = only(findings(world(3, lambda a, b: 0.1)), "link", "n1", "n2", "n3")
    assert "all links between nodes are slow: 0.1 to 0.1 Gbit/s" in text
    only(findings(world(2, lambda a, b: 0.1)), "link", "n1", "n2")


def test_uneven_but_fast_enough_pairs_of_two() -> None:
    assert findings(world(2, lambda a, b: 9.4 if a else 6.0)) == []


def test_what_is_usual_is_not_what_the_slow_node_does() -> None:
    links = world(3, lambda a, b: 0.05 if 1 in (a, b) else 9.4).links
    assert usual_gbit(links) == 9.4
    assert len(slow_links(links)) == 4
    ((who, own),) = culprits(slow_links(links), links)
    assert who == 1
    assert len(own) == 4


def test_late_node() -> None:
    measured = world(4)
    links = [
        replace(k, latency_seconds=0.02 if 3 in (k.source, k.target) else 1e-4)
        for k in measured.links
    ]
    text = only(findings(replace(measured, links=tuple(links))), "latency", "n4")
    assert "n4: its links are late: 20 ms" in text
    links = [replace(k, latency_seconds=9e-4 if k.source == 3 else 1e-4) for k in measured.links]
    assert findings(replace(measured, links=tuple(links))) == []


def test_all_reduce_that_links_do_not_explain() -> None:
    measured = replace(world(4), all_reduce=AllReduce(16 << 20, 4, 1.0))
    assert "0.201 Gbit/s on the wire" in only(findings(measured), "all_reduce")
    slow = world(4, lambda a, b: 0.95)
    assert findings(replace(slow, all_reduce=AllReduce(16 << 20, 4, 0.3))) == []


# -- messages and the report ---------------------------------------------------------------------


def test_goes_through_json() -> None:
    for measured in (world(1), world(3)):
        assert Measured.from_message(json.loads(json.dumps(measured.to_message()))) == measured


@pytest.mark.parametrize(
    "change", [{"nodes": 3}, {"nodes": [{}]}, {"links": [{"a": 1}]}, {"all_reduce": 7}]
)
def test_message_of_other_code(change: Mapping[str, Any]) -> None:
    message = {**world(2).to_message(), **change}
    with pytest.raises(BigtrainError, match="cannot be read"):
        Measured.from_message(message)
    with pytest.raises(BigtrainError, match="cannot be read"):
        Measured.from_message(None)


def test_report_of_few_nodes() -> None:
    measured = with_facts(world(3), 2, versions={**VERSIONS, "torch": "2.12.1"})
    lines = list(report_lines(measured, findings(measured)))
    assert any("torch 2.13.0 | 2.12.1" in line for line in lines)
    assert [line.split() for line in lines if line.startswith("  n2 ")] == [
        ["n2", "9.4", "-", "9.4"]
    ]
    assert "1 thing is wrong" in lines


def test_report_of_many_nodes_shows_only_slow_links() -> None:
    measured = world(9, lambda a, b: 1.0 if a == 4 else 9.4)
    text = "\n".join(report_lines(measured, findings(measured)))
    assert "slow: n5 to n1 1" in text
    assert "Gbit/s from" not in text


def test_names_and_sizes() -> None:
    assert named(["a", "b"]) == "a, b"
    assert named([f"n{i}" for i in range(9)]) == "n0, n1, n2 and 6 more"
    assert [size(n) for n in (0, 900, 64 << 20, 3 * GIB // 2, 4000 * GIB)] == [
        *("0 B", "900 B", "64 MiB", "1.5 GiB", "3.9 TiB"),
    ]
