"""From a data section of the config to datasets."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import Dataset

from bigtrain.comm.collectives import all_gather_object, together
from bigtrain.comm.mesh import Mesh
from bigtrain.config.schema import FactoryData, StdlibData, TextData, TokenData
from bigtrain.data.corpus import packed, stdlib_files, text_files
from bigtrain.data.tokens import WRITE_IT, TokenDataset, fingerprint, ngram_entropies, open_tokens
from bigtrain.errors import DataError
from bigtrain.factory import call_factory


@dataclass(frozen=True)
class DataSource:
    """What a run is trained and judged on.

    items_per_sample: what the mean loss of a sample is over (its tokens; 1 for a user's dataset
    without an `items_per_sample` of its own). unit: their name. fingerprint: equal for equal data.
    """

    train: Dataset
    validation: Dataset
    items_per_sample: int
    unit: str
    fingerprint: str

    def entropies(self) -> tuple[float, float] | None:
        """Return unigram and bigram entropy of the held-out text in nats; None if it is no text."""
        if isinstance(self.validation, TokenDataset):
            return ngram_entropies(self.validation.tokens)
        return None


def prepare_data(config: StdlibData | TextData | TokenData | FactoryData) -> list[str]:
    """Return the token files (train, validation), packing text files first; [] for a factory.

    One rank of a node does this; the others are told the result.

    Raises:
        DataError: the files are missing or cannot be packed.
    """
    if isinstance(config, FactoryData):
        return []
    if isinstance(config, TokenData):
        return [config.train, config.validation]
    files = stdlib_files() if isinstance(config, StdlibData) else text_files(config.files)
    return [str(p) for p in packed(files, config.validation_fraction, config.cache_dir)]


def open_data(
    config: StdlibData | TextData | TokenData | FactoryData,
    files: list[str],
    vocab_size: int | None,
) -> DataSource:
    """Return the datasets of `config`; `files` is what `prepare_data` returned.

    Raises:
        DataError: a file is missing, truncated or foreign, or a factory gives no dataset.
    """
    if isinstance(config, FactoryData):
        return _from_factory(config)
    names = ("data.train", "data.validation")
    mend = WRITE_IT if isinstance(config, TokenData) else "delete it: it is made again"
    arrays = [open_tokens(Path(p), where, mend) for p, where in zip(files, names, strict=True)]
    train, validation = (
        TokenDataset(array, config.seq_len, vocab_size, where)
        for array, where in zip(arrays, names, strict=True)
    )
    mark = "-".join([*(fingerprint(array) for array in arrays), str(config.seq_len)])
    return DataSource(train, validation, config.seq_len, "tokens", mark)


def _from_factory(config: FactoryData) -> DataSource:
    datasets = []
    for split in ("train", "validation"):
        dataset = call_factory(config.factory, config.args, where="data.factory", split=split)
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise DataError(
                f"{config.factory}(split={split!r}) returned a {type(dataset).__name__}",
                where="data.factory",
                why="a map-style dataset has __len__ and __getitem__",
                mend="return such a dataset, whose items are dicts of tensors",
            )
        if len(dataset) < 1:
            raise DataError(f"{config.factory}(split={split!r}) is empty", where="data.factory")
        datasets.append(dataset)
    train, validation = datasets
    items = getattr(train, "items_per_sample", 1)
    mark = json.dumps([config.factory, config.args, len(train)], sort_keys=True, default=str)
    return DataSource(train, validation, items, getattr(train, "unit", "samples"), mark)


def open_source(
    config: StdlibData | TextData | TokenData | FactoryData, vocab_size: int | None, mesh: Mesh
) -> DataSource:
    """Prepare the data on the first rank of each node, then open it everywhere.

    Raises:
        DataError: on every rank, if it is wrong on any, or differs between ranks.
    """
    world = mesh.world
    mine = together(
        lambda: prepare_data(config) if mesh.local_rank == 0 else [],
        world,
        "preparing the data",
    )
    files = all_gather_object(mine, world)[mesh.rank - mesh.local_rank]
    source = together(lambda: open_data(config, files, vocab_size), world, "opening the data")
    marks = all_gather_object(source.fingerprint, world)
    different = [rank for rank, mark in enumerate(marks) if mark != marks[0]]
    if different:
        raise DataError(
            f"ranks {different} have other data than rank 0",
            why=f"fingerprints {[marks[rank] for rank in different]} and {marks[0]}",
            mend="give every node the same files (and, for data.kind=stdlib, the same Python)",
        )
    return source
