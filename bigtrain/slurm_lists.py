"""Lists as Slurm writes them: of nodes, n[1-3,7], and of counts per node, 4(x2),8."""

from __future__ import annotations

import re
import subprocess

from bigtrain.errors import PlanError


def node_names(names: str) -> list[str]:
    """Return the nodes that a list of nodes means; scontrol knows.

    Raises:
        PlanError: there is no scontrol here, or it cannot read the list.
    """
    try:
        done = subprocess.run(
            ["scontrol", "show", "hostnames", names], capture_output=True, text=True, timeout=30
        )
        nodes = done.stdout.split()
        error = done.stderr.strip() or "it printed nothing"
    except (OSError, subprocess.TimeoutExpired) as failure:
        nodes, error = [], str(failure)
    if not nodes:
        raise PlanError(
            f"scontrol cannot tell the nodes of {names!r}: {error}",
            where="environment",
            why="a Slurm job names its nodes in a list that scontrol expands",
            mend="make Slurm's commands available here (in a container: mount them)",
        )
    return nodes


def counts_per_node(counts: str) -> list[int]:
    """Return [4, 4, 8] for "4(x2),8"."""
    found: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        found += [int(count)] * int(times or 1)
    return found
