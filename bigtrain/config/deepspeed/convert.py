"""DeepSpeed's keys in ours: `bigtrain convert`.

Each `_...` function takes one of DeepSpeed's sections: it sets keys of ours, says what is not the
same, and everything that no function took is looked up in notes.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from bigtrain.config.deepspeed.notes import has_lines, note_on
from bigtrain.config.deepspeed.read import Path_, read_json
from bigtrain.config.schema import VARIANTS, TrainSection, ZeroSection
from bigtrain.errors import ConfigError, Problem

AUTO = "auto"  # what Hugging Face's Trainer fills in


@dataclass(frozen=True)
class Remark:
    """A key that is not carried over as it is: where it stands, its value, what it means here."""

    where: str
    key: str
    value: Any
    meaning: str


@dataclass
class Conversion:
    """What a DeepSpeed config is here: keys by section, a comment for some, and remarks."""

    source: str
    values: dict[str, Any]
    places: dict[Path_, str]
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    comments: dict[tuple[str, str], str] = field(default_factory=dict)
    remarks: list[Remark] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    taken: set[str] = field(default_factory=set)

    def take(self, dotted: str, default: Any = None) -> Any:
        """Return the value of a key of DeepSpeed's and note that it was looked at; auto: None."""
        value: Any = self.values
        for name in dotted.split("."):
            if not isinstance(value, dict) or name not in value:
                return default
            value = value[name]
        self.taken.add(dotted)
        if value == AUTO:
            self.remark(dotted, "filled in by Hugging Face's Trainer; here it has to be written")
            return default
        return value

    def number(self, dotted: str, default: Any = None, *, whole: bool = False) -> Any:
        """Return a number, or say that it is none."""
        value = self.take(dotted, default)
        good = (int,) if whole else (int, float)
        if value is not None and (isinstance(value, bool) or not isinstance(value, good)):
            kind = "a whole number" if whole else "a number"
            self.wrong(dotted, f"{dotted} = {shown(value)} is not {kind}", "correct the value")
            return default
        return value

    def count(self, dotted: str) -> int | None:
        """Return a positive whole number, or say that it is none."""
        value = self.number(dotted, whole=True)
        if value is not None and value < 1:
            self.wrong(dotted, f"{dotted} = {value} is not positive", "correct the value")
            return None
        return int(value) if value is not None else None

    def set(self, section: str, key: str, value: Any, comment: str = "") -> None:
        """Set a key of ours."""
        self.sections.setdefault(section, {})[key] = value
        if comment:
            self.comments[section, key] = comment

    def remark(self, dotted: str, meaning: str) -> None:
        """Say what a key of DeepSpeed's means here."""
        self.taken.add(dotted)
        value: Any = self.values
        for name in dotted.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        self.remarks.append(Remark(self._where(dotted), dotted, value, meaning))

    def leave_out(self, section: str, key: str, problem: Problem) -> bool:
        """Remove a key of ours that cannot be, if it is there, and say so."""
        value = self.sections.get(section, {}).pop(key, None)
        if value is not None:
            meaning = f"left out: {problem.what}"
            self.remarks.append(Remark(self.source, f"{section}.{key}", value, meaning))
        return value is not None

    def wrong(self, dotted: str, what: str, mend: str, why: str = "") -> None:
        """Report what cannot be meant."""
        self.problems.append(Problem(what, why, mend, self._where(dotted)))

    def _where(self, dotted: str) -> str:
        return self.places.get(tuple(dotted.split(".")), self.source)


def convert(path: Path, ranks: int | None = None) -> Conversion:
    """Return what the DeepSpeed config at `path` is here, for `ranks` data-parallel ranks.

    Raises:
        ConfigError: with everything that is wrong in the file.
    """
    values, places = read_json(path)
    into = Conversion(str(path), values, places)
    for section in _SECTIONS:
        if section in values and not isinstance(values[section], dict):
            into.wrong(section, f"{section} is not an object", "write its keys in {...}")
            values[section] = {}
    _batch(into, ranks)
    _optimizer(into)
    _scheduler(into)
    _precision(into)
    _clipping(into)
    _zero(into)
    _axes(into)
    _log(into)
    _rest(into)
    if into.problems:
        raise ConfigError(into.source, sorted(into.problems, key=lambda p: line_of(p.where)))
    return into


_SECTIONS = ("optimizer", "scheduler", "fp16", "bf16", "zero_optimization", "pipeline")


def _batch(into: Conversion, ranks: int | None) -> None:
    total = into.count("train_batch_size")
    micro = into.count("train_micro_batch_size_per_gpu")
    steps = into.count("gradient_accumulation_steps")
    if total and micro and steps:
        exact, rest = divmod(total, micro * steps)
        if rest or (ranks and exact != ranks):
            on = f"{ranks} ranks" if ranks else "any number of ranks"
            into.wrong(
                "train_batch_size",
                f"train_batch_size = {total} is not train_micro_batch_size_per_gpu = {micro} "
                f"times gradient_accumulation_steps = {steps} on {on}",
                "correct one of the three" + (f", or give --ranks {exact}" if not rest else ""),
            )
            return
        ranks = exact
    known = ranks or 1
    if total and (total % known or (micro and (total // known) % micro)):
        into.wrong(
            "train_batch_size",
            f"train_batch_size = {total} cannot be shared by {known} ranks"
            + (f" in microbatches of {micro}" if micro else ""),
            "give another --ranks, or correct the value",
        )
        return
    if total and steps and not micro:
        micro, rest = divmod(total // known, steps)
        if rest:
            into.wrong(
                "gradient_accumulation_steps",
                f"gradient_accumulation_steps = {steps} does not divide {total} / {known} ranks",
                "give another --ranks, or correct the value",
            )
            return
    if not total and (micro or steps):
        total = (micro or 1) * (steps or 1) * known
    if total:
        into.set("train", "global_batch", total, "train_batch_size: samples per step, all ranks")
    if micro:
        into.set("train", "microbatch", micro, "train_micro_batch_size_per_gpu")
    why = "data-parallel ranks: train_batch_size / (micro batch * accumulation steps)"
    guess = "data-parallel ranks: not said in the file; train.global_batch is for this many"
    into.set("parallel", "dp", known, why if ranks else guess)


# DeepSpeed's optimizers and schedules, in lower case, and what they are called here.
_OPTIMIZERS = {
    "adam": "adamw",
    "adamw": "adamw",
    "sgd": "sgd",
    "lion": "lion",
    "lamb": "lamb",
    "adagrad": "adagrad",
    "muon": "muon",
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0},
    "sgd": {"lr": 1e-3, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0},
}


def _optimizer(into: Conversion) -> None:
    name = into.take("optimizer.type")
    if "optimizer" not in into.values or name is None:
        return
    if not isinstance(name, str):
        into.wrong("optimizer.type", f"optimizer.type = {shown(name)} is not a name", "correct it")
        return
    kind = _OPTIMIZERS.get(name.lower(), "")
    if kind not in VARIANTS["optimizer"]:
        legal = ", ".join(VARIANTS["optimizer"])
        into.remark("optimizer.type", f"no such optimizer here: adamw is written; there is {legal}")
        kind = "adamw"
    params = into.values["optimizer"].get("params") or {}
    if not isinstance(params, dict):
        into.wrong("optimizer.params", "optimizer.params is not an object", "write {...}")
        return
    coupled = params.get("adam_w_mode") is False or params.get("torch_adam")
    if name.lower() == "adam" and coupled and params.get("weight_decay"):
        into.remark("optimizer.params.weight_decay", "decoupled here (AdamW), L2 there")
    into.set("optimizer", "kind", kind, f"optimizer.type {name}")
    legal_keys = VARIANTS["optimizer"][kind].model_fields
    into.taken.add("optimizer.params")
    values = {**_DEFAULTS.get(kind, {})}
    for key in params:
        dotted = f"optimizer.params.{key}"
        if key not in legal_keys:
            if dotted not in into.taken:
                into.remark(dotted, f"optimizer.kind = {kind} has no such key")
            continue
        value = into.take(dotted)
        if isinstance(value, str):
            value = _as_number(value)
        if value is not None:
            values[key] = value
    for key, value in values.items():
        if isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if isinstance(value, list):
            value = [float(v) if isinstance(v, int) else v for v in value]
        into.set("optimizer", key, value)
    if values.get("weight_decay"):
        into.comments["optimizer", "weight_decay"] = "of matrices and embeddings only"


def _as_number(text: str) -> Any:
    """Return "3e-5" as a number: some write it in quotes."""
    try:
        return float(text)
    except ValueError:
        return text


def _scheduler(into: Conversion) -> None:
    name = into.take("scheduler.type")
    if name is None:
        if "scheduler" not in into.values:
            into.set("schedule", "kind", "constant", "no scheduler in the file")
        return
    kinds = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
    if name not in kinds:
        into.remark("scheduler.type", "no such schedule here: constant is written")
        into.set("schedule", "kind", "constant")
        return
    into.taken.add("scheduler.params")
    into.set("schedule", "kind", kinds[name], f"scheduler.type {name}")
    warmup = into.number("scheduler.params.warmup_num_steps", 1000, whole=True)
    into.set("schedule", "warmup_steps", max(0, warmup))
    peak = into.number("scheduler.params.warmup_max_lr")
    if peak is not None and peak > 0:
        comment = "scheduler.params.warmup_max_lr, which overrides the optimizer's lr"
        into.set("optimizer", "lr", float(peak), comment)
    low = into.number("scheduler.params.warmup_min_lr", 0.0)
    if low:
        into.remark("scheduler.params.warmup_min_lr", "warm-up begins at 0")
    if name != "WarmupCosineLR" and into.take("scheduler.params.warmup_type", "log") == "log":
        key = "scheduler.params.warmup_type"
        given = key.rpartition(".")[2] in (into.values["scheduler"].get("params") or {})
        into.remark(
            key if given else "scheduler.type",
            "warm-up is linear here; DeepSpeed's default is logarithmic, which rises faster",
        )
    steps = into.count("scheduler.params.total_num_steps") if name != "WarmupLR" else None
    if steps:
        into.set("train", "steps", steps, "scheduler.params.total_num_steps")
    if name == "WarmupDecayLR":
        into.set("schedule", "min_lr_ratio", 0.0)
    if name == "WarmupCosineLR":
        ratio = into.number("scheduler.params.cos_min_ratio", 0.0001)
        into.set("schedule", "min_lr_ratio", float(min(max(ratio, 0.0), 1.0)))
        if into.number("scheduler.params.warmup_min_ratio"):
            into.remark("scheduler.params.warmup_min_ratio", "warm-up begins at 0")


def _precision(into: Conversion) -> None:
    legal = get_args(TrainSection.model_fields["precision"].annotation)
    fp16, bf16 = into.take("fp16.enabled", False), into.take("bf16.enabled", False)
    for key in ("bfloat16.enabled",):
        bf16 = into.take(key, False) or bf16
    if fp16 is True and bf16 is True:
        into.wrong("fp16.enabled", "fp16 and bf16 are both enabled", "enable one of them")
    if fp16 and "fp16" not in legal:
        into.remark("fp16.enabled", "no fp16 here: bf16 is written, which needs no loss scaling")
    precision = "bf16" if bf16 else "fp32"
    if fp16:
        precision = "fp16" if "fp16" in legal else "bf16"
    into.set("train", "precision", precision)


def _clipping(into: Conversion) -> None:
    given = "gradient_clipping" in into.values
    most = into.number("gradient_clipping", 1.0)
    comment = "gradient_clipping" if given else "DeepSpeed's default since 0.19"
    into.set("train", "max_grad_norm", float(most) if most else None, comment)


def _zero(into: Conversion) -> None:
    stage = into.take("zero_optimization.stage", 0)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        what = f"zero_optimization.stage = {shown(stage)} is not one of 0, 1, 2, 3"
        into.wrong("zero_optimization.stage", what, "correct the value")
        return
    if stage or "zero_optimization" in into.values:
        into.set("zero", "stage", stage, "zero_optimization.stage")
    bucket = into.number("zero_optimization.reduce_bucket_size")
    if bucket is not None and bucket > 0:
        size = round(float(bucket) * 4 / 2**20, 3)
        if size > 0:
            into.set("parallel", "bucket_mb", size, "reduce_bucket_size, as MiB of fp32")
    legal = get_args(ZeroSection.model_fields["offload"].annotation)
    device = into.take("zero_optimization.offload_optimizer.device", "none")
    here = {"none": "none", "cpu": "cpu", "nvme": "nvme" if "nvme" in legal else "file"}.get(device)
    if here is None:
        what = f"zero_optimization.offload_optimizer.device = {shown(device)} is not a device"
        mend = "give none, cpu or nvme"
        into.wrong("zero_optimization.offload_optimizer.device", what, mend)
        return
    if here != "none":
        into.set("zero", "offload", here, "zero_optimization.offload_optimizer.device")
        folder = into.take("zero_optimization.offload_optimizer.nvme_path")
        if isinstance(folder, str) and here != "cpu":
            into.set("zero", "offload_dir", folder)


def _axes(into: Conversion) -> None:
    tp = into.count("tensor_parallel.autotp_size")
    if tp and tp > 1:
        into.set("parallel", "tp", tp, "tensor_parallel.autotp_size; must divide the heads")
    if isinstance(into.values.get("pipeline"), dict):
        stages = into.take("pipeline.stages")
        if isinstance(stages, int) and stages > 1:
            into.set("parallel", "pp", stages, "pipeline.stages")


def _log(into: Conversion) -> None:
    every = into.take("steps_per_print")
    if isinstance(every, int) and not isinstance(every, bool) and 0 < every <= 10**6:
        into.set("log", "every", every, "steps_per_print")
    elif every is not None:
        into.remark("steps_per_print", "log.every; left at its default")


def _rest(into: Conversion) -> None:
    """Say what all other keys mean here; of a section that is off or means one thing, one line."""

    def visit(values: dict[str, Any], prefix: str) -> None:
        for key, value in values.items():
            dotted = f"{prefix}{key}"
            inside = f"{dotted}."
            looked_into = dotted in into.taken or any(k.startswith(inside) for k in into.taken)
            off = isinstance(value, dict) and value.get("enabled") is False
            if isinstance(value, dict) and not off and (looked_into or has_lines(dotted)):
                visit(value, inside)
            elif not looked_into:
                known = note_on(dotted) or note_on(f"{inside}*")
                meaning = known or "not a key of DeepSpeed's that bigtrain knows"
                into.remark(dotted, "it is off there" if off else meaning)

    visit(into.values, "")


def line_of(where: str) -> tuple[int, int]:
    """Return line and column of a place, to sort by."""
    numbers = where.split(":")[-2:]
    if len(numbers) < 2 or not all(number.isdigit() for number in numbers):
        return 0, 0
    return int(numbers[0]), int(numbers[1])


def shown(value: Any) -> str:
    """Return a value as JSON has it, shortened."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
