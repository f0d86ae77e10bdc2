"""A model of Hugging Face transformers, split from outside by the plan that it publishes.

`python examples/transformers_tp.py` runs alone, and with the same losses on several ranks
`torchrun --nproc-per-node 2 examples/transformers_tp.py`. --model chooses llama, qwen2 or qwen3.
Needs `pip install transformers`; the model is small and new, so nothing is downloaded.
"""

import argparse
import os

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

import bigtrain

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", choices=("llama", "qwen2", "qwen3"), default="llama")
kind = parser.parse_args().model
if "RANK" in os.environ:  # torchrun started this
    dist.init_process_group("gloo")
group = dist.group.WORLD if dist.is_initialized() else None

torch.manual_seed(0)
config = AutoConfig.for_model(
    kind,
    vocab_size=257,
    hidden_size=64,
    intermediate_size=172,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=8,
    tie_word_embeddings=kind == "qwen2",
)
model = AutoModelForCausalLM.from_config(config)  # or from_pretrained: weights are split as well
bigtrain.apply_tensor_parallel(model, None, group)  # None: its own plan
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
text = torch.tensor(list(torch.__doc__.encode()))  # any bytes will do
for step in range(30):
    starts = (torch.arange(8) + 8 * step) * 61 % (len(text) - 64)
    window = text[starts[:, None] + torch.arange(64)]  # the same on all ranks
    loss = model(input_ids=window, labels=window).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if (group is None or dist.get_rank() == 0) and (step + 1) % 10 == 0:
        print(f"step {step + 1}  loss {loss.item():.5f}")
bigtrain.leave()
