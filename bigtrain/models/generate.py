"""Text out of a language model."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F


@torch.no_grad()
def generate(
    model: Callable[[torch.Tensor], torch.Tensor],
    prompt: torch.Tensor,
    num_tokens: int,
    *,
    max_seq_len: int,
    seed: int,
    temperature: float = 0.8,
    multiple_of: int = 1,
) -> torch.Tensor:
    """Return `prompt` [T] int64 followed by `num_tokens` sampled tokens.

    model(tokens [1, T]) gives logits [1, T, vocabulary], in evaluation mode. Each token is drawn
    from softmax(logits / temperature) of the last max_seq_len tokens, by a generator of its own, so
    that neither the draw nor training depends on the other. The model is given lengths that are a
    multiple of `multiple_of` (sequence parallelism needs that); what is added behind the last token
    changes nothing before it.
    """
    draw = torch.Generator().manual_seed(seed)
    tokens = prompt
    for _ in range(num_tokens):
        window = tokens[-(max_seq_len // multiple_of * multiple_of) :]
        padded = F.pad(window, (0, -len(window) % multiple_of))
        logits = model(padded[None])[0, len(window) - 1].float().cpu()
        chances = torch.softmax(logits / temperature, dim=-1)
        token = torch.multinomial(chances, 1, generator=draw)
        tokens = torch.cat((tokens, token.to(tokens.device)))
    return tokens
