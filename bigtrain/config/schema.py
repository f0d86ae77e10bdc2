"""The config of a run: one pydantic model per section, every key documented, unknown keys refused.

The descriptions end up in the JSON Schema that editors use (`bigtrain schema`), so they are
written for the person who edits a YAML file.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
)

from bigtrain.config.launching import LaunchSection
from bigtrain.config.optimizers import (
    AdagradOptimizer,
    AdamwOptimizer,
    LambOptimizer,
    LionOptimizer,
    MuonOptimizer,
    SgdOptimizer,
)
from bigtrain.config.section import CountOrAuto, PositiveInt, ScaleOrDynamic, Section
from bigtrain.config.serving import ServerSection


class RunSection(Section):
    dir: Annotated[str, Field(min_length=1)] = "runs/default"
    """Folder of the run: effective config, logs, metrics, checkpoints."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1234
    """Every random number of the run is a function of this."""
    deterministic: bool = False
    """Refuse operations that are not reproducible bit for bit (slower on GPUs)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where ranks compute; auto takes CUDA where there is one."""
    kernels: Literal["auto", "on", "off"] = "auto"
    """Fused kernels: auto takes them where they win, on wherever there is one, off never."""


class FactoryCall(Section):
    """A function of the user's: `package.module:function`, called with `args` as keywords."""

    factory: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
    """`package.module:function` that builds the object."""
    args: dict[str, Any] = {}
    """Keyword arguments of that function."""


class GptModel(Section):
    kind: Literal["gpt"] = "gpt"
    """GPT: learned positions, LayerNorm, GELU."""
    vocab_size: PositiveInt = 256
    """Rows of the token embedding; 256 for bytes."""
    max_seq_len: PositiveInt = 256
    """Longest sequence the positions cover, in tokens."""
    num_layers: PositiveInt = 4
    """Transformer blocks."""
    hidden_size: PositiveInt = 128
    """Width of the residual stream."""
    num_heads: PositiveInt = 4
    """Attention heads; must divide hidden_size."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the embedding and on each residual branch."""
    tie_embeddings: bool = True
    """Use the token embedding as the output projection."""


class LlamaModel(Section):
    kind: Literal["llama"]
    """Llama: rotary positions, RMSNorm, SwiGLU, grouped-query attention."""
    vocab_size: PositiveInt = 256
    """Rows of the token embedding; 256 for bytes."""
    max_seq_len: PositiveInt = 256
    """Longest sequence the rotary table covers, in tokens."""
    num_layers: PositiveInt = 4
    """Transformer blocks."""
    hidden_size: PositiveInt = 128
    """Width of the residual stream."""
    num_heads: PositiveInt = 4
    """Query heads; must divide hidden_size."""
    num_kv_heads: PositiveInt | None = None
    """Key and value heads; must divide num_heads. Empty: as many as num_heads."""
    mlp_size: PositiveInt | None = None
    """Width inside the MLP. Empty: 8/3 of hidden_size, rounded up to a multiple of 32."""
    rope_theta: Annotated[float, Field(gt=0)] = 10000.0
    """Base of the rotary frequencies."""
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    """Added to the mean square in RMSNorm."""
    tie_embeddings: bool = False
    """Use the token embedding as the output projection."""


class FactoryModel(FactoryCall):
    """A torch.nn.Module of the user's.

    It is called as `model(**batch)` and returns the mean loss of the batch, or (mean loss, count)
    where count is the number of items that the mean is over.
    """

    loss: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")] | None = None
    """`package.module:function`, called as `loss(model, batch)` in place of `model(**batch)`."""


class StdlibData(Section):
    kind: Literal["stdlib"] = "stdlib"
    """The source files of Python's standard library, as bytes: real text on every machine."""
    seq_len: PositiveInt = 128
    """Tokens per sample."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the files that is held out for evaluation."""
    cache_dir: str | None = None
    """Where the packed bytes are kept. Empty: the user's cache folder."""


class TextData(Section):
    kind: Literal["text"]
    """Text files of the user's, as bytes."""
    files: Annotated[list[str], Field(min_length=1)]
    """Paths or globs (`**` allowed), relative to the folder the command runs in."""
    seq_len: PositiveInt = 128
    """Tokens per sample."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the files that is held out; of one single file, its last part."""
    cache_dir: str | None = None
    """Where the packed bytes are kept. Empty: the user's cache folder."""


class TokenData(Section):
    kind: Literal["tokens"]
    """Token files: one-dimensional .npy arrays of unsigned integers (numpy.save)."""
    train: str
    """Path of the training tokens."""
    validation: str
    """Path of the held-out tokens."""
    seq_len: PositiveInt = 128
    """Tokens per sample."""


class FactoryData(FactoryCall):
    """Datasets of the user's: the function is called with split="train" and split="validation".

    Each is a map-style dataset (`__len__`, `__getitem__` giving a dict of tensors).
    """

    num_workers: Annotated[int, Field(ge=0)] = 0
    """Loader processes per rank; 0 loads in the rank itself."""


StyleName = Literal[
    "column",
    "column_gather",
    "row",
    "row_split",
    "vocab",
    "gather",
    "replicate",
    "sequence",
    "whole",
    "scatter_sequence",
    "gather_sequence",
]


class ParallelSection(Section):
    dp: CountOrAuto = "auto"
    """Data-parallel degree; auto takes what the other degrees leave of the world."""
    tp: PositiveInt = 1
    """Tensor-parallel degree: how many ranks share each layer. Must divide the heads."""
    sequence_parallel: bool = False
    """Also split norms, dropout and residuals over tensor-parallel ranks, along the sequence."""
    tensor_plan: dict[str, StyleName] | None = None
    """Module name patterns and how each is split, for a model that brings no plan of its own."""
    tp_chunks: PositiveInt = 1
    """Chunks of a row-parallel product: one is on the wire while the next is computed."""
    check_replicas_every: Annotated[int, Field(ge=0)] = 0
    """Every this many steps, compare what several ranks hold, bit for bit; 0: never."""
    cp: PositiveInt = 1
    """Context-parallel degree."""
    pp: PositiveInt = 1
    """Pipeline-parallel degree: how many ranks have the layers, one part after the other."""
    bucket_mb: Annotated[float, Field(gt=0)] = 25.0
    """Size of a gradient bucket in MiB: what one all-reduce carries."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 300.0
    """A collective that waits longer than this for another rank fails."""


class ZeroSection(Section):
    stage: Literal[0, 1, 2, 3] = 0
    """What data-parallel ranks share out: 1 optimizer state, 2 gradients too, 3 parameters too."""
    shard_degree: PositiveInt | None = None
    """How many neighbouring replicas share (those of a node, say); others copy. Empty: all."""
    reshard_after_forward: bool = True
    """Stage 3: give parameters up after forward, and gather them again for backward."""
    prefetch: Annotated[int, Field(ge=0)] = 1
    """Stage 3: buckets that are gathered before they are needed."""
    order: Literal["learned", "agreed"] = "learned"
    """Stage 3: gather in the order of earlier steps, or ask all ranks each time."""
    persistent_numel: Annotated[int, Field(ge=0)] = 0
    """Stage 3: parameters of fewer elements than this stay whole on every rank."""
    reduce_dtype: Literal["fp32", "bf16", "int8"] = "fp32"
    """Dtype of gradients on the wire; their sum is taken in fp32."""
    in_flight: PositiveInt = 2
    """Buckets of gradients that may be on the wire at once."""
    offload: Literal["none", "cpu", "file"] = "none"
    """Where main parameters and optimizer state live: on the device, in CPU memory, in files."""
    offload_dir: Annotated[str, Field(min_length=1)] | None = None
    """Folder of those files, on a local disk. Empty: the folder for temporary files."""


CompressionKind = Literal[
    "none",
    "safe",
    "default",
    "max",
    "bf16",
    "fp16",
    "int8",
    "topk",
    "powersgd",
    "onebit",
    "zero_one",
]


class CompressionSection(Section):
    kind: CompressionKind = "none"
    """How gradients and updates travel. safe: gradients in 4 bits to the rank that updates them,
    updates in 8 bits back. default: momentum in 1 bit, updates in 4. max: both in 1 bit. What is
    lost is sent with the next. default and max need AdamW or LAMB, and begin exactly. bf16, fp16,
    int8: both in that. topk: the largest elements of gradients. powersgd: gradients of low rank.
    onebit, zero_one: 1-bit Adam or LAMB, and 0/1 Adam, as published, without ZeRO."""
    node_degree: PositiveInt = 1
    """How many neighbouring data-parallel ranks are on one node and add up gradients exactly among
    themselves, so that compression is between nodes; divides the data-parallel degree."""
    block: Annotated[int, Field(ge=64, multiple_of=64)] | None = None
    """Elements of a gradient that share one scale. Empty: 256 for safe and int8, else 1024."""
    least_numel: Annotated[int, Field(ge=0)] = 65536
    """Parameters of fewer elements than this travel exactly, as all of one dimension do."""
    resync_every: Annotated[int, Field(ge=0)] = 500
    """Steps after which parameters travel exactly once; 0: only when a run begins or saves."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """default, max, onebit: steps that go exactly at least. They end once the variance has
    settled."""
    refresh_every: Annotated[int, Field(ge=0)] = 16
    """default, max: steps after which the variance takes up an exact gradient; the distance doubles
    after each 16 times. 0: never."""
    when: Literal["pays", "always"] = "pays"
    """default, max: compress only where the warm-up has shown that it saves time, or always."""
    density: Annotated[float, Field(gt=0, le=1)] = 0.01
    """topk: share of the elements of a gradient that is sent, of those that are largest."""
    rank: PositiveInt = 4
    """powersgd: columns of the two thin matrices whose product a gradient is sent as."""
    local_steps: PositiveInt = 16
    """zero_one: steps from one exchange to the next at most, in which ranks go their own ways; 1:
    none. While the rate rises, and the variance is young, they are fewer."""
    transport: Literal["group", "mpi"] = "group"
    """What carries messages: the process group, or MPI, where that alone reaches the fabric."""


class PipelineSection(Section):
    schedule: Annotated[str, Field(min_length=1)] = "1f1b"
    """gpipe, 1f1b, interleaved, zb_h1, zb_v, dualpipe_v, or the path of a table (.csv)."""
    virtual_stages: PositiveInt = 1
    """Stages per rank, for schedules that leave it open (interleaved: 2 or more)."""
    split: list[str] | None = None
    """Units at which the stages after the first begin, like blocks.2. Empty: equal costs."""
    cost: Literal["counted", "measured"] = "counted"
    """What makes stages equal: operations, counted from shapes, or time on the first rank."""


class EngineSection(Section):
    kind: Literal["native", "deepspeed"] = "native"
    """Who does data parallelism and the update: bigtrain, or DeepSpeed's engine."""
    config: dict[str, Any] = {}
    """More keys for DeepSpeed's own configuration, as in its JSON file (DeepSpeed only)."""


class TrainSection(Section):
    steps: PositiveInt = 100
    """Optimizer updates in the whole run."""
    global_batch: PositiveInt = 16
    """Samples per step over all ranks."""
    microbatch: PositiveInt | None = None
    """Samples per forward on one rank. Empty: all of the rank's share at once."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Dtype of parameters and activations; bf16 and fp16 keep fp32 main parameters, gradients."""
    loss_scale: ScaleOrDynamic | None = None
    """What fp16 multiplies the loss by: dynamic, or a fixed number. Empty: dynamic with fp16."""
    loss_scale_window: PositiveInt = 1000
    """Steps in a row without an overflow after which the dynamic loss scale doubles."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Global norm that gradients are clipped to. Empty: no clipping."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What a NaN or infinite loss or gradient does: end the run, or skip that update and say so."""


class ScheduleSection(Section):
    kind: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """Shape of the learning rate after warm-up; wsd is warm-up, stable, decay."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the rate rises linearly from zero to its peak."""
    decay_steps: PositiveInt | None = None
    """Length of the wsd decay at the end of the run. Empty: a tenth of train.steps."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Where the rate ends, as a share of its peak."""


class EvalSection(Section):
    every: Annotated[int, Field(ge=0)] = 0
    """Evaluate every this many steps, and after the last one; 0 only after the last one."""
    samples: Annotated[int, Field(ge=0)] = 128
    """Held-out samples of an evaluation (always the same ones); 0: no evaluation."""
    generate: Annotated[int, Field(ge=0)] = 0
    """Tokens to generate at the end of the run; 0: none. Byte-level gpt and llama models."""


class CheckpointSection(Section):
    every: Annotated[int, Field(ge=0)] = 0
    """Save every this many steps, and after the last one; 0 only after the last one."""
    keep_last: PositiveInt = 2
    """Newest checkpoints that are kept."""
    keep_every: PositiveInt | None = None
    """Also keep every checkpoint whose step is a multiple of this."""


class LogSection(Section):
    every: PositiveInt = 10
    """Steps between two lines on the screen; metrics.jsonl has every step."""
    sample_ids: bool = False
    """Record the samples of every step in samples/rank-N.jsonl, N the first rank of a replica. With
    servers each worker has files of its own, samples/worker-W-rank-N.jsonl."""


def _kind_or_factory(default: str, factory: bool = True) -> Discriminator:
    def choose(value: Any) -> str:
        if isinstance(value, dict):
            kind = str(value.get("kind", default))
            if factory and "factory" in value:
                return "factory"
            return "(none of them)" if kind == "factory" else kind
        return "factory" if isinstance(value, FactoryCall) else str(getattr(value, "kind", default))

    return Discriminator(choose)


Model = Annotated[
    Annotated[GptModel, Tag("gpt")]
    | Annotated[LlamaModel, Tag("llama")]
    | Annotated[FactoryModel, Tag("factory")],
    _kind_or_factory("gpt"),
]
Data = Annotated[
    Annotated[StdlibData, Tag("stdlib")]
    | Annotated[TextData, Tag("text")]
    | Annotated[TokenData, Tag("tokens")]
    | Annotated[FactoryData, Tag("factory")],
    _kind_or_factory("stdlib"),
]
Optimizer = Annotated[
    Annotated[AdamwOptimizer, Tag("adamw")]
    | Annotated[SgdOptimizer, Tag("sgd")]
    | Annotated[LambOptimizer, Tag("lamb")]
    | Annotated[AdagradOptimizer, Tag("adagrad")]
    | Annotated[LionOptimizer, Tag("lion")]
    | Annotated[MuonOptimizer, Tag("muon")],
    _kind_or_factory("adamw", factory=False),
]

# The alternatives of each section that has several, by the name that `kind` takes.
VARIANTS: dict[str, dict[str, type[Section]]] = {
    "model": {"gpt": GptModel, "llama": LlamaModel, "factory": FactoryModel},
    "data": {
        "stdlib": StdlibData,
        "text": TextData,
        "tokens": TokenData,
        "factory": FactoryData,
    },
    "optimizer": {
        "adamw": AdamwOptimizer,
        "sgd": SgdOptimizer,
        "lamb": LambOptimizer,
        "adagrad": AdagradOptimizer,
        "lion": LionOptimizer,
        "muon": MuonOptimizer,
    },
}


def _engine_by_name(value: Any) -> Any:
    """Let `engine: deepspeed` be short for `engine: {kind: deepspeed}`."""
    return {"kind": value} if isinstance(value, str) else value


Engine = Annotated[
    EngineSection,
    BeforeValidator(_engine_by_name),
    WithJsonSchema(
        {"anyOf": [{"enum": ["native", "deepspeed"]}, EngineSection.model_json_schema()]}
    ),
]


class Config(Section):
    """A whole run."""

    run: RunSection = RunSection()
    """Where the run lives and what it starts from."""
    model: Model = GptModel()
    """What is trained."""
    data: Data = StdlibData()
    """What it is trained on."""
    parallel: ParallelSection = ParallelSection()
    """How it is spread over ranks."""
    zero: ZeroSection = ZeroSection()
    """What data-parallel ranks share out instead of copying it."""
    compression: CompressionSection = CompressionSection()
    """In how many bits gradients and updates travel."""
    server: ServerSection = ServerSection()
    """Parameter servers, for workers that fail."""
    pipeline: PipelineSection = PipelineSection()
    """How layers are cut into stages, and in what order these work."""
    engine: Engine = EngineSection()
    """Who trains: bigtrain itself, or DeepSpeed."""
    train: TrainSection = TrainSection()
    """The loop."""
    optimizer: Optimizer = AdamwOptimizer()
    """How parameters move."""
    schedule: ScheduleSection = ScheduleSection()
    """The learning rate over the run."""
    eval: EvalSection = EvalSection()
    """Held-out loss and generated text."""
    checkpoint: CheckpointSection = CheckpointSection()
    """When to save and what to keep."""
    log: LogSection = LogSection()
    """What is shown and recorded."""
    launch: LaunchSection = LaunchSection()
    """How processes are started."""


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a config file, for editors."""
    schema = Config.model_json_schema()
    text = "A config that this one is laid on top of; relative to the folder of this file."
    schema["properties"] = {
        "extends": {"type": "string", "description": text},
        **schema["properties"],
    }
    return schema
