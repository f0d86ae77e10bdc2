"""What is wrong, judged from facts and measurements. Pure; every threshold is here. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from bigtrain.doctor.facts import DRIVER
from bigtrain.doctor.measured import Device, Link, Measured
from bigtrain.errors import Problem

LEAST_SHM_BYTES = 128 << 20  # loaders and NCCL pass tensors there; containers often have 64 MiB
LEAST_DISK_BYTES = 2 << 30  # less does not hold a checkpoint
CLOCK_SECONDS = 0.5  # clocks that a time service keeps differ by milliseconds
CLOCK_SECONDS_UNMEASURED = 5.0  # where only `received` tells: starting and the wire count too
SLOW_LINK = 0.5  # of what is usual between these nodes
LEAST_GBIT = 0.9  # what TCP gets out of Gigabit Ethernet
SLOW_LATENCY = 5.0  # times what is usual, and at least
LEAST_LATENCY_SECONDS = 1e-3
SLOW_GPU, SLOW_GPU_OF_TWO = 1.3, 1.5  # times the median; of two, times the faster one
SLOW_CPU = 2.0  # processors share their time with others
SLOW_ALL_REDUCE = 0.5  # of what the slowest link allows
CPU_ALL_REDUCE_GBIT = 1.5  # gloo copies and sums on processors: more is not expected of it
LEAST_WRITE_MB = 20.0  # a second and node: at less, 10 GB take more than eight minutes

_OLD_BIGTRAIN = "use the same bigtrain on all nodes"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong. `kind` groups them; `nodes` are the culprits, where known."""

    kind: str
    what: str
    why: str
    mend: str
    nodes: tuple[str, ...] = ()

    @property
    def forbids(self) -> bool:
        """Whether a run is refused for it: its ranks would not do the same."""
        return self.kind in ("versions", "facts")

    def render(self, indent: str = "") -> str:
        """Return it as lines of text, like an error."""
        return Problem(self.what, self.why, self.mend).render(indent)


def findings(measured: Measured, *, all_gpus: bool = True) -> list[Finding]:
    """Return all that is wrong, what other faults follow from first.

    all_gpus: whether all GPUs of each node were to be examined.
    """
    return [
        *differences([{**node.facts, "name": node.name} for node in measured.nodes]),
        *_clocks(
            [node.name for node in measured.nodes],
            [node.ahead_seconds for node in measured.nodes],
            [CLOCK_SECONDS + node.round_trip_seconds / 2 for node in measured.nodes],
        ),
        *_kernels(measured),
        *(_idle_gpus(measured) if all_gpus else ()),
        *_devices(measured),
        *_links(measured),
        *_latencies(measured),
        *_all_reduce(measured),
        *_files(measured),
    ]


def named(names: Sequence[str], most: int = 4) -> str:
    """Return names in a line; of many, the first and how many more."""
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[: most - 1])} and {len(names) - most + 1} more"


# -- facts ---------------------------------------------------------------------------------------


def differences(facts: Iterable[Any]) -> list[Finding]:
    """Return what is wrong by the facts of nodes alone: versions, room, and clocks.

    A node is called by `name`, else by `host`. Clocks count where `received` tells the time of the
    one clock by which the facts arrived. Facts that make no sense are a finding of their own.
    """
    sound: list[Mapping[str, Any]] = []
    found: list[Finding] = []
    for number, one in enumerate(facts):
        fault = _fault(one)
        if fault:
            who = _name(one) if isinstance(one, Mapping) else ""
            who = who or f"node {number}"
            why = "it is told by other code, or was cut on its way"
            what = f"{who}: its facts make no sense: {fault}"
            found.append(Finding("facts", what, why, _OLD_BIGTRAIN, (who,)))
        else:
            sound.append(one)
    found += _versions(sound)
    timed = [one for one in sound if isinstance(one.get("received"), int | float)]
    found += _clocks(
        [_name(one) for one in timed],
        [one["time"] - one["received"] for one in timed],
        [CLOCK_SECONDS_UNMEASURED] * len(timed),
    )
    return [*found, *room(sound)]


def _name(facts: Mapping[str, Any]) -> str:
    return str(facts.get("name") or facts.get("host") or "")


def _fault(facts: Any) -> str:
    """Return what is wrong with the form of facts; nothing, if all that is judged is there."""
    if not isinstance(facts, Mapping):
        return f"they are {facts!r:.40}"
    if not _name(facts):
        return "they have no host"
    versions = facts.get("versions")
    if not isinstance(versions, Mapping) or not all(
        isinstance(text, str) for pair in versions.items() for text in pair
    ):
        return f"versions is {versions!r:.40}"
    for key in ("time", "disk_free_bytes", "shm_free_bytes"):
        value = facts.get(key)
        allowed = isinstance(value, int | float) and not isinstance(value, bool)
        if not allowed and not (value is None and key != "time"):
            return f"{key} is {value!r:.40}"
    return ""


def _versions(facts: Sequence[Mapping[str, Any]]) -> list[Finding]:
    found = []
    for what in dict.fromkeys(key for one in facts for key in one["versions"]):
        having: dict[str, list[str]] = {}
        for one in facts:
            having.setdefault(one["versions"].get(what, "missing"), []).append(_name(one))
        if len(having) > 1:
            found.append(_version(what, having))
        elif having.keys() == {"missing"}:
            why = f"bigtrain does not run without {what}"
            mend = f"pip install {what}, into the Python that starts bigtrain"
            found.append(Finding("versions", f"{what} is missing", why, mend))
    return found


def _version(what: str, having: Mapping[str, Sequence[str]]) -> Finding:
    """Say who differs: from the version that most nodes have, or from each other."""
    (usual, most), *others = sorted(having.items(), key=lambda item: -len(item[1]))
    odd = [name for _, names in others for name in names]
    title = {"code": "the code of bigtrain"}.get(what, what)
    parts = [f"{version} on {named(names)}" for version, names in others]
    if len(most) > len(odd):
        parts.append(f"{usual} on the other{'s' * (len(most) > 1)}")
        culprits = tuple(odd)
    else:
        parts.insert(0, f"{usual} on {named(most)}")
        culprits = ()
    mend = f"install {what} {usual} on {named(odd)}, or use one environment that all nodes see"
    if what == "code":
        mend = f"bring the checkout or the package on {named(odd)} up to date"
    why = "ranks that do not run the same may fail in the middle, or give other numbers"
    kind = "driver" if what == DRIVER else "versions"  # which a run may live with
    return Finding(kind, f"{title} is {'; '.join(parts)}", why, mend, culprits)


def _clocks(
    names: Sequence[str], ahead: Sequence[float], allowed: Sequence[float]
) -> list[Finding]:
    """Judge clocks by how far each is ahead of a common one, in seconds."""
    if len(names) < 2:
        return []
    why = "logs do not fit together, and what compares times (munge, make, tickets) fails"
    mend = "start a time service on {}: chronyc tracking, or timedatectl, tells its state"
    if len(names) == 2:
        apart = ahead[1] - ahead[0]
        if abs(apart) <= max(allowed):
            return []
        what = f"{names[1]}: its clock is {_apart(apart)} that of {names[0]}"
        return [Finding("clock", what, why, mend.format(" and ".join(names)), tuple(names))]
    usual = median(ahead)
    return [
        Finding(
            "clock",
            f"{name}: its clock is {_apart(seconds - usual)} that of the other nodes",
            why,
            mend.format(name),
            (name,),
        )
        for name, seconds, most in zip(names, ahead, allowed, strict=True)
        if abs(seconds - usual) > most
    ]


def _apart(seconds: float) -> str:
    return f"{abs(seconds):.1f} s {'ahead of' if seconds > 0 else 'behind'}"


def room(facts: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Return where a disk or /dev/shm is nearly full, by facts of nodes or their `room_of`."""
    disk = [one for one in facts if _below(one["disk_free_bytes"], LEAST_DISK_BYTES)]
    shm = [one for one in facts if _below(one["shm_free_bytes"], LEAST_SHM_BYTES)]
    found = []
    if disk:
        names = tuple(_name(one) for one in disk)
        free = min(one["disk_free_bytes"] for one in disk)
        found.append(
            Finding(
                "disk",
                f"{named(names)}: {size(free)} free where the run folder is "
                f"({disk[0].get('folder')})",
                f"a run keeps logs and checkpoints there; {size(LEAST_DISK_BYTES)} is the least",
                "remove old runs there, or set another run.dir",
                names,
            )
        )
    if shm:
        names = tuple(_name(one) for one in shm)
        free = min(one["shm_free_bytes"] for one in shm)
        found.append(
            Finding(
                "shm",
                f"{named(names)}: {size(free)} free in /dev/shm",
                "data loaders and NCCL pass tensors there, and crash when it is full; "
                f"{size(LEAST_SHM_BYTES)} is the least",
                "remove what dead programs have left there (ls -l /dev/shm); in a container give "
                "it more: --shm-size=8g",
                names,
            )
        )
    return found


def _below(value: float | None, least: float) -> bool:
    return value is not None and value < least


def size(number: float) -> str:
    """Return bytes for a reader, like 64 MiB."""
    unit = "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if number < 1024 or unit == "TiB":
            break
        number /= 1024
    return f"{number:.0f} {unit}" if number >= 10 or unit == "B" else f"{number:.1f} {unit}"


# -- what each node does alone -------------------------------------------------------------------


def _kernels(measured: Measured) -> list[Finding]:
    """Say where a kernel library is wanted and missing, nodes with the same cause together."""
    causes: dict[str, list[str]] = {}
    for node in measured.nodes:
        if node.missing:
            causes.setdefault(node.missing, []).append(node.name)
    why = "torch does the work of the fused kernels there, slower, and all ranks wait for it"
    return [
        Finding(
            "kernels",
            f"{named(names)}: {cause}",
            why,
            "install a compiler there and start again, or share the cache of the other nodes "
            "(XDG_CACHE_HOME); BIGTRAIN_KERNELS=off goes without everywhere",
            tuple(names),
        )
        for cause, names in causes.items()
    ]


def slow_devices(devices: Sequence[Device]) -> list[tuple[Device, float]]:
    """Return the devices that take much longer than others of their name, each with what is usual.

    Of three or more, the median is usual; of two, the faster one.
    """
    alike: dict[tuple[str, str], list[Device]] = {}
    for device in devices:
        alike.setdefault((device.kind, device.name), []).append(device)
    found = []
    for (kind, _), group in alike.items():
        times = sorted(device.matmul_seconds for device in group)
        usual = median(times) if len(times) > 2 else times[0]
        factor = SLOW_GPU if len(times) > 2 else SLOW_GPU_OF_TWO
        factor = factor if kind == "cuda" else SLOW_CPU
        found += [(d, usual) for d in group if d.matmul_seconds > factor * usual]
    return found


def _devices(measured: Measured) -> list[Finding]:
    found = []
    for device in measured.devices:
        if device.fault:
            name = measured.nodes[device.node].name
            what = f"rank {device.rank} on {name} computes on its processors: {device.fault}"
            why = "it has a GPU, or should have, that torch cannot use"
            mend = f"see what nvidia-smi and torch.cuda.is_available() say on {name}"
            found.append(Finding("device", what, why, mend, (name,)))
    for device, usual in slow_devices(measured.devices):
        name = measured.nodes[device.node].name
        what = f"rank {device.rank} on {name} ({device.name}) is slow: a matrix product takes "
        what += f"{_milli(device.matmul_seconds)}, usual are {_milli(usual)}"
        why = "every step takes as long as its slowest rank"
        mend = f"see what else runs on {name} (top), and how its processors are clocked"
        if device.kind == "cuda":
            mend = f"on {name}: nvidia-smi -q -d PERFORMANCE,TEMPERATURE, and who else uses it"
        found.append(Finding("device", what, why, f"{mend}; or leave the node out", (name,)))
    return found


def _idle_gpus(measured: Measured) -> list[Finding]:
    """Say where a node has more GPUs than were measured: what starts us may not know of them."""
    used = Counter(device.node for device in measured.devices if device.kind == "cuda")
    short = [
        (node.name, node.facts["gpus"])
        for number, node in enumerate(measured.nodes)
        if used[number]
        and isinstance(node.facts.get("gpus"), int)
        and node.facts["gpus"] > used[number]
    ]
    if not short:
        return []
    names, most = [name for name, _ in short], max(gpus for _, gpus in short)
    what = f"{named(names)}: not all of its {most} GPUs were examined"
    why = "how many there are cannot be seen from where doctor was called"
    return [Finding("device", what, why, f"call it with --ranks-per-node {most}", tuple(names))]


def _milli(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _files(measured: Measured) -> list[Finding]:
    found = []
    for node in measured.nodes:
        if node.file_error:
            what = f"{node.name}: writing where the run folder is failed: {node.file_error}"
            why = "a run keeps its logs and checkpoints there"
            mend = "make room, mend the mount on that node, or set another run.dir"
            found.append(Finding("files", what, why, mend, (node.name,)))
    slow = [n for n in measured.nodes if _below(n.write_mb_per_second, LEAST_WRITE_MB)]
    if slow:
        names = tuple(node.name for node in slow)
        least = min(node.write_mb_per_second or 0.0 for node in slow)
        what = f"{named(names)}: writing where the run folder is goes at {least:.3g} MB/s"
        why = f"checkpoints take long; {LEAST_WRITE_MB:.0f} MB/s is the least"
        mend = "set run.dir to a faster file system, or see what else writes there"
        found.append(Finding("files", what, why, mend, names))
    return found


# -- what nodes do together ----------------------------------------------------------------------


def usual_gbit(links: Sequence[Link]) -> float:
    """Return what a link between these nodes should carry.

    That is the median, over the nodes, of the fastest link of each: one bad node of three has two
    of the three pairs, so the median of pairs would be a slow one.
    """
    best: dict[int, float] = {}
    for link in links:
        for node in (link.source, link.target):
            best[node] = max(best.get(node, 0.0), link.gbit_per_second)
    return median(best.values()) if best else 0.0


def usual_latency(links: Sequence[Link]) -> float:
    """Return the seconds that a message between these nodes should take, found in the same way."""
    best: dict[int, float] = {}
    for link in links:
        for node in (link.source, link.target):
            best[node] = min(best.get(node, link.latency_seconds), link.latency_seconds)
    return median(best.values()) if best else 0.0


def slow_links(links: Sequence[Link]) -> list[Link]:
    """Return the links that carry less than half of what is usual, or than Gigabit Ethernet."""
    least = max(SLOW_LINK * usual_gbit(links), LEAST_GBIT)
    return [link for link in links if link.gbit_per_second < least]


def late_links(links: Sequence[Link]) -> list[Link]:
    """Return the links whose messages take much longer than those of others."""
    most = max(SLOW_LATENCY * usual_latency(links), LEAST_LATENCY_SECONDS)
    return [link for link in links if link.latency_seconds > most]


def _links(measured: Measured) -> list[Finding]:
    names = [node.name for node in measured.nodes]
    slow, usual = slow_links(measured.links), usual_gbit(measured.links)
    why = "every all-reduce goes as fast as the slowest link"
    if slow and len(slow) == len(measured.links):
        rates = [link.gbit_per_second for link in slow]
        what = f"all links between nodes are slow: {min(rates):.3g} to {max(rates):.3g} Gbit/s"
        mend = "see whether ranks use the right network: set GLOO_SOCKET_IFNAME "
        mend += "(NCCL_SOCKET_IFNAME for GPUs) in launch.env, and see ethtool for its speed"
        why += f"; {LEAST_GBIT} Gbit/s is the least"
        return [Finding("link", what, why, mend, tuple(names))]
    found = []
    for node, own in culprits(slow, measured.links):
        told = [f"{link.gbit_per_second:.3g} {_way(link, node, names)}" for link in own]
        what = f"{_whose(own, node, names)} slow: {named(told)} Gbit/s, usual are {usual:.3g}"
        mend = f"look at the network card, cable and switch port of {{}} (ethtool -S), {_OTHERS}"
        who = (names[node],) if node is not None else (names[own[0].source], names[own[0].target])
        found.append(Finding("link", what, why, mend.format(" and ".join(who)), who))
    return found


_OTHERS = "and at what else sends there; or leave the node out (sbatch --exclude)"


def _latencies(measured: Measured) -> list[Finding]:
    names = [node.name for node in measured.nodes]
    late = late_links(measured.links)
    usual = usual_latency(measured.links)
    found = []
    for node, own in culprits(late, measured.links):
        told = [f"{_milli(link.latency_seconds)} {_way(link, node, names)}" for link in own]
        what = f"{_whose(own, node, names)} late: {named(told)}, usual are {_milli(usual)}"
        why = "small messages, of which a pipeline and tensor parallelism send many, wait for it"
        mend = "see what else uses that network, and whether the way there is a longer one"
        who = (names[node],) if node is not None else (names[own[0].source], names[own[0].target])
        found.append(Finding("latency", what, why, mend, who))
    return found


def culprits(bad: Sequence[Link], links: Sequence[Link]) -> list[tuple[int | None, list[Link]]]:
    """Return the bad links by the node that they have in common; None for one that has no such.

    A node is a culprit if two or more links of it are bad and these are half of those that go the
    same ways; of several, the one that explains most links comes first.
    """
    left = list(bad)
    found: list[tuple[int | None, list[Link]]] = []
    while left:
        count = Counter(node for link in left for node in (link.source, link.target))
        node, most = count.most_common(1)[0]
        own = [link for link in left if node in (link.source, link.target)]
        if most < 2 or 2 * most < _num_like(own, links, node):
            return [*found, *((None, [link]) for link in left)]
        found.append((node, own))
        left = [link for link in left if link not in own]
    return found


def _num_like(own: Sequence[Link], links: Sequence[Link], node: int) -> int:
    """Count the links of `node` that go a way (from it, to it) that one of `own` goes, too."""
    sends = any(link.source == node for link in own)
    receives = any(link.target == node for link in own)
    return sum(
        (sends and link.source == node) or (receives and link.target == node) for link in links
    )


def _way(link: Link, node: int | None, names: Sequence[str]) -> str:
    if node is None:
        return f"from {names[link.source]} to {names[link.target]}"
    return f"to {names[link.target]}" if link.source == node else f"from {names[link.source]}"


def _whose(own: Sequence[Link], node: int | None, names: Sequence[str]) -> str:
    if node is None:
        return "one link is"
    if all(link.source == node for link in own):
        return f"{names[node]}: what it sends is"
    if all(link.target == node for link in own):
        return f"{names[node]}: what it receives is"
    return f"{names[node]}: its links are"


def expected_gbit(measured: Measured) -> float | None:
    """Return what an all-reduce should put on the wire of a rank, if links were measured."""
    if not measured.links:
        return None
    least = min(link.gbit_per_second for link in measured.links)
    on_gpus = all(device.kind == "cuda" for device in measured.devices)
    return least if on_gpus else min(least, CPU_ALL_REDUCE_GBIT)


def is_slow_all_reduce(measured: Measured) -> bool:
    """Tell whether the all-reduce is slower than the links explain."""
    expected, reduced = expected_gbit(measured), measured.all_reduce
    if expected is None or reduced is None:
        return False
    return reduced.gbit_per_second < SLOW_ALL_REDUCE * expected


def _all_reduce(measured: Measured) -> list[Finding]:
    if not is_slow_all_reduce(measured):
        return []
    assert measured.all_reduce is not None
    return [
        Finding(
            "all_reduce",
            f"the all-reduce of all {measured.all_reduce.num_ranks} ranks is slow: "
            f"{measured.all_reduce.gbit_per_second:.3g} Gbit/s on the wire, "
            f"{expected_gbit(measured):.3g} are expected",
            "each link alone is faster, so something that they share is not: a switch, or "
            "processors that copy",
            "ask for nodes under one switch (sbatch --switches=1), give ranks more processors, and "
            "see that nothing else uses these nodes",
        )
    ]
