"""Tensor parallelism applied to a model from outside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from bigtrain.comm.block import Shard, shards_of
from bigtrain.comm.collectives import broadcast
from bigtrain.comm.mesh import Axis, Group
from bigtrain.errors import BigtrainError
from bigtrain.ops.dropout import Dropout
from bigtrain.ops.op import Kernels
from bigtrain.tensor.embedding import VocabParallelEmbedding
from bigtrain.tensor.linear import ColumnParallelLinear, RowParallelLinear, SharedInput
from bigtrain.tensor.loss import VocabParallelCrossEntropy
from bigtrain.tensor.plan import Plan, Style, match_plan
from bigtrain.tensor.regions import (
    gather_channels,
    gather_sequence,
    split_sequence,
    sum_gradients,
)
from bigtrain.tensor.split import shard_dim
from bigtrain.tensor.transformers import fit_attention, published_plan


def apply_tensor_parallel(
    model: nn.Module,
    plan: Plan | None,
    group: Group,
    *,
    sequence_parallel: bool = False,
    num_chunks: int = 1,
    device: torch.device | None = None,
) -> nn.Module:
    """Split `model` over `group` as `plan` says, in place, and return it.

    plan: module name patterns -> styles (see `bigtrain.tensor.plan`); None: the model's own, which
    is what its method `tensor_plan()` returns, or for a model of Hugging Face transformers the
    plan that it publishes.

    Styles, by what they are applied to:
      column         Linear: ColumnParallelLinear. Dropout: on channels that are split
      column_gather  Linear: ColumnParallelLinear with gather_output
      row            Linear: RowParallelLinear
      row_split      Linear: RowParallelLinear with input_is_parallel=False
      vocab          Embedding: VocabParallelEmbedding. Linear: ColumnParallelLinear (the output
                     head). CrossEntropyLoss: VocabParallelCrossEntropy
      gather         any: its output, split as that of the vocab Linear, is put together
      replicate      any: works on split channels; the gradients of its parameters are summed
      sequence       any: works on a part of the sequence; the gradients of its parameters are
                     summed. Dropout: on that part. Embedding (of positions): its output is cut
                     to that part
      whole          any: stays as it is, and works on the whole sequence
      scatter_sequence, gather_sequence
                     any: its output is cut to this rank's part of the sequence, or put together

    The sequence styles do nothing unless `sequence_parallel`; then every module with parameters
    needs a style. Columns of one parent take in together what they are given where it is the same
    tensor. Tied parameters stay tied. Every rank starts from the weights and buffers of the group's
    first rank, which are broadcast. num_chunks: see RowParallelLinear. device: where the model is
    moved to, layer by layer, so that only its own part must fit there.

    Raises:
        BigtrainError: the plan matches nothing or twice, names a style that does not fit a module,
            or a size that cannot be shared out.
    """
    chosen = match_plan(model, own_plan(model) if plan is None else plan)
    axis = Axis.of(group)
    if sequence_parallel and axis.degree > 1:
        _refuse_unclear_sequence(model, chosen)
    site = _Site(axis, sequence_parallel, num_chunks, _vocab_size(model, chosen))
    columns = _columns_by_parent(model, chosen)
    entrances = {
        parent: SharedInput(model.get_submodule(parent))
        for parent, layers in columns.items()
        if len(layers) > 1
    }
    split: dict[int, tuple[str, nn.Parameter, Shard]] = {}  # id of a full parameter -> own part
    converted: dict[int, nn.Module] = {}  # a module may have several names
    full: list[nn.Module] = []  # keeps those ids taken
    for name, style in chosen.items():
        old, parent = model.get_submodule(name), name.rpartition(".")[0]
        if id(old) in converted:
            model.set_submodule(name, converted[id(old)])
            continue
        if device is not None:
            old.to(device)
        entrance = entrances.get(parent) or SharedInput()
        beside = columns.get(parent, [])
        try:
            if style.kind == "column" and isinstance(old, nn.Dropout | Dropout):
                _refuse_uneven(old, style, beside, axis)
            new = _CONVERT[style.kind](old, style, site, entrance)
        except BigtrainError as error:
            it = error.problem
            raise BigtrainError(it.what, where=f"plan: {name}", why=it.why, mend=it.mend) from error
        full.append(old)
        converted |= {id(old): new, id(new): new}
        if new is not old:
            _tie(name, old, new, split)
            model.set_submodule(name, new)
    _refuse_half_ties(model, split)
    fit_attention(model)
    model.to(device)
    broadcast_replicated(model, site.axis)
    return model


def own_plan(model: nn.Module) -> Plan:
    """Return the plan that a model brings along.

    Raises:
        BigtrainError: it brings none.
    """
    own = getattr(model, "tensor_plan", None)
    plan: Plan | None = own() if callable(own) else published_plan(model)
    if plan is None:
        raise BigtrainError(
            f"{type(model).__name__} brings no plan of how to split it over tensor-parallel ranks",
            why="it has no method tensor_plan(), and is no transformers model that publishes one",
            mend="give a plan (parallel.tensor_plan in a config), like "
            "{'layers.*.up': 'column', 'layers.*.down': 'row'}, or add that method",
        )
    return plan


def _refuse_unclear_sequence(model: nn.Module, chosen: dict[str, Style]) -> None:
    """Refuse sequence parallelism with a plan that does not say what works on which part of it.

    A column layer would take a whole sequence for a part, a norm would keep a part of its gradient,
    and neither would show.
    """
    enters = [
        name
        for name, style in chosen.items()
        if style.kind in ("sequence", "scatter_sequence")
        or (style.kind == "vocab" and isinstance(model.get_submodule(name), nn.Embedding))
    ]
    unclear = [
        name
        for name, module in model.named_modules()
        if name not in chosen and any(True for _ in module.parameters(recurse=False))
    ]
    if not enters or unclear:
        raise BigtrainError(
            f"{type(model).__name__} with sequence_parallel: the plan "
            + (
                f"does not say whether {', '.join(unclear[:3])} works on a part of the sequence"
                if enters
                else "never splits the sequence"
            ),
            why="gradients of what works on a part are summed over the ranks, others must not be",
            mend="give each module with parameters a style, like sequence (works on a part) or "
            "whole, or leave sequence_parallel off",
        )


@dataclass(frozen=True)
class _Site:
    """What all modules of one model are split with."""

    axis: Axis
    sequence: bool
    num_chunks: int
    vocab_size: int | None


def _vocab_size(model: nn.Module, chosen: dict[str, Style]) -> int | None:
    """Return the output features of the one Linear that is split by vocabulary, if there is one."""
    sizes = {
        module.out_features
        for name, style in chosen.items()
        if style.kind == "vocab" and isinstance(module := model.get_submodule(name), nn.Linear)
    }
    return sizes.pop() if len(sizes) == 1 else None


def _columns_by_parent(model: nn.Module, chosen: dict[str, Style]) -> dict[str, list[nn.Linear]]:
    columns: dict[str, list[nn.Linear]] = {}
    for name, style in chosen.items():
        module = model.get_submodule(name)
        if style.kind in ("column", "column_gather", "vocab") and isinstance(module, nn.Linear):
            columns.setdefault(name.rpartition(".")[0], []).append(module)
    return columns


def _refuse_uneven(dropout: nn.Module, style: Style, columns: list[nn.Linear], axis: Axis) -> None:
    if any(layer.out_features % axis.degree for layer in columns):
        raise _misfit(dropout, style, "the columns beside it do not divide by the degree")


def _tie(
    name: str,
    old: nn.Module,
    new: nn.Module,
    split: dict[int, tuple[str, nn.Parameter, Shard]],
) -> None:
    """Let parameters of `new` be those that tied ones of `old` have become already."""
    shards: dict[str, Shard] = getattr(new, "shards", {})
    for own, param in old.named_parameters(recurse=False):
        mine = (f"{name}.{own}", getattr(new, own), shards[own])
        first, tied, shard = split.setdefault(id(param), mine)
        if shard != shards[own]:
            raise BigtrainError(
                f"the plan splits {name}.{own} in another way than {first}, which it is tied to",
                why="one parameter can be split in one way only",
                mend="give both the same style and units, or untie them",
            )
        setattr(new, own, tied)


def _refuse_half_ties(model: nn.Module, split: dict[int, tuple[str, nn.Parameter, Shard]]) -> None:
    for name, param in model.named_parameters():
        if id(param) in split:
            raise BigtrainError(
                f"{name} is tied to a parameter that the plan splits",
                why="one of the two would be split and the other not",
                mend=f"name {name.rpartition('.')[0]} in the plan too, or untie it",
            )


def broadcast_replicated(model: nn.Module, axis: Axis) -> None:
    """Give every rank of `axis` the first rank's parameters and buffers, but for split ones."""
    shards = shards_of(model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name not in shards:
            broadcast(tensor, axis, f"broadcast of {name}")


# -- styles: each returns what takes the place of a module, or the module itself ------------------


def _refuse_extras(module: nn.Module, style: Style, kind: type[nn.Module]) -> None:
    """Refuse what would be lost with a module that is replaced."""
    if type(module).forward is not kind.forward:
        raise _misfit(module, style, "it computes something of its own, which would be lost")
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        raise _misfit(module, style, "it has hooks, which would be lost")
    if nn.utils.parametrize.is_parametrized(module):
        raise _misfit(module, style, "it is parametrized (weight_norm), which would be lost")


def _misfit(module: nn.Module, style: Style, why: str) -> BigtrainError:
    return BigtrainError(
        f"the style {style.kind} does not fit a {type(module).__name__}",
        why=why,
        mend="give it another style, or leave it out of the plan",
    )


def _column(module: nn.Module, style: Style, site: _Site, entrance: SharedInput) -> nn.Module:
    if isinstance(module, nn.Dropout | Dropout):
        return _split_dropout(module, -1, site.axis)
    if not isinstance(module, nn.Linear):
        raise _misfit(module, style, "output features of a torch.nn.Linear can be split")
    _refuse_extras(module, style, nn.Linear)
    return ColumnParallelLinear(
        module.in_features,
        module.out_features,
        site.axis,
        linear=module,
        gather_output=style.kind == "column_gather",
        sequence_parallel=site.sequence,
        units=style.units,
        share=style.share,
        shared_input=entrance,
    )


def _row(module: nn.Module, style: Style, site: _Site, entrance: SharedInput) -> nn.Module:
    if not isinstance(module, nn.Linear):
        raise _misfit(module, style, "input features of a torch.nn.Linear can be split")
    _refuse_extras(module, style, nn.Linear)
    return RowParallelLinear(
        module.in_features,
        module.out_features,
        site.axis,
        linear=module,
        input_is_parallel=style.kind == "row",
        sequence_parallel=site.sequence,
        units=style.units,
        num_chunks=site.num_chunks,
    )


def _vocab(module: nn.Module, style: Style, site: _Site, entrance: SharedInput) -> nn.Module:
    if isinstance(module, nn.Linear):
        return _column(module, style, site, entrance)
    if isinstance(module, nn.Embedding):
        _refuse_extras(module, style, nn.Embedding)
        return VocabParallelEmbedding(
            module.num_embeddings,
            module.embedding_dim,
            site.axis,
            embedding=module,
            sequence_parallel=site.sequence,
        )
    if not isinstance(module, nn.CrossEntropyLoss):
        raise _misfit(module, style, "it is for Linear, Embedding and CrossEntropyLoss")
    if not getattr(module, "over_last_dim", False):
        _refuse_extras(module, style, nn.CrossEntropyLoss)
    if module.weight is not None:
        raise _misfit(module, style, "class weights cannot be split")
    return VocabParallelCrossEntropy(
        site.axis,
        vocab_size=site.vocab_size,
        label_smoothing=module.label_smoothing,
        ignore_index=module.ignore_index,
        reduction=module.reduction,
        kernels=getattr(module, "kernels", "auto"),
    )


def _gather(module: nn.Module, style: Style, site: _Site, entrance: SharedInput) -> nn.Module:
    if site.vocab_size is None:
        raise _misfit(module, style, "the plan has not exactly one Linear with the style vocab")
    degree = site.axis.degree
    shards = [shard_dim((site.vocab_size,), 0, degree, rank) for rank in range(degree)]
    return _change_output(module, partial(gather_channels, group=site.axis, shards=shards))


def _replicate(module: nn.Module, style: Style, site: _Site, entrance: SharedInput) -> nn.Module:
    sum_gradients(module, site.axis)
    return module


def _sequence(module: nn.Module, style: Style, site: _Site, entrance: SharedInput) -> nn.Module:
    if not site.sequence:
        return module
    if isinstance(module, nn.Dropout | Dropout):
        return _split_dropout(module, -2, site.axis)
    if isinstance(module, nn.Embedding):  # backward gathers, so its gradient is whole
        return _change_output(module, partial(split_sequence, group=site.axis))
    sum_gradients(module, site.axis)
    return module


def _scatter(module: nn.Module, style: Style, site: _Site, entrance: SharedInput) -> nn.Module:
    if site.sequence:
        _change_output(module, partial(split_sequence, group=site.axis))
    return module


def _unscatter(module: nn.Module, style: Style, site: _Site, entrance: SharedInput) -> nn.Module:
    if site.sequence:
        _change_output(module, partial(gather_sequence, group=site.axis))
    return module


def _split_dropout(module: nn.Dropout | Dropout, dim: int, axis: Axis) -> nn.Module:
    # torch's dropout draws from the default generator, which is the same on all ranks of a group.
    kernels: Kernels = getattr(module, "kernels", "auto")
    new = Dropout(module.p, per_sample=isinstance(module, Dropout), kernels=kernels)
    new.layer = getattr(module, "layer", None)
    new.split(dim, axis.rank, axis.degree)
    return new.train(module.training)


def _change_output(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    def hook(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return change(output)

    module.register_forward_hook(hook)
    return module


_CONVERT: dict[str, Callable[[nn.Module, Style, _Site, SharedInput], nn.Module]] = {
    "column": _column,
    "column_gather": _column,
    "row": _row,
    "row_split": _row,
    "vocab": _vocab,
    "gather": _gather,
    "replicate": _replicate,
    "sequence": _sequence,
    "whole": lambda module, *_: module,
    "scatter_sequence": _scatter,
    "gather_sequence": _unscatter,
}
