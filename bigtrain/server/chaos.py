"""Drills: what is to go wrong in a run, and when. No torch.

    kill:worker=1,step=20            SIGKILL
    stop:server=0,step=20,seconds=5  SIGSTOP, and SIGCONT after that time
    cut:worker=1,step=20,seconds=5   nothing passes on any of its links, for that time
    delay:worker=1,step=20,seconds=2,ms=50   each frame that it sends waits that long

The process that is meant does it to itself: a server after that step's update, a worker once its
part of that step is computed. It tells its launcher before, who does not ask it for that again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from bigtrain.errors import BigtrainError
from bigtrain.lifetime import report

What = Literal["kill", "stop", "cut", "delay"]
_MEND = "write it like kill:worker=1,step=20 or stop:server=0,step=20,seconds=5"
# Waits, then wakes its parent. A process of its own, since the one that is stopped cannot.
# If that is gone, its number may be another's: it is woken only while it is the parent.
_WAKE = (
    "import os,sys,time; time.sleep(float(sys.argv[1])); "
    "os.getppid() == int(sys.argv[2]) and os.kill(int(sys.argv[2]), 18)"
)


@dataclass(frozen=True)
class Event:
    """What happens to a worker or a server at a step. seconds: for how long; ms: of delay."""

    what: What
    role: Literal["worker", "server"]
    index: int
    step: int
    seconds: float = 5.0
    ms: float = 50.0

    def __str__(self) -> str:
        text = f"{self.what}:{self.role}={self.index},step={self.step}"
        if self.what != "kill":
            text += f",seconds={self.seconds:.15g}"
        return text + (f",ms={self.ms:.15g}" if self.what == "delay" else "")


def parse(text: str) -> Event:
    """Return the event that `text` describes.

    Raises:
        BigtrainError: it describes none.
    """
    what, _, rest = text.partition(":")
    pairs = [pair.partition("=")[::2] for pair in rest.split(",") if pair]
    given = dict(pairs)
    roles = [role for role in ("worker", "server") if role in given]

    def refuse(why: str) -> BigtrainError:
        return BigtrainError(f"--chaos {text} is no event", why=why, mend=_MEND)

    if what not in get_args(What):
        raise refuse(f"what happens is one of {', '.join(get_args(What))}")
    if len(roles) != 1:
        raise refuse("it says of one worker or one server what happens to it")
    if unknown := given.keys() - {*roles, "step", "seconds", "ms"}:
        raise refuse(f"{sorted(unknown)[0]} is not known")
    if twice := [name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i])]:
        raise refuse(f"{twice[0]} is there twice")
    try:
        values = {name: float(value) for name, value in given.items()}
    except ValueError:
        raise refuse("all values are numbers") from None
    whole = [values[roles[0]], values.get("step", 0.0)]
    if "step" not in values or any(v < 0 or not v.is_integer() for v in whole):
        raise refuse("a number of a worker or server, and a step, are whole numbers")
    if any(not 0 <= v < 1e6 for v in values.values()):
        raise refuse("all values are 0 or more, and less than a million")
    more = {name: values[name] for name in ("seconds", "ms") if name in values}
    return Event(what, roles[0], *map(int, whole), **more)  # type: ignore[arg-type]


class Chaos:
    """The events of one process. If it was started again, those are over that were due before it
    was there."""

    def __init__(self, events: Sequence[Event], role: str, index: int, incarnation: int) -> None:
        mine = [event for event in events if (event.role, event.index) == (role, index)]
        self.events = sorted(mine, key=lambda event: event.step)
        self._joins = incarnation > 0

    def due(self, step: int) -> list[Event]:
        """Return the events up to `step`, each once, and tell the launcher."""
        if self._joins:
            self._joins = False
            self.events = [event for event in self.events if event.step > step]
        due = [event for event in self.events if event.step <= step]
        self.events = [event for event in self.events if event.step > step]
        for event in due:  # before: this process may not live to remember it
            report({"drill": str(event)})
        return due


def left_over(events: Sequence[Event], done: Event) -> tuple[Event, ...]:
    """Return what is left when a process has been through `done`, and all that it had before. If it
    is started again, it may join at an earlier round."""
    who = (done.role, done.index)
    return tuple(e for e in events if (e.role, e.index) != who or e.step > done.step)


def suffer(event: Event) -> None:
    """Do to this process what the event says, if that is done by a signal."""
    if event.what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif event.what == "stop":
        words = [sys.executable, "-c", _WAKE, str(event.seconds), str(os.getpid())]
        subprocess.Popen(words, stdin=subprocess.DEVNULL)
        os.kill(os.getpid(), signal.SIGSTOP)
