"""Your own loop, data parallel: `python examples/own_loop.py`, or with several ranks
`torchrun --nproc-per-node 2 examples/own_loop.py`."""

import torch

import bigtrain
from bigtrain.models import GPT

mesh = bigtrain.init()  # the ranks that torchrun started, or this process alone
model = GPT(hidden_size=64, num_layers=2)
path = bigtrain.parallelize(model, mesh)  # flat buckets, equal replicas, averaged gradients
optimizer = bigtrain.AdamW(path, lr=1e-3)
text = torch.tensor(list(torch.__doc__.encode()), device=mesh.device)  # any bytes will do
for step in range(60):
    starts = torch.arange(8) * 64 + (step * mesh.dp.degree + mesh.dp.rank) * 8
    window = text[starts[:, None] % (len(text) - 65) + torch.arange(65)]
    loss = model(window[:, :-1], window[:, 1:])
    path.backward(loss)  # each bucket is all-reduced as soon as it is ready
    path.finish()  # now gradients are means over all ranks
    optimizer.step()
    path.publish()
    if mesh.rank == 0 and (step + 1) % 20 == 0:
        print(f"step {step + 1}  loss {loss.item():.3f}")
bigtrain.leave()
