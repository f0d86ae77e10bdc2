"""What `bigtrain doctor` shows of its measurements: nodes, links, and what is wrong. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

from bigtrain.doctor.findings import Finding, expected_gbit, named, size, slow_links
from bigtrain.doctor.measured import Device, Link, Measured, Node

_MOST_IN_MATRIX = 8


def report_lines(measured: Measured, found: Sequence[Finding]) -> Iterator[str]:
    """Yield the whole report: what is the same everywhere, each node, links, what is wrong."""
    yield _everywhere(measured.nodes)
    yield ""
    yield from _table(_node_rows(measured))
    if measured.links:
        yield ""
        yield from _links(measured)
    if measured.all_reduce is not None:
        yield _all_reduce(measured)
    yield ""
    if not found:
        yield "nothing is wrong"
        return
    yield "1 thing is wrong" if len(found) == 1 else f"{len(found)} things are wrong"
    for finding in found:
        yield ""
        yield finding.render(indent="  ")


def _everywhere(nodes: Sequence[Node]) -> str:
    """Return the versions; where they differ, all of them."""
    parts = []
    for what in dict.fromkeys(key for node in nodes for key in node.facts["versions"]):
        having = [node.facts["versions"].get(what, "missing") for node in nodes]
        parts.append(f"{what} {' | '.join(dict.fromkeys(having))}")
    return f"versions   {', '.join(parts)}"


def _node_rows(measured: Measured) -> Iterator[list[str]]:
    yield [
        *("node", "cores", "memory", "devices", "a product", "kernels", "clock", "disk free"),
        *("/dev/shm free", "write", "read"),
    ]
    for number, node in enumerate(measured.nodes):
        devices = [device for device in measured.devices if device.node == number]
        yield [
            node.name,
            str(node.facts["cores"]),
            _size(node.facts["memory_bytes"]),
            _devices(devices),
            f"{max(d.matmul_seconds for d in devices) * 1e3:.3g} ms",
            ", ".join(f"{kind}: {what}" for kind, what in (node.kernels or {}).items()),
            f"{node.ahead_seconds:+.3f} s" if number else "",
            _size(node.facts["disk_free_bytes"]),
            _size(node.facts["shm_free_bytes"]),
            _rate(node.write_mb_per_second),
            _rate(node.read_mb_per_second),
        ]


def _devices(devices: Sequence[Device]) -> str:
    names = [device.name for device in devices]
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))


def _size(number: float | None) -> str:
    return "?" if number is None else size(number)


def _rate(number: float | None) -> str:
    return "failed" if number is None else f"{number:.0f} MB/s"


def _table(rows: Iterator[list[str]]) -> Iterator[str]:
    """Yield rows with columns of even width; a column that is empty everywhere is left out."""
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    for row in zip(*columns, strict=True):
        yield "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()


def _links(measured: Measured) -> Iterator[str]:
    links, names = measured.links, [node.name for node in measured.nodes]
    rates = [link.gbit_per_second for link in links]
    waits = [link.latency_seconds * 1e6 for link in links]
    yield (
        f"links      {min(rates):.3g} to {max(rates):.3g} Gbit/s, median {median(rates):.3g}; "
        f"{min(waits):.0f} to {max(waits):.0f} us, median {median(waits):.0f}"
    )
    if len(names) <= _MOST_IN_MATRIX:
        yield from _table(_matrix(links, names))
    elif slow := slow_links(links):
        pairs = [
            f"{names[link.source]} to {names[link.target]} {link.gbit_per_second:.3g}"
            for link in slow
        ]
        yield f"  slow: {named(pairs, 12)}"


def _matrix(links: Sequence[Link], names: Sequence[str]) -> Iterator[list[str]]:
    rate = {(link.source, link.target): link.gbit_per_second for link in links}
    yield ["  Gbit/s from", *(f"to {name}" for name in names)]
    for source, name in enumerate(names):
        cells = [(source, target) for target in range(len(names))]
        yield [f"  {name}", *(f"{rate[cell]:.3g}" if cell in rate else "-" for cell in cells)]


def _all_reduce(measured: Measured) -> str:
    reduced = measured.all_reduce
    assert reduced is not None
    expected = expected_gbit(measured)
    of = f", {expected:.3g} are expected" if expected is not None else ""
    return (
        f"all-reduce {size(reduced.size_bytes)} over {reduced.num_ranks} ranks: "
        f"{reduced.seconds * 1e3:.3g} ms, {reduced.gbit_per_second:.3g} Gbit/s on the wire{of}"
    )
