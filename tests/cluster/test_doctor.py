"""`bigtrain doctor` on the nodes of a real Slurm: each fault is planted on one node, and named."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from real_slurm import Slurm, why_no_slurm
from runs import BIN, NOT_PASSED_ON, ROOT
from virtual_nodes import MANAGER

from bigtrain.kernels import build

pytestmark = [pytest.mark.cluster, pytest.mark.alone, pytest.mark.timeout(180)]
on_slurm = pytest.mark.skipif(bool(why_no_slurm()), reason=why_no_slurm() or "Slurm is here")

_SHIFT = """
#define _GNU_SOURCE
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
enum { SHIFT = 7 };
int clock_gettime(clockid_t id, struct timespec *t) {
    int r = syscall(SYS_clock_gettime, id, t);
    if (!r && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) t->tv_sec += SHIFT;
    return r;
}
int gettimeofday(struct timeval *t, void *zone) {
    int r = syscall(SYS_gettimeofday, t, zone);
    if (!r && t) t->tv_sec += SHIFT;
    return r;
}
time_t time(time_t *out) {
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    if (out) *out = t.tv_sec;
    return t.tv_sec;
}
"""


class Nodes:
    """Three nodes, and what may be wrong with one of them."""

    def __init__(self, slurm: Slurm, work: Path) -> None:
        self.slurm, self.work = slurm, work

    def doctor(self, *options: str, starter: str = "salloc", leaves: int = 0) -> tuple[int, str]:
        """Examine all three nodes; return the exit code and what is shown. No file is left."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith(NOT_PASSED_ON)}
        environment |= {**self.slurm.env, "PATH": f"{BIN}:{os.environ['PATH']}"}
        done = self.slurm.nodes.run(
            *(MANAGER, starter, "-N3", "bigtrain", "doctor", "--quick", *options),
            env=environment,
            cwd=self.work,
            timeout=120,
        )
        assert "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
        assert len(list(self.work.iterdir())) == leaves, done.stdout + done.stderr
        return done.returncode, done.stdout if done.returncode == 0 else done.stdout + done.stderr

    def findings(self, *options: str) -> list[str]:
        """Return each thing that is wrong, as its lines."""
        code, text = self.doctor(*options)
        assert code == 1, text
        _, number, wrong = re.split(r"^(\d+) things? (?:is|are) wrong$", text, flags=re.MULTILINE)
        found = re.findall(r"^  \S.*(?:\n    .*)*", wrong, re.MULTILINE)
        assert len(found) == int(number), text
        assert all("  why:" in one and "  mend:" in one for one in found), text
        return found

    def on(self, name: str, *command: str) -> None:
        done = self.slurm.nodes.run(name, *command)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"

    @contextlib.contextmanager
    def mounted(self, name: str, *mount: str) -> Iterator[None]:
        """Mount something on one node alone; its place is the last word."""
        self.on(name, "mount", *mount)
        try:
            yield
        finally:
            self.on(name, "umount", "-l", mount[-1])


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    made = Slurm(tmp_path_factory.mktemp("slurm"), 3)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def nodes(slurm: Slurm, tmp_path: Path) -> Iterator[Nodes]:
    work = tmp_path / "work"
    work.mkdir()
    yield Nodes(slurm, work)
    slurm.cancel_all()


def one_with(found: list[str], words: str) -> str:
    """Return the one finding that has these words."""
    (one,) = [text for text in found if words in text] or [f"{words}: not in {found}"]
    assert words in one
    return one


@on_slurm
def test_good_nodes(nodes: Nodes) -> None:
    for _ in range(3):  # the nodes share few processors, with other programs, too
        code, text = nodes.doctor()
        if code == 0:
            break
    assert code == 0, text
    assert "nothing is wrong" in text
    for name in ("n1", "n2", "n3"):
        assert re.search(rf"^{name} .* 1 x .* MB/s", text, re.MULTILINE), text
    assert re.search(r"^  n2 +[\d.]+ +- +[\d.]+$", text, re.MULTILINE), text
    assert re.search(r"^all-reduce .* over 3 ranks: .* Gbit/s", text, re.MULTILINE), text


@on_slurm
def test_slow_link(nodes: Nodes) -> None:
    nodes.slurm.nodes.shape("n2", "50mbit")
    try:
        found = nodes.findings()
    finally:
        nodes.on("n2", "tc", "qdisc", "del", "dev", "eth0", "root")
    one = one_with(found, "slow: 0.0")
    assert re.search(r"n2: what it sends is slow: 0.0\d+ to n1, 0.0\d+ to n3 Gbit/s", one), found


@on_slurm
def test_other_version(nodes: Nodes, tmp_path: Path) -> None:
    version = metadata.version("numpy")
    real = metadata.distribution("numpy").locate_file(f"numpy-{version}.dist-info/METADATA")
    changed = tmp_path / "METADATA"
    text = Path(str(real)).read_text().replace(f"Version: {version}", "Version: 1.0.9", 1)
    changed.write_text(text)
    with nodes.mounted("n3", "--bind", str(changed), str(real)):
        found = nodes.findings()
    one = one_with(found, "numpy")
    assert f"numpy is 1.0.9 on n3; {version} on the others" in one
    assert f"install numpy {version} on n3" in one


@on_slurm
def test_full_shm(nodes: Nodes) -> None:
    nodes.on("n2", "fallocate", "-l", "1000M", "/dev/shm/full")
    try:
        found = nodes.findings()
    finally:
        nodes.on("n2", "rm", "/dev/shm/full")
    assert "n2: 24 MiB free in /dev/shm" in one_with(found, "/dev/shm")


@on_slurm
@pytest.mark.skipif(not shutil.which("cc"), reason="a wrong clock is a library that cc compiles")
def test_wrong_clock(nodes: Nodes, tmp_path: Path) -> None:
    source, library, etc = tmp_path / "shift.c", tmp_path / "shift.so", tmp_path / "etc"
    source.write_text(_SHIFT)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True, timeout=60)
    shutil.copytree("/etc", etc, symlinks=True, ignore_dangling_symlinks=True)
    shutil.copy(nodes.slurm.nodes.hosts, etc / "hosts")
    (etc / "ld.so.preload").write_text(f"{library}\n")  # for every program of that node
    with nodes.mounted("n3", "--bind", str(etc), "/etc"):
        found = nodes.findings()
    assert "n3: its clock is 7.0 s ahead of that of the other nodes" in one_with(found, "clock is")


@on_slurm
def test_no_kernels(nodes: Nodes, tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    nothing.touch()  # and it cannot be executed
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    with contextlib.ExitStack() as hidden:
        for folder in (build.cache_folder(), build.PREBUILT):
            if folder.is_dir():
                over = ("-t", "tmpfs", "tmpfs", str(folder))
                hidden.enter_context(nodes.mounted("n2", *over))
        if compiler:
            real = os.path.realpath(compiler)
            hidden.enter_context(nodes.mounted("n2", "--bind", str(nothing), real))
        found = nodes.findings()
    assert "n2: no kernels on the cpu: there is no C++ compiler" in one_with(found, "kernels on")


@on_slurm
def test_slow_processors(nodes: Nodes) -> None:
    """What Slurm starts on n3 gets a quarter of a processor."""
    group = Path("/sys/fs/cgroup/cpu") / f"bigtrain-test-{os.getpid()}"
    daemon = int((nodes.slurm.folder / "run" / "slurmd.n3.pid").read_text())
    mine = [pid for pid in _pids("slurmd") if _names(pid)[-1:] == [str(daemon)] and _is_n3(pid)]
    assert mine
    try:
        group.mkdir()
        (group / "cpu.cfs_period_us").write_text("4000")
        (group / "cpu.cfs_quota_us").write_text("1000")
    except OSError as error:
        pytest.skip(f"no cgroup of version 1 limits processors here: {error}")
    try:
        for pid in mine:
            (group / "cgroup.procs").write_text(str(pid))
        found = nodes.findings()
    finally:
        for pid in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):
                (group.parent / "cgroup.procs").write_text(pid)
        group.rmdir()
    assert "rank 2 on n3 (" in one_with(found, "is slow: a matrix product")


def _pids(name: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (path / "comm").read_text().strip() == name:
                found.append(int(path.name))
    return found


def _names(pid: int) -> list[str]:
    """Return the numbers that a process has, the last is that in its own namespace."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("NSpid:"):
                return line.split()[1:]
    return []


def _is_n3(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return "n3" in Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    return False


@on_slurm
def test_several_ranks_on_each_node(nodes: Nodes, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"run: {{dir: {nodes.work}/runs/one}}\nlaunch: {{nodes: 7}}\n")
    _, text = nodes.doctor(str(config), "--ranks-per-node", "2")
    assert re.search(r"^n3 .* 2 x ", text, re.MULTILINE), text
    assert "over 6 ranks" in text


@on_slurm
def test_ranks_of_srun_are_refused(nodes: Nodes) -> None:
    code, text = nodes.doctor(starter="srun")
    assert code == 1
    assert "srun has started this as one of several ranks" in text


@on_slurm
def test_folder_that_a_node_does_not_see(nodes: Nodes) -> None:
    """What the nodes are to do is written where n2 has another file system."""
    with nodes.mounted("n2", "-t", "tmpfs", "tmpfs", str(nodes.work)):
        code, text = nodes.doctor(leaves=1)
    assert code == 1
    assert "error: rank 1 on n2" in text, text
    assert "all nodes must see the folder" in text


def alone(cwd: Path, *options: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [BIN / "bigtrain", "doctor", *options], cwd=cwd, capture_output=True, text=True, timeout=100
    )
    assert "Traceback" not in done.stdout + done.stderr
    return done


def test_alone(tmp_path: Path) -> None:
    done = alone(tmp_path, "--quick")
    assert done.stderr == ""
    assert "adamw_ " in done.stdout
    assert re.search(r"^node +cores .*\n\S+ +\d+ ", done.stdout, re.MULTILINE), done.stdout
    assert done.returncode == (0 if "nothing is wrong" in done.stdout else 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("nothing.yaml",), "nothing.yaml"),
        (("--hosts", "a,a"), "a twice"),
        (("--ranks-per-node", "0"), "ranks-per-node"),
        ((str(ROOT / "README.md"),), "README.md"),
    ],
)
def test_bad_input(tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    done = alone(tmp_path, *options)
    assert done.returncode != 0
    assert words in done.stderr
    assert list(tmp_path.iterdir()) == []
