"""What compression does not go with. Used by configs, and by loops of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from bigtrain.config.schema import CompressionKind, CompressionSection, Config, ZeroSection
from bigtrain.errors import Problem

MOMENTUM: tuple[CompressionKind, ...] = ("default", "max")
PUBLISHED: tuple[CompressionKind, ...] = ("onebit", "zero_one")
COMPRESSED: tuple[CompressionKind, ...] = tuple(k for k in get_args(CompressionKind) if k != "none")
OWNED = tuple(k for k in COMPRESSED if k not in PUBLISHED)  # owners update, others follow
MESSAGES = tuple(k for k in OWNED if k != "powersgd")
# The kinds of compression that a key is for, and of what it speaks that others do not have.
COMPRESSION_KEYS: dict[str, tuple[tuple[CompressionKind, ...], str]] = {
    "node_degree": (
        MESSAGES,
        "it needs whole parameters, of all ranks",
    ),
    "block": (("safe", "int8", *MOMENTUM, *PUBLISHED), "no elements share a scale"),
    "transport": (
        MESSAGES,
        "what it sends goes by the process group alone",
    ),
    "least_numel": (COMPRESSED, ""),
    "resync_every": (OWNED, "no parameters travel"),
    "warmup_steps": ((*MOMENTUM, "onebit"), "it compresses from the first step on"),
    "refresh_every": (MOMENTUM, "it has no variance that is brought up to date so often"),
    "when": (MOMENTUM, "it does not see whether that pays"),
    "density": (("topk",), "it sends something of every element"),
    "rank": (("powersgd",), "it does not look at gradients as matrices"),
    "local_steps": (("zero_one",), "ranks meet in every step"),
}


def compression_problems(config: Config) -> Iterator[Problem]:
    """Yield all that is wrong with the compression of a run, whatever its layout."""
    section, name = config.compression, "compression.kind"
    yield from idle_keys(section)
    if section.kind == "none":
        return
    yield from _with_optimizer(config)
    yield from refused_with_zero(section, config.zero)
    local = section.kind == "zero_one" and section.local_steps > 1
    if local and config.parallel.check_replicas_every:
        yield Problem(
            "compression.kind = zero_one with parallel.check_replicas_every",
            why="between exchanges ranks go their own ways, and are not alike",
            mend="set compression.local_steps=1, or parallel.check_replicas_every=0",
            keys=("parallel.check_replicas_every", name),
        )
    if config.engine.kind == "deepspeed":
        yield Problem(
            f"compression.kind = {section.kind} with engine.kind = deepspeed",
            why="DeepSpeed's engine sends gradients itself",
            mend="set engine.kind=native or compression.kind=none",
            keys=(name, "engine.kind"),
        )


def idle_keys(section: CompressionSection) -> Iterator[Problem]:
    """Yield the keys that are set but mean nothing to this kind."""
    plain = CompressionSection()
    for key, (kinds, why) in COMPRESSION_KEYS.items():
        if section.kind not in kinds and getattr(section, key) != getattr(plain, key):
            yield Problem(
                f"compression.{key} has no meaning for compression.kind = {section.kind}",
                why="nothing is compressed" if section.kind == "none" else why,
                mend=f"remove compression.{key}, or set compression.kind={kinds[0]}",
                keys=(f"compression.{key}", "compression.kind"),
            )


def refused_with_zero(section: CompressionSection, zero: ZeroSection) -> Iterator[Problem]:
    """Yield what of the `zero` section a kind, which is not none, does not go with."""
    published = section.kind in PUBLISHED
    refused = {
        "stage": (
            published and zero.stage > 0,
            "every rank needs all of the momentum and the variance, so none can be shared out",
            "set compression.kind=default or max, or remove zero.stage",
        ),
        "offload": (
            zero.offload != "none",
            "updates are compressed where parameters are, and main parameters are elsewhere",
            "set zero.offload=none or compression.kind=none",
        ),
        "reduce_dtype": (
            zero.reduce_dtype == "int8" or (published and zero.reduce_dtype != "fp32"),
            "there are no owners that gradients would be sent to"
            if published
            else "what compression sends exactly would lose something, for good",
            "remove zero.reduce_dtype",
        ),
        "shard_degree": (
            zero.shard_degree is not None,
            "what goes between the groups would not be compressed, and that is the slower way",
            "remove zero.shard_degree or set compression.kind=none",
        ),
    }
    for key, (is_so, why, mend) in refused.items():
        if is_so:
            yield Problem(
                f"compression.kind = {section.kind} with zero.{key} = {getattr(zero, key)}",
                why=why,
                mend=mend,
                keys=(f"zero.{key}", "compression.kind"),
            )


def _with_optimizer(config: Config) -> Iterator[Problem]:
    kind, name = config.compression.kind, "compression.kind"
    if kind not in (*MOMENTUM, *PUBLISHED):
        return
    if kind == "zero_one" and config.optimizer.kind == "lamb":
        yield Problem(
            "compression.kind = zero_one with optimizer.kind = lamb",
            why="ranks go their own ways, and the length of a step would be another on each",
            mend="set optimizer.kind=adamw, or compression.kind=onebit",
            keys=("optimizer.kind", name),
        )
    if config.optimizer.kind not in ("adamw", "lamb"):
        yield Problem(
            f"compression.kind = {kind} with optimizer.kind = {config.optimizer.kind}",
            why="it sends momentum beside a variance that stays, as AdamW and LAMB have them",
            mend="set compression.kind=safe, which suits all optimizers",
            keys=(name, "optimizer.kind"),
        )
    elif not config.optimizer.betas[0]:
        yield Problem(
            f"compression.kind = {kind} with optimizer.betas[0] = 0",
            why="without a mean over steps, signs of gradients are what is left",
            mend="set optimizer.betas=[0.9, 0.95], or compression.kind=safe",
            keys=("optimizer.betas", name),
        )
