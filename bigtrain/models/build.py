"""From a model section of the config to a module and the function that gives its loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from bigtrain.config.schema import FactoryModel, GptModel, LlamaModel
from bigtrain.errors import BigtrainError
from bigtrain.factory import call_factory, import_function
from bigtrain.models.gpt import GPT
from bigtrain.models.llama import Llama
from bigtrain.ops.op import Kernels

Batch = Mapping[str, torch.Tensor]
LossFunction = Callable[[nn.Module, Batch], "Loss"]


class Loss:
    """What a model says of a batch: the mean loss [scalar tensor] over `count` items.

    `count` is None where the model does not tell; then it is the items that the dataset declares.
    """

    __slots__ = ("count", "mean")

    def __init__(self, result: Any, source: str) -> None:
        mean, count = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
        if not isinstance(mean, torch.Tensor) or mean.numel() != 1:
            shown = f"shape {tuple(mean.shape)}" if isinstance(mean, torch.Tensor) else repr(mean)
            raise BigtrainError(
                f"{source} returned {shown}, not a loss",
                why="the loss of a batch is a scalar tensor, or (scalar tensor, count)",
                mend="return the mean loss of the batch, or set model.loss to a function that does",
            )
        self.count: float | None = None if count is None else float(count)
        # Of no items (all of them masked) there is no mean; they take no part in the step.
        nothing = torch.zeros((), device=mean.device, requires_grad=True)
        self.mean: torch.Tensor = nothing if self.count == 0 else mean.reshape(())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` into evaluation mode, and every module back into the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def build_model(
    config: GptModel | LlamaModel | FactoryModel, kernels: Kernels = "auto"
) -> nn.Module:
    """Return the module on the CPU, initialised from torch's default generator.

    kernels: who computes in a gpt or llama; a factory's model decides for itself.

    Raises:
        BigtrainError: the factory cannot be imported, fails, or returns no module.
    """
    if isinstance(config, FactoryModel):
        model = call_factory(config.factory, config.args, where="model.factory")
        if not isinstance(model, nn.Module):
            raise BigtrainError(
                f"{config.factory} returned a {type(model).__name__}, not a torch.nn.Module",
                where="model.factory",
                mend="return the module that is to be trained",
            )
        return model
    kind: type[GPT] | type[Llama] = GPT if isinstance(config, GptModel) else Llama
    return kind(**config.model_dump(exclude={"kind"}), kernels=kernels)


def build_loss(config: GptModel | LlamaModel | FactoryModel) -> LossFunction:
    """Return loss(model, batch): the user's function, or the model called with the batch."""
    if isinstance(config, FactoryModel) and config.loss:
        name = config.loss
        function = import_function(name, where="model.loss")
        return lambda model, batch: Loss(function(model, batch), name)
    return _call_by_name


def _call_by_name(model: nn.Module, batch: Batch) -> Loss:
    try:
        result = model(**batch)
    except TypeError as error:
        try:
            inspect.signature(model.forward).bind(**batch)
        except TypeError:
            raise BigtrainError(
                f"{type(model).__name__} cannot be called with ({', '.join(batch)})",
                where="model.factory",
                why=f"a batch is passed by name, and {error}",
                mend="let forward take what the dataset gives, or set model.loss to a function "
                "loss(model, batch)",
            ) from error
        raise
    return Loss(result, type(model).__name__)
