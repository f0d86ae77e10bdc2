"""A real Slurm on virtual nodes: munged, slurmctld, one slurmd per node; up in a second."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import subprocess
import time
from pathlib import Path

from virtual_nodes import MANAGER, VirtualNodes, why_no_nodes

_CONF = """
ClusterName=bigtrain
SlurmctldHost={manager}(198.18.0.1)
AuthInfo=socket={folder}/munge/sock
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=5
SlurmctldTimeout=5
MessageTimeout=5
KillWait=5
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/jobcomp.txt
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={names} CPUs=4 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def why_no_slurm() -> str:
    """Return why Slurm cannot run here; nothing, if it can."""
    missing = [tool for tool in ("slurmctld", "slurmd", "munged", "srun") if not shutil.which(tool)]
    if missing:
        return f"Slurm is not installed ({', '.join(missing)}): make slurm"
    return why_no_nodes()


class Slurm:
    """Nodes n1, n2, ... under one controller, on `ctl`, where commands are given."""

    def __init__(self, folder: Path, num_nodes: int) -> None:
        self.folder = folder
        for part in ("munge", "state", "spool", "log", "run"):
            (folder / part).mkdir(parents=True)
        (folder / "munge").chmod(0o700)
        self.nodes = VirtualNodes(folder / "nodes", num_nodes)
        self.conf = folder / "slurm.conf"
        names = ",".join(self.nodes.names)
        self.conf.write_text(_CONF.format(folder=folder, manager=MANAGER, names=names))
        self.env = {"SLURM_CONF": str(self.conf)}
        key = folder / "munge" / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        munge = self.folder / "munge"
        self._run(
            *("munged", f"--key-file={munge}/key", f"--socket={munge}/sock", "--force"),
            *(f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed"),
        )
        self._run("slurmctld", "-f", str(self.conf), "-c")
        _wait("slurmctld", lambda: "is UP" in self.ask("scontrol", "ping"))
        for name in self.nodes.names:
            self.start_daemon(name)
        count = len(self.nodes.names)
        _wait(
            "idle nodes",
            lambda: self.ask("sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D") == str(count),
        )

    def start_daemon(self, name: str) -> None:
        """Start slurmd on a node, after it was booted."""
        done = self.nodes.run(name, "slurmd", "-f", str(self.conf), "-N", name)
        assert done.returncode == 0, done.stderr

    # -- commands ------------------------------------------------------------------------------

    def _run(self, *command: str) -> str:
        done = self.nodes.run(MANAGER, *command, env={**os.environ, **self.env})
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout

    def ask(self, *command: str) -> str:
        """Return what a command of Slurm prints on `ctl`, whatever its exit code."""
        done = self.nodes.run(MANAGER, *command, env={**os.environ, **self.env})
        return done.stdout.strip()

    def job(self, number: int | str) -> dict[str, str]:
        """Return what `scontrol show job` knows of a job."""
        text = self.ask("scontrol", "show", "job", "-o", str(number))
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def state(self, number: int | str) -> str:
        return self.job(number).get("JobState", "")

    def nodes_of(self, number: int) -> list[str]:
        """Return the names of the nodes of a job, the first is where its script runs."""
        names = self.job(number)["NodeList"]
        return self.ask("scontrol", "show", "hostnames", names).split()

    def wait_state(self, number: int, *states: str, seconds: float = 120.0) -> str:
        """Return the state of a job once it is one of these."""
        _wait(f"job {number} to be {states}", lambda: self.state(number) in states, seconds)
        return self.state(number)

    def start_now(self, number: int | str) -> None:
        """Start a requeued job without the two minutes that Slurm waits."""
        _wait(f"job {number} to be requeued", lambda: self.state(number) == "PENDING")
        # What is left of the run before would be taken for the end of the next one: the reason why
        # Slurm waits.
        _wait("its nodes", lambda: not self.ask("sinfo", "-h", "-t", "completing", "-o", "%n"))
        time.sleep(2.0)
        self._run("scontrol", "update", f"JobId={number}", "StartTime=now")

    def cancel_all(self) -> None:
        """Leave no job behind, and all nodes idle."""
        self.ask("scancel", "-u", "root")
        _wait("an empty queue", lambda: not self.ask("squeue", "-h"), 60)

    def close(self) -> None:
        with contextlib.suppress(OSError, subprocess.SubprocessError, RuntimeError, IndexError):
            self.ask("scontrol", "shutdown")
        pid = self.folder / "munge" / "pid"
        self.nodes.close()  # and with each node, all that runs there
        with contextlib.suppress(OSError, ValueError):
            os.kill(int(pid.read_text()), 15)


def _wait(what: str, condition: object, seconds: float = 60.0) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds} s in vain for {what}")
        time.sleep(0.05)
