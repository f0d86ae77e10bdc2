"""Plans of tensor parallelism, the arithmetic of shards, and what is refused with what words."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from unit_helpers import assert_explained

from bigtrain.checkpoint.save import _share
from bigtrain.comm.block import Block, Shard, shards_of
from bigtrain.comm.mesh import Axis, Mesh
from bigtrain.comm.world import World
from bigtrain.compose import parallelize
from bigtrain.config.layout import Layout
from bigtrain.errors import BigtrainError
from bigtrain.models import GPT, Llama
from bigtrain.ops.dropout import Dropout
from bigtrain.tensor import (
    ColumnParallelLinear,
    ParallelAttention,
    ParallelMLP,
    RowParallelLinear,
    SharedInput,
    Style,
    VocabParallelCrossEntropy,
    VocabParallelEmbedding,
    apply_tensor_parallel,
    vocab_parallel_cross_entropy,
)
from bigtrain.tensor.plan import match_plan
from bigtrain.tensor.split import even_split, legal_degrees, shard_dim


def axis(degree: int, rank: int = 0) -> Axis:
    """Rank `rank` of `degree` that cannot talk: enough to build and refuse."""
    return Axis("tp", degree, rank, tuple(range(degree)), None)


def explained(action: Callable[[], Any], *words: str) -> None:
    with pytest.raises(BigtrainError) as caught:
        action()
    assert_explained(caught.value, *words)


def tree() -> nn.Module:
    block = nn.ModuleDict({"up": nn.Linear(4, 8), "down": nn.Linear(8, 4)})
    return nn.ModuleDict(
        {
            "embed": nn.Embedding(10, 4),
            "blocks": nn.ModuleList([copy.deepcopy(block), copy.deepcopy(block)]),
            "up": nn.Linear(4, 4),
        }
    )


# -- patterns ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("up", ["up"]),
        ("*", ["embed", "blocks", "up"]),
        ("blocks.*", ["blocks.0", "blocks.1"]),
        ("blocks.*.up", ["blocks.0.up", "blocks.1.up"]),
        ("blocks.0.*", ["blocks.0.up", "blocks.0.down"]),
        ("blocks.**.up", ["blocks.0.up", "blocks.1.up"]),
        ("*.*.up", ["blocks.0.up", "blocks.1.up"]),
        ("b*s.1.d*n", ["blocks.1.down"]),
        ("blocks.**", ["blocks.0", "blocks.0.up", "blocks.0.down"]),
        ("**.up", ["blocks.0.up", "blocks.1.up", "up"]),  # any number of components, none too
    ],
)
def test_patterns(pattern: str, names: list[str]) -> None:
    found = list(match_plan(tree(), {pattern: "whole"}))
    assert [name for name in found if name in names] == names
    if pattern != "blocks.**":
        assert found == names


def test_order_is_that_of_the_model() -> None:
    plan = {"up": "column", "blocks.*.down": "row", "embed": "vocab"}
    assert list(match_plan(tree(), plan)) == ["embed", "blocks.0.down", "blocks.1.down", "up"]


def test_a_string_is_a_style_without_units() -> None:
    style = Style("column", units=(2,))
    found = match_plan(tree(), {"up": style, "embed": "vocab"})
    assert found == {"embed": Style("vocab"), "up": style}


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"block.*.up": "column"}, ["'block.*.up' matches no module", "did you mean 'blocks"]),
        ({"": "column"}, ["'' matches no module"]),
        ({"blocks.0.u": "column"}, ["did you mean 'blocks.0.up'"]),
        ({"up.*": "column"}, ["'up.*' matches no module"]),
        ({"up": "colum"}, ["'colum'", "did you mean 'column'", "row_split"]),
        ({"up": Style("rows")}, ["'rows'", "did you mean 'row'"]),
        (
            {"blocks.*.up": "column", "blocks.1.*": "column"},
            ["blocks.1.up twice", "'blocks.*.up'", "'blocks.1.*'"],
        ),
    ],
)
def test_wrong_plans(plan: dict, words: list[str]) -> None:
    explained(lambda: match_plan(tree(), plan), *words)


def test_dots_are_dots() -> None:
    model = nn.ModuleDict({"a-b": nn.Linear(2, 2)})
    explained(lambda: match_plan(model, {"a.b": "column"}), "matches no module")


# -- styles -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "style", "word"),
    [
        (nn.LayerNorm(4), "column", "LayerNorm"),
        (nn.Embedding(4, 4), "column", "Embedding"),
        (nn.Embedding(4, 4), "row", "Embedding"),
        (nn.Dropout(0.1), "row", "Dropout"),
        (nn.Conv1d(2, 2, 1), "row_split", "Conv1d"),
        (nn.Bilinear(2, 2, 2), "column_gather", "Bilinear"),
        (nn.ReLU(), "vocab", "ReLU"),
        (nn.NLLLoss(), "vocab", "NLLLoss"),
        (nn.CrossEntropyLoss(weight=torch.ones(4)), "vocab", "class weights"),
        (nn.Identity(), "gather", "exactly one Linear with the style vocab"),
    ],
)
def test_a_style_that_does_not_fit_names_the_module(
    module: nn.Module, style: str, word: str
) -> None:
    model = nn.ModuleDict({"part": nn.ModuleDict({"it": module})})
    explained(
        lambda: apply_tensor_parallel(model, {"part.it": style}, axis(2)),
        "plan: part.it",
        word,
        style,
    )


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"max_norm": 1.0}, "max_norm"),
        ({"scale_grad_by_freq": True}, "scale_grad_by_freq"),
        ({"sparse": True}, "sparse"),
    ],
)
def test_unsupported_embeddings(options: dict, word: str) -> None:
    model = nn.Sequential(nn.Embedding(8, 4, **options))
    explained(lambda: apply_tensor_parallel(model, {"0": "vocab"}, axis(2)), "plan: 0", word)


class Scaled(nn.Embedding):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens) * 10.0


class Adapted(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1.0


class Shifted(nn.CrossEntropyLoss):
    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return super().forward(logits[:-1], targets[1:])


def hooked() -> nn.Module:
    layer = nn.Linear(4, 8)
    layer.register_forward_hook(lambda module, args, output: output * 2)
    return layer


OWN_FORWARD: dict[str, tuple[Callable[[], nn.Module], str, tuple]] = {
    "scaled-embedding": (lambda: Scaled(8, 4), "vocab", (torch.arange(8),)),
    "adapted-column": (lambda: Adapted(4, 8), "column", (torch.ones(3, 4),)),
    "adapted-row": (lambda: Adapted(4, 8), "row", (torch.ones(3, 4),)),
    "weight-norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 8)),
        "column",
        (torch.ones(3, 4),),
    ),
    "hooked": (hooked, "column", (torch.ones(3, 4),)),
    "shifted-loss": (Shifted, "vocab", (torch.randn(5, 8), torch.arange(5))),
}


@pytest.mark.parametrize("name", OWN_FORWARD)
def test_what_a_subclass_adds_is_not_lost(name: str) -> None:
    """It is kept, or the style is refused; never silently dropped."""
    make, style, args = OWN_FORWARD[name]
    torch.manual_seed(0)
    model = nn.Sequential(make())
    wanted, names = model[0](*args), [n for n, _ in model.named_parameters()]
    try:
        split = apply_tensor_parallel(model, {"0": style}, None)
    except BigtrainError as error:
        assert_explained(error, "plan: 0")
        return
    torch.testing.assert_close(split[0](*args), wanted)
    assert [n for n, _ in split.named_parameters()] == names


def tied() -> nn.Module:
    model = nn.ModuleDict({"embed": nn.Embedding(8, 4), "head": nn.Linear(4, 8, bias=False)})
    model["head"].weight = model["embed"].weight
    return model


@pytest.mark.parametrize(
    ("plan", "named"),
    [({"embed": "vocab"}, "head"), ({"head": "vocab"}, "embed"), ({"head": "column"}, "embed")],
)
def test_half_ties_are_refused(plan: dict, named: str) -> None:
    explained(lambda: apply_tensor_parallel(tied(), plan, axis(2)), named, "tied")


def test_whole_ties_stay() -> None:
    split = apply_tensor_parallel(tied(), {"embed": "vocab", "head": "vocab"}, axis(2))
    assert split["embed"].weight is split["head"].weight
    assert len(list(split.parameters())) == 1


def test_ties_that_would_be_split_in_two_ways_are_refused() -> None:
    """One parameter cannot be split by rows for one module and by columns for another."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    plan = {"0": "column", "1": "row"}
    explained(lambda: apply_tensor_parallel(model, plan, axis(2)), "tied")


@pytest.mark.parametrize("style", ["sequence", "scatter_sequence", "gather_sequence"])
def test_sequence_styles_do_nothing_without_sequence_parallel(style: str) -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.Dropout(0.5), nn.Embedding(3, 4))
    before = list(model)
    apply_tensor_parallel(model, {"*": style}, axis(2))
    assert list(model) == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model)


def test_dropouts_take_their_part() -> None:
    model = nn.Sequential(nn.Dropout(0.5), Dropout(0.25)).eval()
    split = apply_tensor_parallel(model, {"*": "column"}, axis(4, 3))
    assert [type(module) for module in split] == [Dropout, Dropout]
    assert [module.p for module in split] == [0.5, 0.25]
    assert "part 3 of 4" in repr(split[0])
    assert not split[0].training


def test_loss_options_are_taken_over() -> None:
    loss = nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=3, reduction="sum")
    model = nn.ModuleDict({"head": nn.Linear(4, 13), "loss": loss})
    split = apply_tensor_parallel(model, {"head": "vocab", "loss": "vocab"}, axis(4))["loss"]
    assert isinstance(split, VocabParallelCrossEntropy)
    found = (split.label_smoothing, split.ignore_index, split.reduction, split.vocab_size)
    assert found == (0.1, 3, "sum", 13)


def test_a_model_without_a_plan() -> None:
    explained(lambda: apply_tensor_parallel(tree(), None, axis(2)), "ModuleDict", "tensor_plan")


@pytest.mark.parametrize("make", [GPT, Llama])
def test_plans_of_our_models_split_all_but_norms_and_positions(make: type) -> None:
    model = apply_tensor_parallel(make(61, 16, 2, 32, 8), None, axis(4, 1))
    shards = shards_of(model)
    whole = {n for n, _ in model.named_parameters() if n not in shards}
    assert all("norm" in name or name == "position_embedding.weight" for name in whole)
    for name, param in model.named_parameters():
        if name in shards:
            assert tuple(param.shape) == shards[name].local_shape, name


# -- arithmetic -------------------------------------------------------------------------------


def test_even_split_leaves_nothing_out() -> None:
    for size, degree in itertools.product(range(40), range(1, 12)):
        cuts = [even_split(size, degree, rank) for rank in range(degree)]
        assert [i for a, b in cuts for i in range(a, b)] == list(range(size))
        sizes = [b - a for a, b in cuts]
        assert sizes == sorted(sizes, reverse=True)
        assert max(sizes) - min(sizes) <= 1


def splits() -> list[tuple[tuple[int, ...], int, int, tuple[int, ...], bool]]:
    """Shape, dim, degree, units, share."""
    cases: list[tuple[tuple[int, ...], int, int, tuple[int, ...], bool]] = []
    for size, degree in itertools.product((1, 3, 8, 13), (1, 2, 3, 4, 8)):
        cases += [((size,), 0, degree, (), False), ((2, size), 1, degree, (), False)]
        cases.append(((size, 3), 0, degree, (), False))
    for degree in (1, 2, 4):
        cases.append(((48, 5), 0, degree, (8, 4, 4), False))
        cases.append(((5, 24), 1, degree, (8,), False))
    for heads, degree in itertools.product((1, 2, 3, 4), (1, 2, 3, 4, 6, 8)):
        if heads % degree == 0 or degree % heads == 0:
            cases.append(((heads * 3, 2), 0, degree, (heads,), True))
    return cases


@pytest.mark.parametrize("case", splits(), ids=str)
def test_shards_cover_every_element_as_often_as_they_say(case: tuple) -> None:
    shape, dim, degree, units, share = case
    full = torch.arange(torch.Size(shape).numel()).reshape(shape)
    counts, rebuilt = torch.zeros(shape), torch.full(shape, -1)
    named = torch.zeros(shape)
    for rank in range(degree):
        shard = shard_dim(shape, dim, degree, rank, units=units, share=share)
        own = shard.take(full)
        assert tuple(own.shape) == shard.local_shape
        shard.put(own, rebuilt)
        hit = torch.zeros(shape)
        shard.put(torch.ones(own.shape), hit)
        assert int(hit.sum()) == own.numel()
        counts += hit / shard.num_replicas
        rows = [(start, start + 1) for start in range(own.shape[0])] if own.numel() else []
        for start, stop in rows:  # as ranks of another axis would own them
            part = Block((start, *(0 for _ in shape[1:])), (stop - start, *own.shape[1:]))
            for block in shard.named_blocks("it", part, own[part.slices], (1, 2)):
                assert torch.equal(full[block.block.slices], block.tensor)
                assert block.shape == shape
                assert block.num_replicas == 2 * shard.num_replicas
                assert block.replica == 2 * shard.replica + 1
                named[block.block.slices] += 1 / shard.num_replicas
    torch.testing.assert_close(counts, torch.ones(shape))
    torch.testing.assert_close(named, torch.ones(shape))
    assert torch.equal(rebuilt, full)


def test_replicas_of_shared_units_are_numbered() -> None:
    shards = [shard_dim((6,), 0, 8, rank, units=(2,), share=True) for rank in range(8)]
    assert [(s.replica, s.num_replicas) for s in shards] == [(i % 4, 4) for i in range(8)]
    assert [s.pieces[0].full.offsets for s in shards] == [(0,)] * 4 + [(3,)] * 4


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)])
def test_whole_shards(shape: tuple[int, ...]) -> None:
    full = torch.rand(shape)
    shard = Shard.whole(shape, 1, 3)
    assert shard.local_shape == shape
    assert torch.equal(shard.take(full), full)


def test_legal_degrees_are_those_that_work() -> None:
    """And where ranks may share a unit, multiples of their number too."""

    def works(heads: int, degree: int, share: bool) -> bool:
        try:
            shard_dim((heads * 2,), 0, degree, 0, units=(heads,), share=share)
        except BigtrainError:
            return False
        return True

    for heads, degree in itertools.product((1, 2, 3, 4, 6, 8), range(1, 17)):
        legal = degree in legal_degrees(heads)
        assert works(heads, degree, share=False) == legal
        assert works(heads, degree, share=True) == (legal or degree % heads == 0)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: ColumnParallelLinear(4, 12, axis(4), units=(6,)), ["1, 2, 3, 6", "6 units"]),
        (lambda: ColumnParallelLinear(4, 24, axis(8), units=(8, 2, 2)), ["1, 2", "2 units"]),
        (lambda: RowParallelLinear(12, 4, axis(5), units=(6,)), ["1, 2, 3, 6"]),
        (
            lambda: ColumnParallelLinear(4, 6, axis(4), units=(3,), share=True),
            ["1, 3, or a multiple of 3"],
        ),
        (lambda: ColumnParallelLinear(4, 6, axis(2), units=(4,)), ["dim 0", "4 equal units"]),
        (lambda: ColumnParallelLinear(4, 6, axis(2), units=(0,)), ["units"]),
        (lambda: ColumnParallelLinear(4, 6, axis(2), units=(-2, 8)), ["units"]),
        (lambda: ParallelAttention(32, 6, axis(2)), ["6 heads", "32"]),
        (lambda: ParallelAttention(32, 8, axis(2), num_kv_heads=3), ["3 key-value heads"]),
        (lambda: ParallelAttention(32, 8, axis(3)), ["3 ranks", "1, 2, 4, 8"]),
        (lambda: ParallelAttention(24, 6, axis(3), num_kv_heads=2), ["3 ranks"]),
        (lambda: ParallelMLP(4, 8, axis(2), activation="swish"), ["'swish'", "silu"]),
        (lambda: ParallelMLP(4, 9, axis(2), dropout=0.1), ["9 channels", "multiple of 2"]),
        (
            lambda: ColumnParallelLinear(4, 4, axis(4), units=(2,), share=True, gather_output=True),
            ["gather_output"],
        ),
        (lambda: apply_tensor_parallel(GPT(num_heads=4), None, axis(3)), ["attention.qkv", "1, 2"]),
        (lambda: apply_tensor_parallel(Llama(num_heads=4), None, axis(8)), ["attention.q", "1, 2"]),
    ],
)
def test_units_that_do_not_divide(build: Callable[[], Any], words: list[str]) -> None:
    explained(build, *words)


# -- inputs -----------------------------------------------------------------------------------


def test_dropout_on_uneven_columns_is_refused() -> None:
    """Its parts would be drawn as parts of tensors of different sizes on every rank."""
    model = nn.Sequential(nn.Linear(4, 9), nn.Dropout(0.5), nn.Linear(9, 4))
    plan = {"0": "column", "1": "column", "2": "row"}

    def use() -> None:
        apply_tensor_parallel(model, plan, axis(2))[:2](torch.ones(2, 4))

    explained(use)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ColumnParallelLinear(4, 8)(torch.ones(2, 5)), ["(2, 5)", "should be 4"]),
        (lambda: ColumnParallelLinear(4, 8)(torch.ones(())), ["()", "should be 4"]),
        (lambda: RowParallelLinear(8, 4, axis(2))(torch.ones(2, 8)), ["(2, 8)", "should be 4"]),
        (lambda: RowParallelLinear(8, 4)(torch.ones(2, 4)), ["(2, 4)", "should be 8"]),
        (
            lambda: ColumnParallelLinear(4, 8)(torch.ones(2, 4).bfloat16()),
            ["torch.bfloat16", "torch.float32", "autocast"],
        ),
        (lambda: RowParallelLinear(4, 8)(torch.ones(2, 4).double()), ["torch.float64"]),
        (lambda: ParallelMLP(4, 8).bfloat16()(torch.ones(2, 4)), ["torch.bfloat16"]),
        (lambda: VocabParallelEmbedding(8, 4)(torch.tensor([1, 8])), ["token 8", "of 8", "0 to 7"]),
        (lambda: VocabParallelEmbedding(8, 4)(torch.tensor([[-1]])), ["token -1"]),
        (
            lambda: vocab_parallel_cross_entropy(torch.zeros(2, 8), torch.tensor([1, 8])),
            ["target 8", "of 8"],
        ),
        (
            lambda: vocab_parallel_cross_entropy(torch.zeros(2, 8), torch.tensor([1, -1])),
            ["target -1"],
        ),
        (
            lambda: vocab_parallel_cross_entropy(
                torch.zeros(2, 8), torch.tensor([1, -100]), ignore_index=0
            ),
            ["target -100"],
        ),
        (
            lambda: vocab_parallel_cross_entropy(torch.zeros(2, 8), torch.tensor([1])),
            ["(2, 8)", "(1,)"],
        ),
        (
            lambda: vocab_parallel_cross_entropy(
                torch.zeros(2, 8), torch.tensor([1, 2]), axis(2), vocab_size=13
            ),
            ["13", "7 columns", "vocab_size"],
        ),
        (
            lambda: vocab_parallel_cross_entropy(
                torch.zeros(2, 8), torch.tensor([1, 2]), reduction="avg"
            ),
            ["'avg'", "none"],
        ),
    ],
)
def test_wrong_inputs(call: Callable[[], Any], words: list[str]) -> None:
    explained(call, *words)


# -- groups -----------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["tp", 3, [0, 1], object(), -100])
def test_nonsense_is_no_group(group: Any) -> None:
    explained(lambda: Axis.of(group), "no group", "mesh.tp")


def test_nobody_else() -> None:
    assert Axis.of(None) == Axis("tp", 1, 0, (0,), None)
    there = axis(4, 2)
    assert Axis.of(there) is there
    assert copy.deepcopy(there) is there


def foreign_groups(mesh: Mesh) -> list[str]:
    """Groups that rank 2 is not in, and a mesh of two dims."""
    group, device_mesh = dist.new_group([0, 1]), DeviceMesh("cpu", [0, 1])
    square = DeviceMesh("cpu", [[0, 1, 2]])
    found = []
    for each in (group, device_mesh, square):
        try:
            found.append(f"{Axis.of(each).rank} of {Axis.of(each).degree}")
        except BigtrainError as error:
            found.append(error.problem.what)
    dist.barrier()  # nobody leaves while others still connect to it
    return found


def test_groups_of_others(tmp_path: Path) -> None:
    refused = "this is no group that this rank can use"
    ranks = run_ranks(foreign_groups, 3, tmp_path)
    assert ranks[0] == ["0 of 2", "0 of 2", refused]
    assert ranks[1] == ["1 of 2", "1 of 2", refused]
    assert ranks[2] == [refused, refused, refused]


def uneven_sequences(mesh: Mesh) -> list[str]:
    """Each entrance to sequence parallelism, with 7 tokens for 2 ranks."""
    tp, texts = mesh.tp, []
    embed = VocabParallelEmbedding(8, 4, tp, sequence_parallel=True)
    row = RowParallelLinear(8, 4, tp, sequence_parallel=True)
    gpt = apply_tensor_parallel(GPT(8, 16, 1, 8, 2), None, tp, sequence_parallel=True)
    tokens = torch.zeros(2, 7, dtype=torch.long)
    for call in (
        lambda: embed(tokens),
        lambda: row(torch.ones(2, 7, 4)),
        lambda: gpt(tokens, tokens),
        lambda: row(torch.ones(4)),  # no sequence at all
    ):
        try:
            call()
            texts.append("accepted")
        except BigtrainError as error:
            texts.append(str(error))
    return texts


def test_sequences_that_do_not_divide(tmp_path: Path) -> None:
    for texts in run_ranks(uneven_sequences, 2, tmp_path, layout=Layout(tp=2)):
        for text in texts[:3]:
            assert "a sequence of 7 cannot be shared out to 2 ranks" in text
            assert "multiple of 2" in text
        assert "sequence" in texts[3]


def other_groups(mesh: Mesh) -> list[str]:
    """Layers of the dp axis, of this rank alone and of tp, in a mesh that has dp and tp."""
    texts = []
    for group in (mesh.dp, None, mesh.world, mesh.tp):
        model = nn.Sequential(nn.Linear(4, 4), ParallelMLP(4, 8, group))
        try:
            parallelize(model, mesh)
            texts.append("good")
        except BigtrainError as error:
            texts.append(str(error))
    return texts


def test_layers_of_another_group_are_refused(tmp_path: Path) -> None:
    for rank, texts in enumerate(run_ranks(other_groups, 4, tmp_path, layout=Layout(dp=2, tp=2))):
        ours = "(0, 1)" if rank < 2 else "(2, 3)"
        for text in texts[:3]:
            assert "1.up is split over ranks" in text
            assert f"tensor-parallel ranks are {ours}" in text
        assert texts[3] == "good"


def fake_mesh(degree: int, rank: int) -> Mesh:
    """A mesh whose ranks along tp cannot talk, for what each works out by itself."""
    alone = Mesh.build(Layout(), World(), torch.device("cpu"))
    world = Axis("world", degree, rank, tuple(range(degree)), None)
    return Mesh(
        Layout(tp=degree),
        rank,
        rank,
        alone.device,
        world,
        alone.pp,
        alone.dp,
        alone.cp,
        axis(degree, rank),
    )


def test_a_container_and_its_parts_are_not_both_summed() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)))
    plan = {"0": "replicate", "0.0": "column", "0.2": "row"}
    explained(lambda: match_plan(model, plan), "replicate", "0.0")
    match_plan(model, {**plan, "0": "gather_sequence"})


def test_sequence_parallel_wants_a_word_on_every_module() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    plan = {"1": "column", "3": "row"}

    def split(plan: dict) -> nn.Module:
        return apply_tensor_parallel(copy.deepcopy(model), plan, axis(2), sequence_parallel=True)

    explained(lambda: split(plan), "never splits the sequence")
    explained(lambda: split({**plan, "2": "sequence"}), "whether 0 works on a part")
    split({**plan, "0": "sequence"})


def test_an_empty_plan_is_refused() -> None:
    explained(lambda: match_plan(tree(), {}), "empty")


def test_siblings_must_be_split_alike() -> None:
    entrance = SharedInput()
    ColumnParallelLinear(4, 8, axis(2), shared_input=entrance)
    explained(
        lambda: ColumnParallelLinear(4, 8, axis(2), shared_input=entrance, sequence_parallel=True),
        "share an input",
    )


def test_a_model_of_parallel_layers_takes_no_second_plan() -> None:
    def model() -> nn.Module:
        return nn.Sequential(ColumnParallelLinear(4, 8, axis(2)), nn.Linear(4, 4))

    mesh = fake_mesh(2, 0)
    explained(lambda: parallelize(model(), mesh, tensor_plan={"1": "row"}), "already")
    explained(lambda: parallelize(model(), mesh, sequence_parallel=True), "already")


def test_a_rank_without_any_parameter_has_a_norm() -> None:
    path = parallelize(nn.Sequential(VocabParallelEmbedding(2, 4, axis(4, 3))), fake_mesh(4, 3))
    path.backward(path.model(torch.tensor([0, 1])).sum())
    path.finish()
    assert path.grad_norm() == 0.0


def test_a_plan_without_a_fit_leaves_nothing_to_guess() -> None:
    explained(lambda: parallelize(tree(), fake_mesh(1, 0), tensor_plan={"x": "row"}), "'x'")
    explained(lambda: parallelize(tree(), fake_mesh(2, 0)), "tensor_plan")
    explained(lambda: parallelize(tree(), fake_mesh(2, 0), tensor_plan={"x": "row"}), "'x'")


@pytest.mark.parametrize(
    ("vocab", "bucket_mb", "degree"),
    [(71, 0.00287, 2), (125, 0.00313, 2), (61, 0.002, 4), (47, 0.00138, 4), (78, 0.00127, 4)],
)
def test_ranks_agree_who_writes_what(vocab: int, bucket_mb: float, degree: int) -> None:
    """Buckets end at different parameters where shards differ in size; nothing may get lost."""
    held, written = set(), []
    for rank in range(degree):
        torch.manual_seed(0)
        model = GPT(vocab, 16, 1, 8, 8, tie_embeddings=False)
        path = parallelize(model, fake_mesh(degree, rank), bucket_mb=bucket_mb)
        flats = [segment.main_params for segment in path.segments()]
        blocks = [b for kind in ("model.", "moment.") for b in path.blocks(kind, flats)]
        held |= {(b.name, b.block) for b in blocks}
        written += [(b.name, b.block) for b in _share(blocks)]
    assert len(written) == len(held)
    assert set(written) == held
