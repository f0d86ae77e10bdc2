"""The tensor-parallel plans that models of Hugging Face `transformers` publish, as plans of ours.

`transformers` itself is not imported: a model brings its plan and its config along.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from bigtrain.errors import BigtrainError
from bigtrain.tensor.linear import ColumnParallelLinear
from bigtrain.tensor.plan import Plan, Style, match_plan, matches

# Their name of a style -> ours.
_KINDS = {
    "colwise": "column",
    "colwise_gather_output": "column_gather",
    "colwise_rep": "column_gather",
    "rowwise": "row",
    "rowwise_split_input": "row_split",
    "rowwise_rep": "row_split",
    "embedding_rowwise": "vocab",
    "replicated_with_grad_allreduce": "replicate",
}
# Last component of a projection's name -> what the config calls the number of its heads.
_HEADS = {
    "q_proj": "num_attention_heads",
    "k_proj": "num_key_value_heads",
    "v_proj": "num_key_value_heads",
    "o_proj": "num_attention_heads",
}


def published_plan(model: nn.Module) -> Plan | None:
    """Return the plan that a transformers model publishes (`tp_plan`), or None if it has none.

    Heads are taken from its config, so that none is cut. An embedding that is tied to a split head
    is split with it, also where the published plan does not name it.

    Raises:
        BigtrainError: the plan has a style that is not supported, or the model drops attention
            weights inside of a function that cannot be split.
    """
    published = getattr(model, "tp_plan", None) or getattr(model, "_tp_plan", None)
    config = getattr(model, "config", None)
    if not published or config is None:
        return None
    if hasattr(config, "get_text_config"):  # of a model that also takes pictures
        config = config.get_text_config()
    if getattr(config, "attention_dropout", 0.0):
        raise BigtrainError(
            f"{type(model).__name__} has attention_dropout = {config.attention_dropout}",
            why="its attention would drop the same weights of different heads on every rank",
            mend="set attention_dropout=0 in its config",
        )
    plan: dict[str, str | Style] = {}
    names = [name for name, _ in model.named_modules()]
    for pattern, kind in published.items():
        if not any(matches(pattern, name) for name in names):
            continue  # a plan is published for a family; not every member has every module
        if kind not in _KINDS:
            raise BigtrainError(
                f"{type(model).__name__} publishes the style {kind!r} for {pattern}",
                why=f"the supported ones are {', '.join(_KINDS)}",
                mend="give apply_tensor_parallel a plan of your own for this model",
            )
        heads = _HEADS.get(pattern.rpartition(".")[2])
        if heads and _KINDS[kind] in ("column", "row") and getattr(config, heads, None):
            units = (getattr(config, heads),)
            plan[pattern] = Style(_KINDS[kind], units, share=heads == "num_key_value_heads")
        else:
            plan[pattern] = Style(_KINDS[kind])
    plan |= _tied_embedding(model, plan)
    return plan | _norms_of_heads(model, plan, config)


def _tied_embedding(model: nn.Module, plan: Plan) -> dict[str, str]:
    named = set(match_plan(model, plan))
    split = {id(p) for name in named for p in model.get_submodule(name).parameters()}
    return {
        name: "vocab"
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and id(module.weight) in split and name not in named
    }


def _norms_of_heads(model: nn.Module, plan: Plan, config: Any) -> dict[str, str]:
    """Return styles for what works on split channels beside column layers, but is not named.

    Norms of single heads are not named by older plans.

    Raises:
        BigtrainError: it is something else, so how to split it is not known.
    """
    named = match_plan(model, plan)
    parents = {name.rpartition(".")[0] for name, style in named.items() if style.kind == "column"}
    found: dict[str, str] = {}
    for parent in sorted(parents - {""}):
        head_size = getattr(model.get_submodule(parent), "head_dim", None)
        for name, module in model.get_submodule(parent).named_modules(prefix=parent):
            params = list(module.parameters(recurse=False))
            if name in named or not params:
                continue
            if any(param.shape != (head_size,) for param in params):
                raise BigtrainError(
                    f"{type(model).__name__} publishes a plan that does not name {name}",
                    why="it has parameters, and works on what column layers beside it have split",
                    mend="give apply_tensor_parallel a plan of your own for this model",
                )
            found[name] = "replicate"
    return found


def fit_attention(model: nn.Module) -> None:
    """Let attention that repeats key-value heads by a stored count use the count of this rank.

    With fewer key-value heads than ranks, a rank has one, and fewer query heads to each.
    """
    for module in model.modules():
        key = getattr(module, "k_proj", None)
        groups = getattr(module, "num_key_value_groups", None)
        if isinstance(key, ColumnParallelLinear) and isinstance(groups, int):
            module.num_key_value_groups = groups // key.shards["weight"].num_replicas  # type: ignore[assignment]
