"""How long a user waits: the command line, and from launch to the first step.

python benchmarks/startup.py [--repeats 7]

`launch`: `bigtrain launch` of a tiny model on 2 ranks, until its first step is on the screen;
beside it torchrun running a minimal DistributedDataParallel script of the same model, until it
prints its first step. In turn, `repeats` times; the median of the ratio within a round.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONFIG = """
model: {num_layers: 2, hidden_size: 64, max_seq_len: 64}
data: {kind: stdlib, seq_len: 64}
parallel: {dp: 2}
train: {steps: 2, global_batch: 8}
launch: {threads_per_rank: 1}
"""

DDP_SCRIPT = """
import os, torch, torch.distributed as dist
from bigtrain.models import GPT
dist.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.parallel.DistributedDataParallel(GPT(num_layers=2, hidden_size=64, max_seq_len=64))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
tokens = torch.randint(0, 256, (4, 64))
loss = model(tokens, tokens)
loss.backward()
optimizer.step()
if dist.get_rank() == 0:
    print("step 1", loss.item(), flush=True)
dist.barrier()
os._exit(0)  # torch's own end of a gloo process aborts now and then
"""


def seconds_until(command: list[str], text: str | None, cwd: Path) -> float:
    """Run a command; return the time until a line starts with `text`, or until it ends."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    with subprocess.Popen(
        command,
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdout is not None
        elapsed = None
        for line in process.stdout:
            if text and line.startswith(text) and elapsed is None:
                elapsed = time.perf_counter() - start
        code = process.wait()
    if code or (text and elapsed is None):
        raise SystemExit(f"{command} ended with {code} and without {text!r}")
    return elapsed if elapsed is not None else time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    bigtrain = str(Path(sys.executable).with_name("bigtrain"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "run.yaml").write_text(CONFIG)
        (folder / "ddp.py").write_text(DDP_SCRIPT)
        for verb, bar in ((["--help"], 0.3), (["check", "run.yaml"], 0.5)):
            seconds_until([bigtrain, *verb], None, folder)
            times = [seconds_until([bigtrain, *verb], None, folder) for _ in range(repeats)]
            print(f"bigtrain {' '.join(verb)}: {statistics.median(times):.2f} s (aim: < {bar} s)")
        launch = [bigtrain, "launch", "run.yaml", "--restart"]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        torchrun += ["--nproc-per-node", "2", "ddp.py"]
        rounds = []
        for _ in range(repeats + 1):
            ours = seconds_until(launch, "step 1", folder)
            rounds.append((ours, seconds_until(torchrun, "step 1", folder)))
        ratios = [ours / theirs for ours, theirs in rounds[1:]]  # the first round warms the caches
        ours, theirs = (statistics.median(column) for column in zip(*rounds[1:], strict=True))
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(
            f"launch to first step: {ours:.2f} s; torchrun with a minimal DDP script {theirs:.2f} s"
        )
        print(f"ratio: {statistics.median(ratios):.2f} ({spread}; aim: <= 1.5)")


if __name__ == "__main__":
    main()
