"""Token files: one-dimensional .npy arrays, mapped into memory, cut into samples."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch

from bigtrain.errors import DataError

_DTYPES = ("uint8", "uint16", "uint32")


WRITE_IT = "write it with numpy.save, as one array of uint8, uint16 or uint32 tokens"


def open_tokens(path: Path, where: str, mend: str = WRITE_IT) -> np.ndarray:
    """Return the tokens of a .npy file, mapped read-only.

    Raises:
        DataError: missing, truncated, or not a one-dimensional array of unsigned integers.
    """
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"there is no file {path}", where=where, mend="check the path") from None
    except Exception as error:  # numpy raises whatever its parsers raise on a damaged file
        why = "the file is truncated, damaged or of another kind"
        if isinstance(error, OSError | ValueError) and "pickle" not in str(error):
            why += f" (numpy says: {error})"
        raise DataError(
            f"{path} is no readable .npy file", where=where, why=why, mend=mend
        ) from error
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or tokens.dtype.name not in _DTYPES:
        shown = (
            f"{tokens.dtype} of shape {tokens.shape}" if hasattr(tokens, "dtype") else "no array"
        )
        raise DataError(f"{path} holds {shown}", where=where, why="tokens are ids", mend=mend)
    return tokens


def fingerprint(tokens: np.ndarray) -> str:
    """Return a short hash of the length, dtype and a spread of the content (at most 1 MiB read)."""
    digest = hashlib.sha256(f"{tokens.dtype} {len(tokens)}".encode())
    step = max(1, len(tokens) // 256)
    for start in range(0, len(tokens), step):
        digest.update(tokens[start : start + 1024].tobytes())
    return digest.hexdigest()[:16]


class TokenDataset(torch.utils.data.Dataset):
    """Sample i is tokens [i*T, i*T + T) and, one further on, their targets; windows do not overlap.

    Items are {"tokens": [T] int64, "targets": [T] int64}; `read_batch` gives many at once.
    """

    def __init__(
        self, tokens: np.ndarray, seq_len: int, vocab_size: int | None, where: str
    ) -> None:
        self.tokens, self.seq_len = tokens, seq_len
        self.vocab_size, self.where = vocab_size, where
        if len(self) < 1:
            raise DataError(
                f"{len(tokens)} tokens do not make one sample of {seq_len} + 1",
                where=where,
                mend="give more data, or a shorter data.seq_len",
            )

    def __len__(self) -> int:
        return max(0, len(self.tokens) - 1) // self.seq_len

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        batch = self.read_batch([index])
        return {name: tensor[0] for name, tensor in batch.items()}

    def read_batch(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """Return samples stacked along a new first dim."""
        length = self.seq_len
        windows = np.stack([self.tokens[i * length : i * length + length + 1] for i in indices])
        if self.vocab_size is not None and windows.max() >= self.vocab_size:
            raise DataError(
                f"token {windows.max()} in samples {indices} is outside of the vocabulary",
                where=self.where,
                why=f"model.vocab_size is {self.vocab_size}, so tokens are 0 to "
                f"{self.vocab_size - 1}",
                mend="set model.vocab_size to that of the tokenizer that wrote the file",
            )
        ids = torch.from_numpy(windows.astype(np.int64))
        return {"tokens": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()}


def ngram_entropies(tokens: np.ndarray, limit: int = 20_000_000) -> tuple[float, float]:
    """Return the unigram entropy and the bigram entropy H(next | this) of `tokens`, in nats.

    No model that knows only the frequencies (of tokens, of pairs) can have a lower loss on them.
    """
    tokens = np.asarray(tokens[:limit]).astype(np.int64)
    pairs = tokens[:-1] * (int(tokens.max()) + 1) + tokens[1:]
    single, double = _entropy(tokens[:-1]), _entropy(pairs)
    return _entropy(tokens), double - single


def _entropy(values: np.ndarray) -> float:
    _, counts = np.unique(values, return_counts=True)
    p = counts / counts.sum()
    return float(-(p * np.log(p)).sum())
