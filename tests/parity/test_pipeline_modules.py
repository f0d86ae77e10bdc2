"""Any nn.Module under pipeline parallelism: its own forward, cut into stages, equals one process.

Models without a list of layers are followed on an example, and cut at modules. Their gradients of a
step are compared with those of torch alone over the same microbatches: relative errors below 5e-6
in the 2-norm, as the sum over microbatches is added in another order at most.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from harness import run_ranks
from parity_models import VOCAB, survey
from pipeline_models import (
    assert_gradients,
    batches_of,
    gpt,
    language_loss,
    llama,
    named_gradients,
    plain_gradients,
    ready,
    shown,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from bigtrain.comm.mesh import Mesh
from bigtrain.comm.p2p import Links
from bigtrain.compose import build_pipeline
from bigtrain.config.layout import Layout
from bigtrain.errors import BigtrainError
from bigtrain.models import GPT
from bigtrain.observe.replicas import find_divergence
from bigtrain.pipeline import cost
from bigtrain.pipeline.schedule import placement_of
from bigtrain.pipeline.stage import inside
from bigtrain.pipeline.units import chain_of, choose_cuts

pytestmark = pytest.mark.parity


# -- models -----------------------------------------------------------------------------------


class Residual(nn.Module):
    """Two convolutions with BatchNorm; the activation is one module for all blocks."""

    def __init__(self, channels: int, relu: nn.Module) -> None:
        super().__init__()
        # No biases: behind them BatchNorm makes gradients that are zero but for rounding.
        self.one, self.two = (
            nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2)
        )
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.relu = relu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.norm1(self.one(x)))
        return self.relu(x + self.norm2(self.two(y)))


class Picture(nn.Module):
    """A small ResNet, with pooling by functions between its modules."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.layers = nn.ModuleList(Residual(8, self.relu) for _ in range(3))
        self.wider = nn.Conv2d(8, 12, 1, stride=2)
        self.head = nn.Linear(12, 5)

    def forward(self, pictures: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(self.relu(self.norm(self.stem(pictures))), 2)
        skipped = x
        for layer in self.layers:
            x = layer(x)
        x = self.wider(x + skipped)
        x = self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return F.cross_entropy(x, classes)


def pictures(sizes: Sequence[int] = (3, 2, 4)) -> list[Any]:
    torch.manual_seed(3)
    return [(torch.randn(n, 3, 8, 8), torch.randint(0, 5, (n,))) for n in sizes]


class Rooted(nn.Module):
    """Parameters of its own, a head that is another module's weight, residuals over all layers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(16) + 0.5)
        self.shift = nn.Parameter(torch.randn(16))
        self.never = nn.Parameter(torch.ones(3))
        self.embed = nn.Embedding(VOCAB, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))
        self.unused = nn.Linear(4, 4)
        self.register_buffer("table", torch.linspace(0.5, 1.5, 16))
        self.register_buffer("steps", torch.zeros(()), persistent=False)

    table: torch.Tensor

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        first = self.embed(tokens) * self.table
        x, early = first, None
        for index, layer in enumerate(self.layers):
            x = x + torch.tanh(layer(x * self.scale))
            if index == 1:
                early = x.mean(1, keepdim=True)
        assert early is not None
        x = F.layer_norm(x + first + early, (16,), self.scale, self.shift)
        logits = F.linear(x, self.embed.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Mixer(nn.Module):
    """Gives a tuple with a constant and None in it, or a dict."""

    def __init__(self, as_dict: bool) -> None:
        super().__init__()
        self.linear, self.gate = nn.Linear(16, 16), nn.Linear(16, 16)
        self.as_dict = as_dict

    def forward(
        self, x: torch.Tensor, memory: torch.Tensor | None = None, *, scale: float = 1.0
    ) -> Any:
        y = torch.tanh(self.linear(x)) * scale
        if memory is not None:
            y = y + memory.mean(1, keepdim=True)
        gate = torch.sigmoid(self.gate(x))
        if self.as_dict:
            return {"y": x + y, "extra": {"gate": gate, "none": None}, "size": 2}
        return x + y, None, (gate, 3)


class EncoderDecoder(nn.Module):
    """Two inputs, out of a dict, that meet late; keyword arguments; a mask that has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out_embed = nn.Embedding(VOCAB, 16), nn.Embedding(VOCAB, 16)
        self.encoder = nn.ModuleList(Mixer(False) for _ in range(3))
        self.decoder = nn.ModuleList(Mixer(True) for _ in range(3))
        self.head = nn.Linear(16, VOCAB)

    def forward(
        self,
        inputs: Mapping[str, torch.Tensor],
        *,
        labels: torch.Tensor | None = None,
        scale: float = 1.0,
    ) -> Any:
        mask = (inputs["source"] != 0)[..., None]
        memory, gates = self.embed(inputs["source"]), []
        for layer in self.encoder:
            memory, nothing, (gate, three) = layer(memory * mask, scale=scale)
            assert nothing is None
            gates.append(gate * three)
        x = self.out_embed(inputs["target"])
        for layer in self.decoder:
            given = layer(x, memory=memory)
            assert given["extra"]["none"] is None
            x = given["y"] * given["extra"]["gate"] / given["size"]
        x = x + sum(gates, torch.zeros(())).mean(1, keepdim=True)
        logits = self.head(x)
        if labels is None:
            return logits
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def pairs(lengths: Sequence[tuple[int, int]] = ((6, 5), (6, 5), (6, 5))) -> list[Any]:
    torch.manual_seed(3)
    return [
        {
            "inputs": {
                "source": torch.randint(0, VOCAB, (2, source)),
                "target": torch.randint(0, VOCAB, (2, target)),
            },
            "labels": torch.randint(0, VOCAB, (2, target)),
            "scale": 0.5 + number,
        }
        for number, (source, target) in enumerate(lengths)
    ]


class Twice(nn.Module):
    """A module that is called in the first and in the last stage; and a list of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 16)
        self.shared = nn.Linear(16, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.head = nn.Linear(16, VOCAB)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.shared(self.embed(tokens))
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        logits = self.head(torch.tanh(self.shared(x)))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Routed(nn.Module):
    """Numbers without a gradient go from stage to stage; some modules give what they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.router = nn.Embedding(VOCAB, 16), Router()
        self.same, self.drop = nn.Identity(), nn.Dropout(0.0)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.head = nn.Linear(16, VOCAB)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        weights, places = self.router(x)
        y = self.same(x)
        for index, layer in enumerate(self.layers):
            y = torch.where((places == index % 2)[..., None], layer(y), y) * weights[..., None]
            y = self.drop(y) + x
        return F.cross_entropy(self.head(y).flatten(0, 1), targets.flatten())


class Router(nn.Module):
    """Gives weights with a gradient, and numbers without."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(16, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, places = self.score(x).softmax(-1).max(-1)
        return weights, places


class InPlace(nn.Module):
    """Activations are changed in place, by a module and by the model's own code."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.a(x))
        y = self.b(x)
        y += x
        z = self.c(y)
        z.mul_(2)
        return F.cross_entropy(self.head(self.relu(self.d(z))), classes)


class Bare(nn.Module):
    """Its last module has no parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5))
        self.loss = nn.CrossEntropyLoss()

    def forward(self, x: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.loss(self.layers(x), classes)
        return loss


class Ending(nn.Module):
    """What the first module gives is needed by nobody but the end."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 5), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        first = self.a(x)
        return F.cross_entropy(self.c(self.b(x)) + first, classes)


def vectors(num: int = 3) -> list[Any]:
    torch.manual_seed(3)
    return [(torch.randn(3, 8), torch.randint(0, 5, (3,))) for _ in range(num)]


class Remembering(nn.Module):
    """Layers whose forward is repeated in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 16)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)) for _ in range(6)
        )
        self.head = nn.Linear(16, VOCAB)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + checkpoint(layer, x, use_reentrant=False)
        return F.cross_entropy(self.head(x).flatten(0, 1), targets.flatten())


def micros(num: int = 3, size: int = 2, length: int = 8) -> list[Any]:
    return batches_of(num, size, length)


def call_loss(model: Any, batch: Any) -> torch.Tensor:
    loss: torch.Tensor = model(*batch)
    return loss


def numbered_loss(model: Any, number: int, batch: Any) -> torch.Tensor:
    return call_loss(model, batch)


def named_loss(model: Any, batch: Any) -> torch.Tensor:
    loss: torch.Tensor = model(**batch)["loss"]
    return loss


def own_loss(model: Any, batch: Any) -> torch.Tensor:
    """A user's: it prepares the batch, looks at the model, and adds to what it gives."""
    tokens, targets = batch
    assert model.training
    logits = model((tokens + 1) % VOCAB)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    return loss + 1e-3 * logits.float().square().mean()


def attribute_loss(model: Any, batch: Any) -> torch.Tensor:
    """Batches that are objects, of which the loss function takes what it needs."""
    out = model(batch.tokens)
    return F.cross_entropy(out.flatten(0, 1), batch.targets.flatten())


@dataclass
class Sample:
    tokens: torch.Tensor
    targets: torch.Tensor


def objects() -> list[Any]:
    return [Sample(*batch) for batch in micros()]


class Hidden(GPT):
    """A GPT that does not say what its layers are."""

    pipeline_layers = None  # type: ignore[assignment]


def hidden_gpt() -> nn.Module:
    torch.manual_seed(7)
    return Hidden(VOCAB, 16, 4, 16, 4)


def seeded(kind: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(5)
    return kind()


def frozen(model: nn.Module, *prefixes: str) -> nn.Module:
    for name, param in model.named_parameters():
        if name.startswith(prefixes):
            param.requires_grad_(False)
    return model


HALF = ("token_embedding", "position_embedding", "blocks.0", "blocks.1")


def hugging_face(kind: str, **changes: Any) -> nn.Module:
    import transformers

    torch.manual_seed(5)
    given: dict[str, Any] = {"vocab_size": VOCAB, "tie_word_embeddings": False}
    if kind == "gpt2":
        given |= {"n_embd": 16, "n_layer": 4, "n_head": 4, "n_positions": 32}
        given |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    else:
        given |= {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32,
            "pad_token_id": 0,
        }
    config = transformers.AutoConfig.for_model(kind, **(given | changes))
    return transformers.AutoModelForCausalLM.from_config(config).train()


def texts(masked: bool = True, num: int = 3, length: int = 10) -> list[Any]:
    draw = torch.Generator().manual_seed(3)
    found = []
    for _ in range(num):
        ids = torch.randint(1, VOCAB, (2, length), generator=draw)
        mask = torch.ones_like(ids)
        mask[1, :3] = 0
        labels = ids.masked_fill(mask == 0, -100)
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        found.append(batch if masked else {"input_ids": ids, "labels": ids})
    return found


# -- what a rank does, and what it is compared with ---------------------------------------------


@dataclass(frozen=True)
class Case:
    """A model, its microbatches, its loss function, and how it is cut and scheduled."""

    make: Callable[[], nn.Module]
    batches: Callable[[], list[Any]]
    loss_of: Callable[[Any, Any], torch.Tensor] = call_loss
    schedule: str = "1f1b"
    split: tuple[str, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def two_steps(mesh: Mesh, case: Case) -> dict[str, Any]:
    """Do the same step twice, so that what the first leaves behind shows in the second."""
    model, batches = case.make(), case.batches()
    name, _, virtual = case.schedule.partition("/")
    pipeline = build_pipeline(
        model,
        mesh,
        schedule=name,
        virtual_stages=int(virtual or 1),
        split=case.split,
        example=batches[0],
        loss_of=case.loss_of,
        **case.options,
    )
    path = pipeline.path
    found: dict[str, Any] = {"steps": []}
    for _ in range(2):
        loss = float(pipeline.step(batches, case.loss_of))
        path.finish()
        found["steps"].append({"loss": loss, "grads": named_gradients(path)})
        norm = float(path.grad_norm())
        path.publish()
    buffers = {path.names[b]: b.clone() for b in model.buffers() if b in path.names}
    blocks = list(path.blocks("", [segment.main_params for segment in path.segments()]))
    return found | {
        "norm": norm,
        "buffers": buffers,
        "shards": path.shards,
        "units": {stage.index: list(stage.units) for stage in pipeline.stages},
        "divergence": find_divergence(blocks, mesh.world),
        "num_parameters": pipeline.num_parameters,
    }


def plainly(case: Case) -> dict[str, Any]:
    model = case.make()
    plain = plain_gradients(model, case.batches(), case.loss_of)
    # Running statistics have seen every microbatch twice.
    plain_gradients(model, case.batches(), case.loss_of)
    norm = float(nn.utils.get_total_norm(plain["grads"].values()))
    num = sum(param.numel() for param in model.parameters())
    return plain | {"norm": norm, "buffers": dict(model.named_buffers()), "num_parameters": num}


CUT_PICTURE = ("layers.0", "layers.2", "wider")
CASES: dict[str, tuple[Layout, dict[str, Case]]] = {
    "pp2": (
        Layout(pp=2),
        {
            "picture": Case(partial(seeded, Picture), pictures),
            "picture-zb_v": Case(
                partial(seeded, Picture), pictures, schedule="zb_v", split=CUT_PICTURE
            ),
            "picture-inside": Case(partial(seeded, Picture), pictures, split=("layers.1.norm2",)),
            "rooted": Case(partial(seeded, Rooted), micros, split=("layers.3",)),
            "rooted-zb_h1": Case(partial(seeded, Rooted), micros, schedule="zb_h1"),
            "encoder": Case(partial(seeded, EncoderDecoder), pairs, named_loss),
            "encoder-zb_v": Case(
                partial(seeded, EncoderDecoder), pairs, named_loss, schedule="zb_v"
            ),
            "encoder-lengths": Case(
                partial(seeded, EncoderDecoder),
                partial(pairs, ((6, 5), (3, 7), (6, 5))),
                named_loss,
                split=("decoder.0",),
            ),
            "twice": Case(partial(seeded, Twice), micros, split=("layers.2",)),
            "routed": Case(partial(seeded, Routed), micros, split=("layers.1",)),
            "routed-zb_v": Case(partial(seeded, Routed), micros, schedule="zb_v"),
            "in-place-module": Case(partial(seeded, InPlace), vectors, split=("relu",)),
            "in-place-sum": Case(partial(seeded, InPlace), vectors, split=("c",)),
            "in-place-after": Case(partial(seeded, InPlace), vectors, split=("d",)),
            "in-place-zb_v": Case(
                partial(seeded, InPlace), vectors, schedule="zb_v", split=("b", "c", "d")
            ),
            "ending": Case(partial(seeded, Ending), vectors, split=("c",)),
            "bare": Case(partial(seeded, Bare), vectors, split=("loss",)),
            "bare-middle": Case(
                partial(seeded, Bare),
                partial(vectors, 4),
                schedule="interleaved/2",
                split=("layers.1", "layers.2", "loss"),
            ),
            "objects": Case(partial(gpt, 4), objects, attribute_loss),
            "objects-hidden": Case(hidden_gpt, objects, attribute_loss, schedule="zb_h1"),
            "repeated": Case(partial(seeded, Remembering), micros),
            "repeated-zb_v": Case(partial(seeded, Remembering), micros, schedule="zb_v"),
            "hidden": Case(hidden_gpt, micros, language_loss, split=("blocks.2",)),
            "listed": Case(partial(gpt, 4, tie=True), micros, language_loss, split=("blocks.2",)),
            "own-loss": Case(partial(gpt, 4), micros, own_loss),
            "own-loss-hidden": Case(hidden_gpt, micros, own_loss, schedule="zb_v"),
            "measured": Case(partial(gpt, 4), micros, language_loss, options={"cost": "measured"}),
            "head": Case(
                lambda: seeded(lambda: GPT(4000, 16, 6, 16, 4, tie_embeddings=False)), micros
            ),
            "llama-names": Case(
                partial(hugging_face, "llama"), texts, named_loss, split=("model.layers.2",)
            ),
            "llama-zb_v": Case(partial(hugging_face, "llama"), texts, named_loss, schedule="zb_v"),
            "qwen2": Case(partial(hugging_face, "qwen2"), texts, named_loss),
            "qwen2-tied": Case(
                partial(hugging_face, "qwen2", tie_word_embeddings=True),
                partial(texts, num=4),
                named_loss,
                schedule="interleaved/2",
            ),
            "gpt2": Case(
                partial(hugging_face, "gpt2", tie_word_embeddings=True),
                partial(texts, False),
                named_loss,
            ),
            "gpt2-names": Case(
                partial(hugging_face, "gpt2"),
                partial(texts, False),
                named_loss,
                schedule="zb_v",
                split=("transformer.h.0", "transformer.h.2", "transformer.h.3"),
            ),
            "frozen-zb_v": Case(lambda: frozen(gpt(4), *HALF), micros, schedule="zb_v"),
            "frozen-head": Case(lambda: frozen(gpt(4), "norm", "head", "blocks.3"), micros),
            "frozen-middle": Case(
                lambda: frozen(gpt(4), "blocks.1", "blocks.2"),
                partial(micros, 4),
                schedule="interleaved/2",
            ),
            "frozen-hidden": Case(lambda: frozen(hidden_gpt(), "blocks.0"), micros),
            "frozen-first": Case(lambda: frozen(gpt(4), *HALF), micros, split=("blocks.2",)),
            "frozen-first-zb_h1": Case(
                lambda: frozen(gpt(4), *HALF), micros, schedule="zb_h1", split=("blocks.2",)
            ),
            "frozen-last": Case(
                lambda: frozen(gpt(4), "norm", "head", "blocks.3", "blocks.2"),
                micros,
                split=("blocks.2",),
            ),
        },
    ),
    "pp4": (
        Layout(pp=4),
        {
            "rooted": Case(
                partial(seeded, Rooted), micros, split=("layers.1", "layers.3", "layers.5")
            ),
            "encoder": Case(partial(seeded, EncoderDecoder), pairs, named_loss),
            "picture": Case(partial(seeded, Picture), pictures, split=CUT_PICTURE),
            "twice": Case(partial(seeded, Twice), partial(micros, 6), schedule="zb_h1"),
            "llama": Case(
                partial(hugging_face, "llama"),
                texts,
                named_loss,
                split=("model.layers.1", "model.layers.2", "model.layers.3"),
            ),
        },
    ),
    "pp2-tp2": (
        Layout(pp=2, tp=2),
        {
            "llama": Case(
                partial(hugging_face, "llama"), texts, named_loss, split=("model.layers.2",)
            ),
            "llama-zb_v": Case(
                partial(hugging_face, "llama", tie_word_embeddings=True),
                texts,
                named_loss,
                schedule="zb_v",
            ),
        },
    ),
}
_outcomes: dict[str, dict[str, Any]] = {}


@pytest.fixture
def outcomes(world: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What became of all cases in one world, whose ranks are started once."""
    if world not in _outcomes:
        ready()
        layout, cases = CASES[world]
        _outcomes[world] = survey(
            {name: partial(two_steps, case=case) for name, case in cases.items()},
            layout.world_size,
            tmp_path_factory.mktemp(world),
            layout=layout,
        )
    return _outcomes[world]


@pytest.mark.parametrize(
    ("world", "key"),
    [(world, key) for world, (_, each) in CASES.items() for key in each],
)
def test_equals_one_process(world: str, key: str, outcomes: dict[str, Any]) -> None:
    layout, cases = CASES[world]
    case, ranks = cases[key], shown(outcomes[key])
    plain = plainly(case)
    shards = [rank["shards"] for rank in ranks]
    for number in range(2):
        steps = [rank["steps"][number] for rank in ranks]
        for step in steps:
            assert step["loss"] == pytest.approx(plain["loss"], abs=1e-5)
        assert_gradients([step["grads"] for step in steps], plain["grads"], shards=shards)
    seen: dict[int, list[str]] = {}
    for rank in ranks:
        assert rank["norm"] == pytest.approx(plain["norm"], rel=1e-5)
        assert rank["divergence"] == []
        assert rank["num_parameters"] == plain["num_parameters"]
        for name, buffer in rank["buffers"].items():
            torch.testing.assert_close(buffer, plain["buffers"][name], rtol=1e-5, atol=1e-6)
        seen |= rank["units"]
    name, _, virtual = case.schedule.partition("/")
    placement = placement_of(name, layout.pp, int(virtual or 1))
    assert sorted(seen) == list(range(len(placement)))
    # Stages are the units of the model in order, each once; all ranks agree where they begin.
    units = [unit for stage in range(len(placement)) for unit in seen[stage]]
    assert len(set(units)) == len(units)
    if case.split:
        begins = [seen[stage][0] for stage in range(1, len(placement))]
        assert all(b == s or b.startswith(f"{s}.") for b, s in zip(begins, case.split, strict=True))
    if "picture" in key:
        assert any("running_mean" in name for rank in ranks for name in rank["buffers"])


def test_listed_and_hidden_layers_give_the_same(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    found = _outcomes.get("pp2") or survey(
        {key: partial(two_steps, case=CASES["pp2"][1][key]) for key in ("listed", "hidden")},
        2,
        tmp_path_factory.mktemp("pp2"),
        layout=Layout(pp=2),
    )
    for one, other in zip(shown(found["listed"]), shown(found["hidden"]), strict=True):
        for mine, theirs in zip(one["steps"], other["steps"], strict=True):
            assert mine["loss"] == theirs["loss"]
            assert mine["grads"].keys() == theirs["grads"].keys()
            for name, grad in mine["grads"].items():
                assert torch.equal(grad, theirs["grads"][name]), name


def test_a_large_head_leaves_fewer_layers_to_the_last_stage() -> None:
    model = GPT(4000, 16, 6, 16, 4, tie_embeddings=False)
    even, uneven = (
        choose_cuts(made, 2, None, "counted", micros(1)[0], call_loss).bounds
        for made in (gpt(6), model)
    )
    (_, first), _ = uneven
    assert first > even[0][1], "the first stage has more"
    chain, bounds = chain_of(model, choose_cuts(model, 3, None, "counted", micros(1)[0], call_loss))
    assert chain.units[bounds[-1][0]] == "head"


def test_choosing_stages_changes_nothing() -> None:
    """Dropout, statistics and random state are as before; so is the mode of each module."""
    model = seeded(Picture)
    model.layers[1].eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    example, state = pictures()[0], torch.get_rng_state()
    for how in ("counted", "measured"):
        choose_cuts(model, 2, None, how, example, call_loss)
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert [m.training for m in model.layers] == [True, False, True]
    assert all(param.grad is None for param in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_loss_function_is_left_at_the_model() -> None:
    model = gpt(2)
    batch = micros(1)[0]
    call = inside(lambda model: own_loss(model, batch), model, lambda call: call)
    assert torch.equal(call[0][0], (batch[0] + 1) % VOCAB)
    with pytest.raises(BigtrainError, match="does not call"):
        inside(lambda model: 3, model, lambda call: call)


# -- shapes that change -------------------------------------------------------------------------


@contextmanager
def counted_agreements() -> Iterator[list[str]]:
    """Collect what agreements this rank sends."""
    sent: list[str] = []
    plain = Links.send_object

    def send_object(self: Links, value: Any, to: int, what: str) -> Any:
        if what.startswith("agreement"):
            sent.append(what)
        return plain(self, value, to, what)

    Links.send_object = send_object  # type: ignore[method-assign]
    try:
        yield sent
    finally:
        Links.send_object = plain  # type: ignore[method-assign]


# Of each step, the lengths of its microbatches; and how many shapes are new in it.
LENGTHS = (
    ((8, 8, 8), 1),
    ((8, 8, 8), 0),
    ((8, 5, 8), 1),
    ((5, 8, 3, 7), 2),
    ((7, 5), 0),
    ((3, 3, 8, 5, 7), 0),
    ((1, 2, 1), 2),
    ((8, 8, 8), 0),
)


def changing(mesh: Mesh, make: Callable[[], nn.Module], schedule: str) -> list[dict[str, Any]]:
    """Do a step with each of LENGTHS, and evaluations between."""
    split = {2: ["blocks.2"], 4: ["blocks.0", "blocks.2", "blocks.3"]}
    num = len(placement_of(schedule, mesh.pp.degree))
    pipeline = build_pipeline(
        make(), mesh, schedule=schedule, split=split[num], loss_of=call_loss, example=micros(1)[0]
    )
    found = []
    with counted_agreements() as sent:
        for lengths, _ in LENGTHS:
            sent.clear()
            batches = [micros(1, 2, length)[0] for length in lengths]
            loss = float(pipeline.step(batches, call_loss))
            pipeline.path.finish()
            found.append({"sent": len(sent), "loss": loss, "grads": named_gradients(pipeline.path)})
        for length, new in ((8, 1), (8, 0), (4, 1)):  # without gradients it is another agreement
            sent.clear()
            pipeline.evaluate([micros(1, 2, length)[0]] * 2, numbered_loss)
            found.append({"sent": len(sent), "new": new})
    return found


CHANGING = {
    f"{name} {schedule}": partial(changing, make=make, schedule=schedule)
    for name, make in (("listed", partial(llama, 4)), ("hidden", hidden_gpt))
    for schedule in ("1f1b", "zb_v", "gpipe")
}


def test_shapes_change_between_microbatches_and_steps(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("changing")
    results = survey(CHANGING, 2, folder, layout=Layout(pp=2), delay_seed=3)
    for name, outcome in results.items():
        ranks = shown(outcome)
        make = partial(llama, 4) if name.startswith("listed") else hidden_gpt
        for step, (lengths, new) in enumerate(LENGTHS):
            plain = plain_gradients(
                make(), [micros(1, 2, length)[0] for length in lengths], call_loss
            )
            steps = [rank[step] for rank in ranks]
            for rank in steps:
                assert rank["loss"] == pytest.approx(plain["loss"], abs=1e-5)
            assert_gradients([rank["grads"] for rank in steps], plain["grads"])
            # The V's middle is on one rank; its other two cuts send one agreement a new shape each.
            senders = [new, new] if "zb_v" in name else [new, 0]
            assert [rank["sent"] for rank in steps] == senders, (name, lengths)
        for rank, sends in zip(ranks, (True, "zb_v" in name), strict=True):
            for each in rank[len(LENGTHS) :]:
                assert each["sent"] == (each["new"] if sends else 0)


# -- what ranks must agree on, and what is around the model -------------------------------------


def clocks_disagree(mesh: Mesh) -> tuple[list[str], float]:
    """Measure costs by clocks that are never alike; the model is looked into by what they say."""
    draw, now = random.Random(mesh.rank), 0.0

    def clock() -> float:
        nonlocal now
        now += draw.choice((0.001, 0.1, 3.0))
        return now

    cost.time = SimpleNamespace(perf_counter=clock)  # type: ignore[assignment]
    pipeline = build_pipeline(
        hidden_gpt(), mesh, cost="measured", example=micros(1)[0], loss_of=call_loss
    )
    loss = float(pipeline.step(micros(), call_loss))
    pipeline.path.finish()
    blocks = list(pipeline.path.blocks("", [s.main_params for s in pipeline.path.segments()]))
    assert find_divergence(blocks, mesh.world) == []
    return [unit for stage in pipeline.stages for unit in stage.units], loss


def test_measured_costs_give_the_same_stages_on_all_ranks(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    ranks = run_ranks(
        clocks_disagree, 4, tmp_path_factory.mktemp("clocks"), layout=Layout(pp=4), timeout=30
    )
    units = [unit for mine, _ in ranks for unit in mine]
    assert len(set(units)) == len(units)
    assert units[0].startswith("token_embedding")
    wanted = plain_gradients(hidden_gpt(), micros(), call_loss)["loss"]
    for _, loss in ranks:
        assert loss == pytest.approx(wanted, abs=1e-5)


class Watched(nn.Linear):
    """A layer that notes whether autocast was on."""

    seen: ClassVar[list[bool]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(torch.is_autocast_enabled("cpu"))
        return super().forward(x)


def autocast_loss(model: Any, batch: Any) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        loss: torch.Tensor = model(batch).square().mean()
    return loss.float()


def under_autocast(mesh: Mesh) -> list[bool]:
    model = nn.Sequential(*(Watched(4, 4) for _ in range(4)))
    given = torch.ones(2, 4)
    pipeline = build_pipeline(
        model, mesh, schedule="zb_h1", split=["2"], example=given, loss_of=autocast_loss
    )
    Watched.seen.clear()  # of the example
    pipeline.step([given, given], autocast_loss)
    pipeline.path.finish()
    find_divergence([], mesh.world)  # nobody leaves before the others
    return Watched.seen


def test_autocast_of_the_loss_function_is_for_all_stages(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    ranks = run_ranks(under_autocast, 2, tmp_path_factory.mktemp("autocast"), layout=Layout(pp=2))
    assert all(all(seen) for seen in ranks)
