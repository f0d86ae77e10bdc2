"""What a Slurm job does at an end that is not the run's: it queues up again, where it may."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping

from bigtrain.errors import LaunchError

from .outcome import Ended
from .slurm_commands import Ask, ask_slurm, job_facts

UNFINISHED = 75  # EX_TEMPFAIL: all is well, start it again


def queue_again(
    ended: Ended,
    env: Mapping[str, str],
    progressed: bool,
    say: Callable[[str], None],
    ask: Ask = ask_slurm,
) -> Ended:
    """Requeue the job if its time was up, it is pre-empted, or it lost a node; return the error.

    A job that took no step is not requeued: it would not get further the next time. The error's
    exit code is UNFINISHED where somebody should start the run again.
    """
    job = env["SLURM_JOB_ID"]
    try:
        facts = job_facts(job, ask)
        reason = _reason(ended, facts)
        if reason is None:
            return ended
        if not progressed:
            say(f"{reason}, but the run took no step: it is not queued again")
            return ended
        ended.exit_code = UNFINISHED
        if facts.get("Requeue") == "0":
            say(f"{reason}: it may not queue up again by itself (launch.slurm.requeue)")
        else:
            say(f"{reason}: job {job} queues up again, and goes on from its last checkpoint")
            ask(["scontrol", "requeue", job])
    except LaunchError as error:
        say(f"job {job} could not be requeued: {error}")
    return ended


def _reason(ended: Ended, facts: Mapping[str, str]) -> str | None:
    if ended.asked == signal.SIGUSR1:
        return "time is nearly up"
    if ended.lost_nodes:
        return f"lost {', '.join(ended.lost_nodes)}"
    preempted = facts.get("PreemptTime", "None") not in ("None", "Unknown", "(null)")
    return "pre-empted" if ended.asked == signal.SIGTERM and preempted else None
