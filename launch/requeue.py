"""What a Slurm job does at an end that is not the run's: it queues up again, where it may."""

from __future__ import annotations

import contextlib
import re
import signal
import time
from collections.abc import Callable, Mapping

from bigtrain.errors import LaunchError

from .outcome import Ended
from .slurm import seconds_of
from .slurm_commands import Ask, ask_slurm, job_facts, patiently

_PREEMPTED = "pre-empted"
_MOST_VAIN_RESTARTS = 3
UNFINISHED = 75  # EX_TEMPFAIL: all is well, start it again


def queue_again(
    ended: Ended,
    env: Mapping[str, str],
    progressed: bool,
    say: Callable[[str], None],
    ask: Ask = ask_slurm,
    sleep: Callable[[float], None] = time.sleep,
) -> Ended:
    """Requeue the job if its time was up, it is pre-empted, or it lost a node; return the error.

    Time that was up without a new checkpoint would be up again; and who loses nodes again and again
    without one is given up, too. The error's exit code is UNFINISHED where somebody should start
    the run again.
    """
    job = job_number(env)
    for number in (signal.SIGTERM, signal.SIGUSR1):  # a requeue, begun, is not to be cut off
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(number, signal.SIG_IGN)
    try:
        facts = patiently(lambda: job_facts(job, ask), sleep)
        reason = _reason(ended, facts, env)
        if reason is None or facts.get("BatchFlag") == "0":  # of salloc, somebody is there to see
            return ended
        if not progressed and not _may_try_again(ended, reason, env):
            say(f"{reason}, but nothing new was saved: it is not queued again")
            return ended
        ended.exit_code = UNFINISHED
        if facts.get("Requeue") == "0":
            say(f"{reason}: it may not queue up again by itself (launch.slurm.requeue)")
        else:
            say(f"{reason}: job {job} queues up again, and goes on from its last checkpoint")
            patiently(lambda: ask(["scontrol", "requeue", job]), sleep)
    except LaunchError as error:
        say(f"job {job} could not be requeued: {error}")
    return ended


def job_number(env: Mapping[str, str]) -> str:
    """Return how Slurm names this job alone: the number of an array means all of its jobs."""
    if "SLURM_ARRAY_JOB_ID" in env and "SLURM_ARRAY_TASK_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env["SLURM_JOB_ID"]


def _reason(ended: Ended, facts: Mapping[str, str], env: Mapping[str, str]) -> str | None:
    if facts.get("JobState", "RUNNING") != "RUNNING" and not _is_over_time(facts):
        return None  # it is cancelled, whatever happened besides, or Slurm queues it again itself
    if ended.asked == signal.SIGUSR1:
        return "time is nearly up"
    if ended.lost_nodes and _may_have_died(ended, env):
        return f"lost {', '.join(ended.lost_nodes)}"
    preempted = facts.get("PreemptTime", "None") not in ("None", "Unknown", "(null)")
    return _PREEMPTED if ended.asked == signal.SIGTERM and preempted else None


def _is_over_time(facts: Mapping[str, str]) -> bool:
    """Tell whether Slurm ends the job because its time is up, when it says COMPLETING."""
    took, limit = (facts.get(name, "") for name in ("RunTime", "TimeLimit"))
    known = all(re.fullmatch(r"(\d+-)?\d+:\d+:\d+", time) for time in (took, limit))
    return known and seconds_of(took) >= seconds_of(limit)


def _may_have_died(ended: Ended, env: Mapping[str, str]) -> bool:
    """Tell a node that is gone from one that was never fit to take part.

    Who has not joined at all is dead only where all have once joined; else something is wrong with
    how nodes are set up, which is so the next time as well.
    """
    return ended.how_lost == "gone" or (
        ended.how_lost == "absent" and env.get("SLURM_RESTART_COUNT", "0") != "0"
    )


def _may_try_again(ended: Ended, reason: str, env: Mapping[str, str]) -> bool:
    """Tell whether nothing new saved is no sign that it will always be so."""
    restarts = env.get("SLURM_RESTART_COUNT", "0")
    few = restarts.isdecimal() and int(restarts) < _MOST_VAIN_RESTARTS
    return reason == _PREEMPTED or (bool(ended.lost_nodes) and few)
