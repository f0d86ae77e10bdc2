"""What a schedule is made of: actions, and the table of who does which in what order."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from bigtrain.errors import BigtrainError

COMPUTE = ("F", "B", "I", "W")
WIRES = ("SEND_F", "RECV_F", "SEND_B", "RECV_B")

_SPELLING = re.compile(rf"([0-9]{{1,7}})({'|'.join(COMPUTE + WIRES)})([0-9]{{1,7}})")


@dataclass(frozen=True, slots=True)
class Action:
    """One thing that a rank does for one microbatch at one stage; written "2F0" or "1RECV_F3".

    Compute: F forward, B full backward, I input backward, W weight backward. Wires: SEND_F the
    output of F leaves for the next stage, RECV_F the input of F is awaited from the stage before,
    SEND_B the gradient of the stage's input leaves for the stage before, RECV_B the gradient of its
    output is awaited from the next stage. A RECV only posts; the compute action waits.
    """

    kind: str
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"

    @property
    def is_compute(self) -> bool:
        return self.kind in COMPUTE

    @classmethod
    def parse(cls, text: str) -> Action:
        """Return the action that is written as `text`: stage, kind, microbatch.

        Raises:
            BigtrainError: it is no action.
        """
        match = _SPELLING.fullmatch(text)
        if not match:
            shown = text if len(text) <= 40 else text[:40] + "..."
            raise BigtrainError(
                f"{shown!r} is not an action",
                why="an action is a stage number, what is done, and a microbatch number",
                mend=f"write it like 0F0 or 1RECV_F3; kinds are {', '.join(COMPUTE + WIRES)}",
            )
        return cls(match[2], int(match[1]), int(match[3]))


@dataclass(frozen=True)
class Table:
    """A pipeline schedule: what each rank does, in order.

    `placement` is the rank of each stage, by stage number. `rows` has one row per rank.
    """

    name: str
    placement: tuple[int, ...]
    num_microbatches: int
    rows: tuple[tuple[Action, ...], ...]

    @property
    def num_ranks(self) -> int:
        return len(self.rows)

    @property
    def num_stages(self) -> int:
        return len(self.placement)

    @property
    def has_wires(self) -> bool:
        return any(not action.is_compute for row in self.rows for action in row)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """Return the stages that are on `rank`, in ascending order."""
        return tuple(stage for stage, owner in enumerate(self.placement) if owner == rank)


def peer_of(action: Action, placement: Sequence[int]) -> int:
    """Return the rank at the other end of a SEND or RECV, or -1 where there is no such stage."""
    step = 1 if action.kind in ("SEND_F", "RECV_B") else -1
    stage = action.stage + step
    return placement[stage] if 0 <= stage < len(placement) else -1


def matching_send(receive: Action) -> Action:
    """Return the SEND that a RECV awaits."""
    if receive.kind == "RECV_F":
        return Action("SEND_F", receive.stage - 1, receive.microbatch)
    return Action("SEND_B", receive.stage + 1, receive.microbatch)


def matching_receive(send: Action) -> Action:
    """Return the RECV that awaits a SEND."""
    if send.kind == "SEND_F":
        return Action("RECV_F", send.stage + 1, send.microbatch)
    return Action("RECV_B", send.stage - 1, send.microbatch)


def need_of(action: Action, num_stages: int) -> tuple[str, int] | None:
    """Return what a compute action needs of its neighbour: ("F" or "B", stage), or None.

    "B" stands for the gradient of that stage's input, made by its B or its I.
    """
    if action.kind == "F" and action.stage > 0:
        return "F", action.stage - 1
    if action.kind in ("B", "I") and action.stage < num_stages - 1:
        return "B", action.stage + 1
    return None
