"""The examples and the README's code do what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parents[2]
OWN_LOOP = ROOT / "examples" / "own_loop.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def run(command: list[str]) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("ranks", [0, 2])
def test_own_loop_learns(ranks: int) -> None:
    launcher = [*TORCHRUN, "--nproc-per-node", str(ranks)] if ranks else [sys.executable]
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", run([*launcher, str(OWN_LOOP)]))]
    assert len(losses) == 3
    assert losses[-1] < losses[0] < 5.6


def test_readme_shows_the_own_loop_as_it_is() -> None:
    code = OWN_LOOP.read_text().split('"""', 2)[2].strip()
    assert f"```python\n{code}\n```" in (ROOT / "README.md").read_text()


def test_ratings_are_learned(tmp_path: Path) -> None:
    """With a table of 100 million rows, on servers."""
    fetch = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(tmp_path)]
    if subprocess.run([*fetch, "recbole==1.2.1"], check=False, timeout=100).returncode:
        pytest.skip("the ratings are in a package that pip cannot fetch here")
    os.replace(next(tmp_path.glob("*.whl")), tmp_path / "recbole-1.2.1.whl")
    bigtrain = str(Path(sys.executable).with_name("bigtrain"))
    overrides = [f"run.dir={tmp_path}/run", "train.steps=60", "eval.every=0", "checkpoint.every=0"]
    cache = f"data.args={{cache: {tmp_path}}}"
    output = run([bigtrain, "launch", "configs/recommender_servers.yaml", *overrides, cache])
    loss = float(re.findall(r"validation loss ([\d.]+)", output)[-1])
    assert loss < 1.1  # the mean of all ratings has 1.26


def test_digits_are_learned(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is an extra: bigtrain[examples]")
    bigtrain = str(Path(sys.executable).with_name("bigtrain"))
    overrides = [f"run.dir={tmp_path}/run", "train.steps=60", "eval.every=0"]
    output = run([bigtrain, "launch", "configs/digits_cnn.yaml", *overrides])
    loss = float(re.findall(r"validation loss ([\d.]+)", output)[-1])
    assert loss < 1.0  # guessing among ten digits is 2.30
