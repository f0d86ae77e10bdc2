"""What fails on one rank is told to the others, so that they say it instead of waiting."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed import distributed_c10d

from bigtrain.comm.mesh import Axis
from bigtrain.errors import BigtrainError, CommError

_KEY = "bigtrain/failure"


@contextmanager
def telling_others(axis: Axis) -> Iterator[None]:
    """Publish what fails inside, and cut the connections on which others would wait for this rank.

    They then raise it too: `explained` of the collectives looks here first. This process cannot
    talk to the others any more.
    """
    try:
        yield
    except CommError:
        raise
    except Exception as error:
        if dist.is_initialized() and dist.get_world_size() > 1:
            _publish(error, axis)
        raise


def published() -> BigtrainError | None:
    """Return what another rank has failed with, if it could say so."""
    with contextlib.suppress(Exception):  # the store may be gone with its rank
        store = distributed_c10d._get_default_store()
        if store.check([_KEY]):
            error = pickle.loads(bytes.fromhex(store.get(_KEY).decode()))
            assert isinstance(error, BigtrainError)
            return error
    return None


def _publish(error: Exception, axis: Axis) -> None:
    told = error
    if not isinstance(error, BigtrainError):
        told = BigtrainError(
            f"rank {axis.ranks[axis.rank]} failed: {type(error).__name__}: {error}",
            mend="its log has the traceback",
        )
    with contextlib.suppress(Exception):
        store = distributed_c10d._get_default_store()
        if not store.check([_KEY]):
            store.set(_KEY, pickle.dumps(told).hex())
    for group in list(distributed_c10d._world.pg_map):
        with contextlib.suppress(Exception):  # what cannot be aborted ends with the process
            group.abort()
