"""Timelines to look at: a picture of several schedules on one clock, and text for the terminal."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigtrain.errors import BigtrainError
from bigtrain.pipeline.simulate import Span, Timeline
from bigtrain.pipeline.table import COMPUTE

SUFFIXES = (".svg", ".png")
MAX_CELLS = 20_000

_SHADES = {  # of the first and the last stage of a rank; told apart by all kinds of colour vision
    "F": ("#1f5fa8", "#a9cdf0"),
    "B": ("#c2500f", "#f9c193"),
    "I": ("#c2500f", "#f9c193"),
    "W": ("#2f6b52", "#a6d8c0"),
}
_MEANING = {
    "F": "forward",
    "B": "backward",
    "I": "input gradient",
    "W": "weight gradient",
}
_MEMORY = "#7a7a86"
_IDLE = "#f0f0f3"
_WIDTH = 13.0  # inches, of which the two columns take these shares
_LEFT, _GANTT, _GAP, _CURVE = 0.052, 0.715, 0.022, 0.19
_ROW, _TITLE, _TOP, _BOTTOM = 0.3, 0.5, 0.3, 0.5  # inches
_FONT = (4.5, 9.0)


def draw(timelines: Mapping[str, Timeline], path: str | Path) -> None:
    """Draw `timelines` below one another on one time scale, as SVG or PNG by the suffix of `path`.

    Each has its ranks as rows, microbatch numbers in the cells, idle time left empty, and beside it
    what each rank holds in memory, counted in microbatches of all its stages.

    Raises:
        BigtrainError: another suffix, too much to draw, or the file cannot be written.
    """
    check_path(path)
    num_cells = sum(len(row) for timeline in timelines.values() for row in timeline.spans)
    if num_cells > MAX_CELLS:
        raise BigtrainError(
            f"{num_cells:,} actions are too many to draw",
            mend=f"draw fewer ranks or microbatches, at most {MAX_CELLS:,} actions",
        )
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # slow to import, and needed once

    heights = [_TITLE + _ROW * len(timeline.spans) for timeline in timelines.values()]
    total = _TOP + sum(heights) + _BOTTOM
    figure = Figure(figsize=(_WIDTH, total), dpi=130)
    last = max((float(timeline.step_time) for timeline in timelines.values()), default=0) or 1.0
    peak = max((_peak(timeline) for timeline in timelines.values()), default=0) or 1.0
    top = total - _TOP
    for index, (name, timeline) in enumerate(timelines.items()):
        height = _ROW * len(timeline.spans)
        low = (top - _TITLE - height) / total
        gantt = figure.add_axes((_LEFT, low, _GANTT, height / total))
        curve = figure.add_axes((_LEFT + _GANTT + _GAP, low, _CURVE, height / total))
        _draw_gantt(gantt, name, timeline, last)
        _draw_memory(curve, timeline, last, peak, index == 0)
        if index == len(timelines) - 1:
            gantt.set_xlabel("time", fontsize=9)
            curve.set_xlabel("time", fontsize=9)
        top -= _TITLE + height
    _draw_legend(figure, timelines)
    with rc_context({"svg.hashsalt": "bigtrain"}):  # the same picture twice, byte for byte
        _save(figure, Path(path))


def check_path(path: str | Path) -> None:
    """Raise a BigtrainError if `path` does not end like a picture that can be drawn."""
    if Path(path).suffix.lower() not in SUFFIXES:
        raise BigtrainError(
            f"cannot draw into {str(path)!r}",
            why="the suffix says what kind of picture to write",
            mend=f"give a path that ends in {' or '.join(SUFFIXES)}",
        )


def _save(figure: Any, path: Path) -> None:
    metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
    try:
        figure.savefig(path, metadata=metadata)
    except (OSError, ValueError) as error:
        raise BigtrainError(
            f"cannot write the picture: {getattr(error, 'strerror', None) or error}",
            where=str(path),
            mend="give a path in a folder that exists and can be written to",
        ) from None


def _draw_gantt(axes: Any, name: str, timeline: Timeline, last: float) -> None:
    num_ranks = len(timeline.spans)
    axes.axvspan(0, float(timeline.step_time), color=_IDLE, lw=0)
    for rank, row in enumerate(timeline.spans):
        stages = timeline.table.stages_of(rank)
        bars: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for span in row:
            bars[_colour(span, stages)].append((float(span.start), float(span.stop - span.start)))
        for colour, cells in bars.items():
            axes.broken_barh(
                cells, (rank - 0.46, 0.92), facecolor=colour, edgecolor="white", lw=0.6
            )
    _label_cells(axes, timeline, last)
    share = f"bubble {float(timeline.bubble):.1%}".replace("%", " %")
    facts = f"{share}, step time {_number(timeline.step_time)}"
    axes.set_title(f"{name}", loc="left", fontsize=12, fontweight="bold", pad=5)
    axes.set_title(facts, loc="right", fontsize=10, pad=5)
    axes.set(xlim=(0, last), ylim=(num_ranks - 0.5, -0.5))
    axes.set_yticks(range(num_ranks), [f"rank {rank}" for rank in range(num_ranks)], fontsize=9)
    _plain(axes)


def _label_cells(axes: Any, timeline: Timeline, last: float) -> None:
    """Write microbatch numbers, in the largest letters that fit into all cells; or none."""
    points = _WIDTH * _GANTT * 72 / last
    fits = [
        (float(span.stop - span.start) * points - 2) / (0.64 * len(str(span.action.microbatch)))
        for row in timeline.spans
        for span in row
        if span.stop > span.start
    ]
    size = min([_FONT[1], *fits])
    if size < _FONT[0]:
        return
    for rank, row in enumerate(timeline.spans):
        stages = timeline.table.stages_of(rank)
        for span in row:
            if span.stop > span.start:
                middle = float(span.start + span.stop) / 2
                ink = _ink(_colour(span, stages))
                number = str(span.action.microbatch)
                axes.text(
                    middle, rank + 0.02, number, color=ink, fontsize=size, ha="center", va="center"
                )


def _draw_memory(axes: Any, timeline: Timeline, last: float, peak: float, first: bool) -> None:
    """Draw what each rank holds over time, beside its row, with its peak as a number."""
    for rank, curve in enumerate(timeline.memory):
        size = max(1, len(timeline.table.stages_of(rank)))
        times = [float(time) for time, _ in curve] + [float(timeline.step_time)]
        held = [float(value) / size for _, value in curve]
        heights = [rank + 0.46 - 0.86 * value / peak for value in [*held, held[-1]]]
        base = rank + 0.46
        axes.fill_between(times, heights, base, step="post", color=_MEMORY, alpha=0.55, lw=0)
        axes.axhline(base, color="#c9c9d0", lw=0.6)
        axes.text(
            last * 1.015,
            rank,
            _number(max(held)),
            fontsize=9,
            va="center",
            ha="left",
            clip_on=False,
        )
    if first:
        title = "microbatches held, and their peak"
        axes.set_title(title, loc="left", fontsize=9, pad=5)
    axes.set(xlim=(0, last), ylim=(len(timeline.memory) - 0.5, -0.5))
    axes.set_yticks([])
    _plain(axes)


def _plain(axes: Any) -> None:
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.tick_params(length=0, labelsize=8)


def _draw_legend(figure: Any, timelines: Mapping[str, Timeline]) -> None:
    from matplotlib.patches import Patch

    tables = [timeline.table for timeline in timelines.values()]
    present = {action.kind for table in tables for row in table.rows for action in row}
    kinds = [kind for kind in COMPUTE if kind in present]
    if {"B", "I"} <= present:  # they share a colour, as their shape tells them apart
        kinds.remove("I")
    names = {**_MEANING, "B": "backward, or its input gradient" if "I" in present else "backward"}
    patches = [Patch(facecolor=_SHADES[kind][0], label=names[kind]) for kind in kinds]
    if any(table.num_stages > table.num_ranks for table in tables):
        patches.append(Patch(facecolor=_SHADES["F"][1], label="paler: a rank's later stages"))
    patches.append(Patch(facecolor=_IDLE, edgecolor="#c9c9d0", label="idle"))
    figure.legend(
        handles=patches,
        loc="upper left",
        bbox_to_anchor=(_LEFT - 0.006, 1.0),
        ncols=len(patches),
        frameon=False,
        fontsize=10,
        handlelength=1.2,
        columnspacing=1.8,
    )


def _colour(span: Span, stages: tuple[int, ...]) -> str:
    """Return the colour of a cell: its kind, paler the later its stage is among the rank's."""
    dark, pale = _SHADES[span.action.kind]
    part = stages.index(span.action.stage) / max(1, len(stages) - 1)
    mixed = [
        round(int(dark[i : i + 2], 16) * (1 - part) + int(pale[i : i + 2], 16) * part)
        for i in (1, 3, 5)
    ]
    return "#" + "".join(f"{value:02x}" for value in mixed)


def _ink(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 140 else "#1a1a1a"


def _peak(timeline: Timeline) -> float:
    return max(
        float(value) / max(1, len(timeline.table.stages_of(rank)))
        for rank, curve in enumerate(timeline.memory)
        for _, value in curve
    )


def _number(value: Any) -> str:
    return f"{float(value):.4g}"


def table_text(timeline: Timeline, width: int | None = None) -> str:
    """Return `timeline` as text: a line per rank, time across, "." where it idles.

    What is beyond `width` characters is left out, and the last line says so.
    """
    several = timeline.table.num_stages > timeline.table.num_ranks
    labels = [[_label(span, several) for span in row] for row in timeline.spans]
    longest = max((len(label) for row in labels for label in row), default=1)
    lengths = [
        float(span.stop - span.start)
        for row in timeline.spans
        for span in row
        if span.stop > span.start
    ]
    if not lengths:
        return "(every action takes no time)"
    shortest = max(min(lengths), max(lengths) / 8)  # a tiny one may not blow up all others
    scale = (longest + several) / shortest
    columns = round(float(timeline.step_time) * scale)
    head = len(f"rank {len(labels) - 1}") + 3
    room = columns if width is None else max(10, width - head)
    lines = [" " * (head - 2) + "| " + _axis(float(timeline.step_time), scale, room)]
    for rank, row in enumerate(timeline.spans):
        cells = ["."] * min(columns, room)
        for span, label in zip(row, labels[rank], strict=True):
            start, stop = (round(float(time) * scale) for time in (span.start, span.stop))
            text = label.ljust(stop - start - several, "-")[: stop - start] + " " * several
            for place, letter in enumerate(text[: stop - start], start):
                if place < len(cells):
                    cells[place] = letter
        lines.append(f"{f'rank {rank}'.ljust(head - 3)} | {''.join(cells).rstrip()}")
    if columns > room:
        seen = _number(math.floor(room / scale))
        lines.append(
            f"(shown up to time {seen} of {_number(timeline.step_time)}: widen the terminal, or "
            "see the picture)"
        )
    return "\n".join(line.rstrip() for line in lines)


def _label(span: Span, several: bool) -> str:
    action = span.action
    return str(action) if several else f"{action.kind}{action.microbatch}"


def _axis(step_time: float, scale: float, room: int) -> str:
    """Return numbers along the time axis, at round times about 12 letters or more apart."""
    least = 12 / scale
    power = 10.0 ** math.floor(math.log10(least))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least)
    axis = ""
    for index in range(int(step_time / step) + 1):
        place, text = round(index * step * scale), _number(index * step)
        if place + len(text) <= room:
            axis = axis.ljust(place) + text
    return axis
