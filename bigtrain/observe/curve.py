"""A picture of the losses of a run, from its metrics.jsonl."""

from __future__ import annotations

from pathlib import Path

from bigtrain.observe.jsonl import read_lines


def draw_curve(metrics: Path, target: Path, references: dict[str, float]) -> None:
    """Draw training and validation loss over steps as PNG, with named horizontal references."""
    from matplotlib.figure import Figure  # slow to import, and needed once

    lines = read_lines(metrics)
    train = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
    held_out = [
        (x["step"], x["validation_loss"]) for x in lines if x.get("validation_loss") is not None
    ]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    if train:
        axes.plot(*zip(*train, strict=True), color="#9db8d9", linewidth=1, label="training")
        axes.plot(*zip(*_smooth(train), strict=True), color="#1f4e8c", label="training, smoothed")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="#c8501e", label="validation")
    for (name, value), style in zip(references.items(), ("--", ":", "-."), strict=False):
        axes.axhline(value, color="#555555", linestyle=style, linewidth=1)
        axes.annotate(
            f"{name} {value:.2f}",
            (0.995, value),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            color="#555555",
            fontsize=9,
        )
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if train or held_out:
        axes.legend(frameon=False)
    figure.savefig(target)


def _smooth(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return a running mean over a twentieth of the run."""
    width = max(1, len(points) // 20)
    values = [value for _, value in points]
    means = [
        sum(values[max(0, i - width + 1) : i + 1]) / (i + 1 - max(0, i - width + 1))
        for i in range(len(values))
    ]
    return [(step, mean) for (step, _), mean in zip(points, means, strict=True)]
