"""Plain single-device models. Parallelism is applied to them from outside."""

from bigtrain.models.gpt import GPT
from bigtrain.models.llama import Llama

__all__ = ["GPT", "Llama"]
