"""A model of Hugging Face transformers on a pipeline, found and cut from outside.

`python examples/transformers_pp.py` runs alone, and with the same losses on several ranks
`torchrun --nproc-per-node 4 examples/transformers_pp.py`. --tp 2 also splits each layer over two
ranks, by the plan that the model publishes. --model chooses llama, qwen2 or qwen3.
Needs `pip install transformers`; the model is small and new, so nothing is downloaded.
"""

import argparse
import os

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import bigtrain


def loss_of(model: torch.nn.Module, window: torch.Tensor) -> torch.Tensor:
    return model(input_ids=window, labels=window, use_cache=False).loss


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", choices=("llama", "qwen2", "qwen3"), default="llama")
parser.add_argument("--tp", type=int, default=1)
args = parser.parse_args()
ranks = int(os.environ.get("WORLD_SIZE", "1"))
mesh = bigtrain.init(bigtrain.Layout(pp=ranks // args.tp, tp=args.tp))
torch.manual_seed(0)
config = AutoConfig.for_model(
    args.model,
    vocab_size=257,
    hidden_size=64,
    intermediate_size=172,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=8,
    tie_word_embeddings=args.model == "qwen2",
)
model = AutoModelForCausalLM.from_config(config)  # or from_pretrained
text = torch.tensor(list(torch.__doc__.encode()), device=mesh.device)  # any bytes will do
example = text[:128].view(2, 64)
pipeline = bigtrain.build_pipeline(model, mesh, loss_of=loss_of, example=example)
for stage in pipeline.stages:
    print(f"rank {mesh.rank} has stage {stage.index}: {stage.units[0]} to {stage.units[-1]}")
optimizer = bigtrain.AdamW(pipeline.path, lr=1e-3)
for step in range(30):
    starts = (torch.arange(8, device=mesh.device) + 8 * step) * 61 % (len(text) - 64)
    windows = text[starts[:, None] + torch.arange(64, device=mesh.device)]
    loss = pipeline.step(windows.split(2), loss_of)  # 4 microbatches, the same on all ranks
    pipeline.path.finish()
    optimizer.step()
    pipeline.path.publish()
    if mesh.rank == 0 and (step + 1) % 10 == 0:
        print(f"step {step + 1}  loss {loss.item():.5f}")
bigtrain.leave()
