"""A stage: the part of a model that runs as one action, and what stands in for the whole of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from bigtrain.errors import BigtrainError

Call = tuple[tuple[Any, ...], dict[str, Any]]  # how the model was called: args, kwargs


@dataclass(frozen=True)
class Stage:
    """Units [start, stop) of a model, as stage `index` of `num_stages`.

    run(what the stage before gave, how the model was called) gives what the next stage needs, or in
    the last stage what the model returns.
    """

    index: int
    num_stages: int
    units: Sequence[str]
    parameters: Sequence[nn.Parameter]
    run: Callable[[Any, Call], Any]

    @property
    def is_last(self) -> bool:
        return self.index == self.num_stages - 1


def whole(model: nn.Module) -> Stage:
    """Return all of `model` as the only stage."""

    def run(carry: Any, call: Call) -> Any:
        return model(*call[0], **call[1])

    params = [param for param in model.parameters() if param.requires_grad]
    return Stage(0, 1, [type(model).__name__], params, run)


class _Answered(BaseException):
    """Ends a loss function where it calls the model, which is all that an earlier stage needs.

    No Exception, so that no loss function takes it for an error.
    """

    def __init__(self, answer: Any) -> None:
        self.answer = answer


class StandIn:
    """What a loss function takes for the model: a call runs `answer`, the rest is the model's."""

    def __init__(self, model: nn.Module, answer: Callable[[Call], Any]) -> None:
        self._model, self._answer = model, answer
        self._called = False
        # With the signature of the model's, which says what is wrong with a call.
        self.forward = functools.wraps(model.forward)(lambda *a, **k: self._call(*a, **k))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if self._called:
            raise BigtrainError(
                f"the loss function calls {type(self._model).__name__} a second time for a batch",
                why="activations of one call travel through the stages",
                mend="call the model once, on all that it is to see (stack the inputs)",
            )
        self._called = True
        return self._answer((args, kwargs))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def inside(loss_of: Callable[[Any], Any], model: nn.Module, answer: Callable[[Call], Any]) -> Any:
    """Return what `answer` returns where `loss_of(model)` calls the model, and leave it there.

    So an earlier stage runs under what the loss function has set up (autocast, say).

    Raises:
        BigtrainError: it does not call the model.
    """

    def stop(call: Call) -> Any:
        raise _Answered(answer(call))

    try:
        loss_of(StandIn(model, stop))
    except _Answered as answered:
        return answered.answer
    raise BigtrainError(
        f"the loss function does not call {type(model).__name__}",
        why="where it does, the stages of the model run",
        mend="let it call the model that it is given, once",
    )
