"""Models of Hugging Face transformers, split by the plans that they publish, equal one process.

Errors are relative, in the 2-norm of a tensor. Ranks add the same fp32 numbers in another order, so
logits and the gradients of the first step differ by rounding (below 5e-6; seen: 1e-6). With AdamW,
which magnifies the rounding of small gradients, the way that parameters have gone after three steps
differs by less than 1e-3; with SGD by less than 1e-4. A part of a gradient that is lost or counted
twice shows as 1e-1 and more. What several ranks hold must be equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from parity_models import EPS, VOCAB, relative_error
from torch import nn

from bigtrain import SGD, apply_tensor_parallel, parallelize
from bigtrain.comm.block import Shard, shards_of
from bigtrain.comm.mesh import Axis, Group, Mesh
from bigtrain.config.layout import Layout
from bigtrain.errors import BigtrainError

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

STEPS, BATCH, LENGTH = 3, 4, 12
KINDS = ("llama", "qwen2", "qwen3")
Optimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, tuple[Optimizer, float]] = {  # and how far parameters may be off their way
    "sgd": (lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9), 1e-4),
    "adamw": (lambda params: torch.optim.AdamW(params, lr=1e-2, eps=EPS), 1e-3),
}


def build(kind: str, *, seed: int = 5, **changes: Any) -> nn.Module:
    """Return a tiny model; VOCAB and the MLP's width are odd, so that no degree divides them."""
    torch.manual_seed(seed)
    given: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 45,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "max_position_embeddings": 32,
        "tie_word_embeddings": False,
        "initializer_range": 0.1,
        "pad_token_id": 0 if kind == "qwen2" else None,
    }
    config = transformers.AutoConfig.for_model(kind, **(given | changes))
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, param in model.named_parameters():
        if param.ndim == 1:  # biases that are zero and norms that are one would hide mistakes
            nn.init.normal_(param, mean=float("norm" in name), std=0.1)
    return model.train()


def batches() -> list[dict[str, torch.Tensor]]:
    """Return a batch a step; some labels are ignored, and one row has padding in front."""
    draw = torch.Generator().manual_seed(3)
    result = []
    for _ in range(STEPS):
        ids = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=draw)
        mask = torch.ones_like(ids)
        mask[1, :3] = ids[1, :3] = 0
        labels = ids.masked_fill(mask == 0, -100)
        result.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return result


def train(model: nn.Module, optimizer: str) -> dict[str, Any]:
    """Take a few steps with nothing but torch; return what a test compares."""
    chosen = OPTIMIZERS[optimizer][0](list(model.parameters()))
    start = copy_of(model)
    losses, grads, logits = [], {}, torch.empty(0)
    for step, batch in enumerate(batches()):
        chosen.zero_grad()
        out = model(**batch)
        out.loss.backward()
        if not step:
            logits = out.logits.detach()
            grads = {name: param.grad.clone() for name, param in model.named_parameters()}
        chosen.step()
        losses.append(out.loss.item())
    return {
        "start": start,
        "losses": losses,
        "logits": logits,
        "grads": grads,
        "params": copy_of(model),
        "shards": shards_of(model),
    }


def copy_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def split(mesh: Mesh, group: Group, kind: str, changes: dict[str, Any]) -> nn.Module:
    """Return a model that is split over `group`, made from other weights on all but rank 0."""
    first = mesh.rank == Axis.of(group).ranks[0]
    model = build(kind, seed=5 if first else 99, **changes)
    assert apply_tensor_parallel(model, None, group) is model
    return model


def own_part(shards: dict[str, Shard], name: str, full: torch.Tensor) -> torch.Tensor:
    return shards[name].take(full) if name in shards else full


def assert_same_training(ranks: list[dict[str, Any]], plain: dict[str, Any], far: float) -> None:
    for rank in ranks:
        shards = rank["shards"]
        assert rank["start"].keys() == plain["start"].keys()
        for name, full in plain["start"].items():
            assert torch.equal(rank["start"][name], own_part(shards, name, full)), name
        assert relative_error(rank["logits"], plain["logits"], 0.0) < 5e-6
        assert rank["losses"] == pytest.approx(plain["losses"], abs=1e-5)
        for name, full in plain["grads"].items():
            error = relative_error(rank["grads"][name], own_part(shards, name, full), 1e-4)
            assert error < 5e-6, f"gradient of {name}: {error}"
        for name, full in plain["params"].items():
            way = own_part(shards, name, full - plain["start"][name])
            error = relative_error(rank["params"][name] - rank["start"][name], way, 1e-6)
            assert error < far, f"parameter {name}: {error}"
    assert_replicas_equal(ranks)


def assert_replicas_equal(ranks: list[dict[str, Any]]) -> None:
    held: dict[Any, torch.Tensor] = {}
    for rank in ranks:
        assert rank["losses"] == ranks[0]["losses"]
        for name, param in rank["params"].items():
            shard = rank["shards"].get(name)
            first = held.setdefault((name, shard and shard.pieces), param)
            assert torch.equal(param, first), f"{name} differs between ranks that hold the same"


def train_at_4_and_2(mesh: Mesh, kind: str, changes: dict, optimizer: str) -> list[dict]:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    groups = (dist.group.WORLD, pairs[mesh.rank // 2])
    return [train(split(mesh, group, kind, changes), optimizer) for group in groups]


@pytest.mark.parametrize("kv_heads", [8, 2, 1])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_one_process(kind: str, tied: bool, kv_heads: int, tmp_path: Path) -> None:
    changes = {"tie_word_embeddings": tied, "num_key_value_heads": kv_heads}
    optimizer = "adamw" if tied else "sgd"
    plain = train(build(kind, **changes), optimizer)
    far = OPTIMIZERS[optimizer][1]
    ranks = run_ranks(train_at_4_and_2, 4, tmp_path, args=(kind, changes, optimizer))
    at_4, at_2 = zip(*ranks, strict=True)
    assert_same_training(list(at_4), plain, far)
    assert_same_training(list(at_2[:2]), plain, far)
    assert_same_training(list(at_2[2:]), plain, far)
    kv = "model.layers.0.self_attn.k_proj.weight"
    assert [rank["params"][kv].shape[0] for rank in (at_4[0], at_2[0])] == [
        4 * max(1, kv_heads // 4),
        4 * max(1, kv_heads // 2),
    ]
    assert len(plain["params"]) == len(at_4[0]["params"])  # tied ones stay one


def train_once(mesh: Mesh, kind: str, changes: dict, optimizer: str, checkpointing: bool) -> dict:
    model = split(mesh, mesh.tp, kind, changes)
    if checkpointing:
        checkpoint(model)
    return train(model, optimizer)


def checkpoint(model: nn.Module) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def test_eight_ranks(tmp_path: Path) -> None:
    changes = {"tie_word_embeddings": True}  # 2 key-value heads, of 4 ranks each
    arguments = ("qwen3", changes, "sgd", False)
    ranks = run_ranks(train_once, 8, tmp_path, args=arguments, layout=Layout(tp=8))
    assert_same_training(ranks, train(build("qwen3", **changes), "sgd"), 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing(kind: str, tmp_path: Path) -> None:
    arguments = (kind, {}, "sgd", True)
    ranks = run_ranks(train_once, 2, tmp_path, args=arguments, layout=Layout(tp=2))
    assert_same_training(ranks, train(build(kind), "sgd"), 1e-4)


def test_eager_attention_repeats_the_right_heads(tmp_path: Path) -> None:
    """It repeats key-value heads itself, by a number that differs from rank counts to others."""
    changes = {"attn_implementation": "eager", "num_key_value_heads": 2}
    plain = train(build("llama", **changes), "sgd")
    for tp in (2, 4):
        arguments = ("llama", changes, "sgd", False)
        ranks = run_ranks(train_once, tp, tmp_path, args=arguments, layout=Layout(tp=tp))
        assert_same_training(ranks, plain, 1e-4)


def test_styles_that_gather_and_cut_between_layers(tmp_path: Path) -> None:
    """Phi3 has fused projections, which it publishes as colwise_gather_output and rowwise_split."""
    changes = {"pad_token_id": 0, "num_key_value_heads": 2}
    styles = set(build("phi3", **changes).tp_plan.values())
    assert {"colwise_gather_output", "rowwise_split_input"} <= styles
    arguments = ("phi3", changes, "sgd", False)
    ranks = run_ranks(train_once, 2, tmp_path, args=arguments, layout=Layout(tp=2))
    assert_same_training(ranks, train(build("phi3", **changes), "sgd"), 1e-4)


def train_without_a_word_on_the_embedding(mesh: Mesh, changes: dict) -> dict[str, Any]:
    model = build("llama", **changes)
    del model.tp_plan["model.embed_tokens"]
    return train(apply_tensor_parallel(model, None, mesh.tp), "sgd")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_plans_that_do_not_name_the_embedding(tied: bool, tmp_path: Path) -> None:
    """As older releases publish them. An embedding that is tied to a split head is split too."""
    changes = {"tie_word_embeddings": tied}
    function = train_without_a_word_on_the_embedding
    ranks = run_ranks(function, 2, tmp_path, args=(changes,), layout=Layout(tp=2))
    assert_same_training(ranks, train(build("llama", **changes), "sgd"), 1e-4)
    assert len(ranks[0]["params"]["model.embed_tokens.weight"]) == (31 if tied else VOCAB)


@pytest.mark.parametrize("kind", ["gpt_neox", "olmo2", "starcoder2"])
def test_plans_of_other_families(kind: str, tmp_path: Path) -> None:
    """A fused projection by heads, norms over all heads at once, biases everywhere."""
    changes = {"pad_token_id": 0}
    arguments = (kind, changes, "sgd", False)
    ranks = run_ranks(train_once, 2, tmp_path, args=arguments, layout=Layout(tp=2))
    assert_same_training(ranks, train(build(kind, **changes), "sgd"), 1e-4)


def train_or_refuse(mesh: Mesh, kind: str, changes: dict) -> dict[str, Any] | str:
    try:
        return train_once(mesh, kind, changes, "sgd", False)
    except BigtrainError as error:
        return str(error)


def test_an_embedding_that_scales_what_it_looks_up_is_not_replaced(tmp_path: Path) -> None:
    """Gemma's is a subclass of nn.Embedding: either what it adds is kept, or it is refused."""
    changes = {"pad_token_id": 0}
    arguments = ("gemma2", changes)
    ranks = run_ranks(train_or_refuse, 2, tmp_path, args=arguments, layout=Layout(tp=2))
    if isinstance(ranks[0], str):
        assert "embed_tokens" in ranks[0]
        assert "ScaledWordEmbedding" in ranks[0]
    else:
        assert_same_training(ranks, train(build("gemma2", **changes), "sgd"), 1e-4)


def train_without_a_word_on_norms(mesh: Mesh) -> dict[str, Any] | str:
    model = build("qwen3")
    for norm in ("q_norm", "k_norm"):
        del model.tp_plan[f"model.layers.*.self_attn.{norm}"]
    try:
        return train(apply_tensor_parallel(model, None, mesh.tp), "sgd")
    except BigtrainError as error:
        return str(error)


def test_plans_that_do_not_name_norms_of_single_heads(tmp_path: Path) -> None:
    """As older releases publish them: gradients are summed all the same, or it is refused."""
    ranks = run_ranks(train_without_a_word_on_norms, 2, tmp_path, layout=Layout(tp=2))
    if isinstance(ranks[0], str):
        assert "q_norm" in ranks[0]
    else:
        assert_same_training(ranks, train(build("qwen3"), "sgd"), 1e-4)


def llava() -> nn.Module:
    """A model of text and pictures: its config has that of the text inside."""
    torch.manual_seed(5)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 8, "hidden_size": 32}
    text = transformers.LlamaConfig(
        vocab_size=VOCAB, intermediate_size=45, num_key_value_heads=2, head_dim=4, **sizes
    )
    vision = transformers.CLIPVisionConfig(
        intermediate_size=16, image_size=8, patch_size=4, **sizes
    )
    config = transformers.LlavaConfig(text_config=text, vision_config=vision)
    return transformers.LlavaForConditionalGeneration(config)


def look_at_text(mesh: Mesh) -> tuple[float, list[int]]:
    model = apply_tensor_parallel(llava(), None, mesh.tp)
    own = model.model.language_model.layers[0].self_attn.k_proj.weight
    return model(**batches()[0]).loss.item(), list(own.shape)


def test_heads_of_a_text_config_inside_are_not_cut(tmp_path: Path) -> None:
    wanted = llava()(**batches()[0]).loss.item()
    for loss, shape in run_ranks(look_at_text, 4, tmp_path, layout=Layout(tp=4)):
        assert loss == pytest.approx(wanted, abs=1e-5)
        assert shape == [4, 32]  # one whole head, that two ranks hold


def train_over_mesh(mesh: Mesh, kind: str) -> dict[str, Any]:
    model = build(kind, seed=5 + mesh.rank)
    path = parallelize(model, mesh, bucket_mb=0.01)
    optimizer = SGD(path.segments(), lr=0.1, momentum=0.9)
    start, losses, norms, grads = copy_of(model), [], [], {}
    size = BATCH // mesh.dp.degree
    mine = slice(mesh.dp.rank * size, (mesh.dp.rank + 1) * size)
    for step, batch in enumerate(batches()):
        # As a mean over all labels that count, which the halves of the batch have not as many of.
        counts = (batch["labels"][:, 1:] != -100).sum(1)
        share = counts[mine].sum() / counts.sum() * mesh.dp.degree
        loss = model(**{name: tensor[mine] for name, tensor in batch.items()}).loss * share
        path.backward(loss)
        path.finish()
        norms.append(path.grad_norm().item())
        if not step:
            grads = {name: param.grad.clone() for name, param in model.named_parameters()}
        optimizer.step()
        path.publish()
        losses.append(loss.item())
    return {
        "start": start,
        "losses": losses,
        "grads": grads,
        "norms": norms,
        "params": copy_of(model),
        "shards": shards_of(model),
    }


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_parallelize_over_dp_and_tp(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    plain = train(model, "sgd")
    ranks = run_ranks(train_over_mesh, 4, tmp_path, args=(kind,), layout=Layout(dp=2, tp=2))
    means = torch.tensor([rank["losses"] for rank in ranks]).mean(0).tolist()
    assert means == pytest.approx(plain["losses"], abs=1e-5)
    norm = torch.stack([grad.norm() for grad in plain["grads"].values()]).norm().item()
    for rank in ranks:
        assert rank["norms"][0] == pytest.approx(norm, rel=1e-5)
        assert rank["norms"] == ranks[0]["norms"]
        rank["losses"], rank["logits"] = plain["losses"], plain["logits"]  # compared above
    assert_same_training(ranks, plain, 1e-4)


def split_and_look(mesh: Mesh) -> None:
    model = build("qwen3")
    types = {name: type(module) for name, module in model.named_modules()}
    config, plan = model.config.to_dict(), dict(model.tp_plan)
    apply_tensor_parallel(model, None, mesh.tp)
    assert model.config.to_dict() == config
    assert model.tp_plan == plan == build("qwen3").tp_plan
    for name, module in model.named_modules():
        assert "forward" not in vars(module), name
        if types[name] not in (nn.Linear, nn.Embedding):
            assert type(module) is types[name], name


def test_config_and_code_of_the_model_stay_as_they_are(tmp_path: Path) -> None:
    run_ranks(split_and_look, 2, tmp_path, layout=Layout(tp=2))


def speak(model: nn.Module) -> dict[str, Any]:
    """Return logits, and what is generated with a cache of keys and values, token by token."""
    model.eval()
    ids = batches()[0]["input_ids"][2:3]
    with torch.no_grad():
        logits = model(ids).logits
        tokens = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    return {"logits": logits, "tokens": tokens.tolist()}


def load_and_speak(mesh: Mesh, folder: Path) -> dict[str, Any]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return speak(apply_tensor_parallel(model, None, mesh.tp))


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_saved_folder_loads_at_any_degree(kind: str, tmp_path: Path) -> None:
    model = build(kind, tie_word_embeddings=kind == "qwen2")
    model.save_pretrained(tmp_path / "saved")
    plain = speak(model)
    assert len(plain["tokens"][0]) > LENGTH
    for tp in (1, 2, 4):
        arguments = (tmp_path / "saved",)
        for rank in run_ranks(load_and_speak, tp, tmp_path, args=arguments, layout=Layout(tp=tp)):
            assert relative_error(rank["logits"], plain["logits"], 0.0) < 5e-6
            assert rank["tokens"] == plain["tokens"]


# -- what is refused ------------------------------------------------------------------------------


def refused(model: nn.Module, **options: Any) -> BigtrainError:
    """Return the error; the model is still whole."""
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(BigtrainError) as caught:
        apply_tensor_parallel(model, None, None, **options)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert caught.value.problem.mend
    return caught.value


def test_attention_dropout_is_refused() -> None:
    error = refused(build("llama", attention_dropout=0.1))
    assert "LlamaForCausalLM has attention_dropout = 0.1" in str(error)
    assert "attention_dropout=0" in str(error)


@pytest.mark.parametrize("style", ["packed_colwise", "nonsense"])
def test_a_style_that_is_not_supported_is_refused(
    style: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("llama")
    plan = {**model.tp_plan, "model.layers.*.mlp.gate_proj": style}
    monkeypatch.setattr(model, "_tp_plan", plan)
    error = refused(model)
    assert f"LlamaForCausalLM publishes the style '{style}'" in str(error)
    assert "model.layers.*.mlp.gate_proj" in str(error)
    assert "plan of your own" in str(error)


def test_a_model_that_publishes_no_plan_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    monkeypatch.setattr(model, "_tp_plan", {})
    assert "LlamaForCausalLM brings no plan" in str(refused(model))


def split_odd_heads(mesh: Mesh) -> str:
    model = build("llama", num_attention_heads=6, hidden_size=48, head_dim=8)
    with pytest.raises(BigtrainError) as caught:
        apply_tensor_parallel(model, None, mesh.tp)
    return str(caught.value)


def test_heads_that_cannot_be_shared_out_are_refused(tmp_path: Path) -> None:
    for message in run_ranks(split_odd_heads, 4, tmp_path, layout=Layout(tp=4)):
        assert "model.layers.0.self_attn.q_proj" in message
        assert "6 units (heads) cannot be shared out to 4 ranks" in message
        assert "1, 2, 3, 6" in message


def split_with_sequence_parallel(mesh: Mesh) -> str:
    with pytest.raises(BigtrainError) as caught:
        apply_tensor_parallel(build("llama"), None, mesh.tp, sequence_parallel=True)
    return str(caught.value)


def test_sequence_parallel_is_refused_before_the_first_step(tmp_path: Path) -> None:
    """Published plans do not say what works on a part of the sequence."""
    for message in run_ranks(split_with_sequence_parallel, 2, tmp_path, layout=Layout(tp=2)):
        assert "LlamaForCausalLM" in message
        assert "sequence_parallel" in message
