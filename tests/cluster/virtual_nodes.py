"""Several nodes on this machine: namespaces of network, names, processes and mounts, on a bridge.

A node is held by one process; SIGKILL on it is the end of the node and of all that runs there. The
bridge is in a namespace of its own, so nothing gets out. Files are shared, as on a cluster. Needs
root and iproute2.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_INIT = """
hostname {name}
mount --bind {hosts} /etc/hosts
mkdir -p {cgroups}; mount --rbind /sys/fs/cgroup {cgroups}
mount -t sysfs sysfs /sys; mount --rbind {cgroups} /sys/fs/cgroup
mount -t tmpfs -o size=1g tmpfs /dev/shm
: > {ready}
while :; do sleep 3600 & wait $!; done
"""
MANAGER = "ctl"


def why_no_nodes() -> str:
    """Return why this machine cannot have virtual nodes; nothing, if it can."""
    missing = [tool for tool in ("unshare", "nsenter", "ip", "mount") if not shutil.which(tool)]
    if missing:
        return f"virtual nodes need {', '.join(missing)}"
    if os.geteuid() != 0:
        return "virtual nodes need root"
    tried = subprocess.run(["unshare", "-n", "-u", "-m", "-p", "-i", "-f", "true"], check=False)
    return "" if tried.returncode == 0 else "this machine lets nobody make namespaces"


class VirtualNodes:
    """Nodes n1, n2, ... at 198.18.0.11, .12, ...; `ctl` at 198.18.0.1 is where a user logs in."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.names = folder, [f"n{i}" for i in range(1, count + 1)]
        self.switch = f"bt{secrets.token_hex(4)}"
        self.hosts = folder / "hosts"
        self._holders: dict[str, subprocess.Popen[bytes]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        lines = ["127.0.0.1 localhost", f"198.18.0.1 {MANAGER}"]
        lines += [f"{self.address(name)} {name}" for name in self.names]
        self.hosts.write_text("\n".join(lines) + "\n")
        _run("ip", "netns", "add", self.switch)
        _run("ip", "-n", self.switch, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", self.switch, "addr", "add", "198.18.0.1/24", "dev", "br0")
        for link in ("br0", "lo"):
            _run("ip", "-n", self.switch, "link", "set", link, "up")
        self._boot(MANAGER, net=self.switch)
        for name in self.names:
            self.boot(name)

    @staticmethod
    def address(name: str) -> str:
        return f"198.18.0.{10 + int(name[1:])}"

    # -- what happens to nodes -----------------------------------------------------------------

    def boot(self, name: str) -> None:
        """Switch a node on."""
        port = f"p{name}"
        subprocess.run(["ip", "-n", self.switch, "link", "del", port], stderr=subprocess.DEVNULL)
        pid = self._boot(name)
        # Always the same card, or others would send to the one before for a while.
        card = ("address", f"02:00:00:00:00:{10 + int(name[1:]):02x}")
        peer = ("type", "veth", "peer", "name", "eth0", *card, "netns", str(pid))
        _run("ip", "-n", self.switch, "link", "add", port, *peer)
        _run("ip", "-n", self.switch, "link", "set", port, "master", "br0", "up")
        for words in (
            "link set lo up",
            f"addr add {self.address(name)}/24 dev eth0",
            "link set eth0 up",
        ):
            _run(*self.inside(name), "ip", *words.split())

    def _boot(self, name: str, net: str | None = None) -> int:
        ready, cgroups = self.folder / f"ready.{name}", self.folder / f"cgroups.{name}"
        ready.unlink(missing_ok=True)
        script = _INIT.format(name=name, hosts=self.hosts, cgroups=cgroups, ready=ready)
        enter = ["nsenter", f"--net=/run/netns/{net}"] if net else []
        spaces = ["-u", "-m", "-p", "-i", *([] if net else ["-n"])]
        hold = [*enter, "unshare", *spaces, "-f", "--kill-child=SIGKILL", "--mount-proc"]
        with open(self.folder / f"boot.{name}.log", "wb") as log:
            holder = subprocess.Popen(
                [*hold, "bash", "-e", "-c", script],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._holders[name] = holder
        end = time.monotonic() + 30
        while not ready.exists():
            if holder.poll() is not None or time.monotonic() > end:
                text = (self.folder / f"boot.{name}.log").read_text()
                raise RuntimeError(f"node {name} does not boot: {text}")
            time.sleep(0.01)
        return self._first_process(name)

    def _first_process(self, name: str) -> int:
        holder = self._holders[name].pid
        return int(Path(f"/proc/{holder}/task/{holder}/children").read_text().split()[0])

    def kill(self, name: str) -> None:
        """Take the power from a node: everything on it is gone at once."""
        holder = self._holders.pop(name)
        with contextlib.suppress(ProcessLookupError):
            holder.send_signal(signal.SIGKILL)  # and with it, its child, process 1 of the node
        holder.wait(10)

    def cut(self, name: str) -> None:
        """Pull the plug of a node's network: it runs on, and nobody hears of it."""
        _run("ip", "-n", self.switch, "link", "set", f"p{name}", "down")

    def mend(self, name: str) -> None:
        _run("ip", "-n", self.switch, "link", "set", f"p{name}", "up")

    def shape(self, name: str, rate: str) -> None:
        """Limit what a node sends, like "20mbit"."""
        limit = ("tbf", "rate", rate, "burst", "64kb", "latency", "100ms")
        _run(*self.inside(name), "tc", "qdisc", "replace", "dev", "eth0", "root", *limit)

    def close(self) -> None:
        for name in list(self._holders):
            self.kill(name)
        subprocess.run(["ip", "netns", "del", self.switch], check=False)

    # -- what happens on nodes -----------------------------------------------------------------

    def inside(self, name: str, cwd: Path | None = None) -> list[str]:
        """Return the command that runs the words after it on that node."""
        enter = ["nsenter", "-t", str(self._first_process(name)), "-n", "-u", "-m", "-p", "-i"]
        return [*enter, f"--wdns={cwd or Path.cwd()}", "--"]

    def run(self, name: str, *command: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command on a node and return what came of it."""
        options = {"timeout": 60, "capture_output": True, "text": True, **options}
        return subprocess.run([*self.inside(name, options.get("cwd")), *command], **options)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    if done.returncode:
        raise RuntimeError(f"{_words(command)}: {done.stderr.strip()}")


def _words(command: Sequence[str]) -> str:
    return " ".join(command)
