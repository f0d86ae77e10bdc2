"""The server section: owners of parameters that are processes of their own."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from bigtrain.config.section import PositiveInt, Section


class ServerSection(Section):
    servers: Annotated[int, Field(ge=0)] = 0
    """Parameter servers, which hold and update all parameters; 0: there are none."""
    workers: PositiveInt = 2
    """Workers that read shares of the data, each one or more ranks: parallel says how many."""
    replicas: PositiveInt = 1
    """Servers that hold each block, so that the run survives the end of all but one of them."""
    mode: Literal["sync", "ssp", "async"] = "sync"
    """sync: an update is the sum of all workers' gradients. ssp: the same, but workers may be some
    rounds ahead. async: an update with each worker's gradient, as it comes."""
    quorum: PositiveInt | None = None
    """Workers that make up an update, if others are late. Empty: all that are there."""
    grace_seconds: Annotated[float, Field(ge=0)] = 1.0
    """How long workers that have begun the round may take once there is a quorum."""
    staleness: Annotated[int, Field(ge=0)] = 2
    """ssp: rounds that a worker may be ahead of the one that is open."""
    lease_seconds: Annotated[float, Field(ge=0.5)] = 5.0
    """After what silence a worker or a server counts as gone."""
    join_seconds: Annotated[float, Field(gt=0)] = 120.0
    """How long the first round waits for all workers, and servers for each other."""
    restarts: Annotated[int, Field(ge=0)] = 3
    """How often a worker that was killed is started again, which then joins in the middle."""
