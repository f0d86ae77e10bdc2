"""What ranks are started with: pure functions of the config and the machine."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import pytest

from bigtrain import machine
from bigtrain.config.schema import Config
from bigtrain.launch import plan as module
from bigtrain.launch.job import Job, Meeting
from bigtrain.launch.plan import make_plan
from bigtrain.machine import num_gpus, threads_per_rank

JOB = Job(Path("runs/a b/config.yaml"), Path("runs/a b/logs"), 1, 2, 3, resume=False)
HERE = Meeting("127.0.0.1", 2345, 9)


def config(**sections: dict) -> Config:
    return Config.model_validate(sections)


def ranks_here(config: Config) -> int:
    return make_plan(config, {}, None).num_ranks


def test_command() -> None:
    """The interpreter that runs now, and the config of the run folder."""
    command = [sys.executable, "-m", "bigtrain.train", "runs/a b/config.yaml"]
    assert JOB.command() == command
    resumed = dataclasses.replace(JOB, resume=True)
    assert resumed.command() == [*command, "--resume"]


def test_every_rank_has_a_log_of_its_own() -> None:
    assert JOB.log(0) != JOB.log(1)
    assert JOB.log(0).parent == JOB.logs


def test_environment_of_a_rank() -> None:
    env = JOB.environment(1, HERE, report_fd=11, base={"HOME": "/home/me"})
    world = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "2345",
    }
    assert env.items() >= world.items()
    assert env["HOME"] == "/home/me"
    assert env["OMP_NUM_THREADS"] == "3"
    assert env["BIGTRAIN_STORE_FD"] == "9"
    assert env["BIGTRAIN_REPORT_FD"] == "11"
    assert env["BIGTRAIN_LAUNCHER_PID"] == str(os.getpid())
    assert all(isinstance(value, str) for value in env.values())


def test_what_the_user_set_stays() -> None:
    base = {"OMP_NUM_THREADS": "7", "GLOO_SOCKET_IFNAME": "eth0"}
    assert JOB.environment(0, HERE, 11, base).items() >= base.items()


def test_stale_world_of_another_launcher_is_replaced() -> None:
    """A launch from inside of a Slurm step or of a torchrun."""
    base = {"RANK": "7", "WORLD_SIZE": "8", "MASTER_ADDR": "elsewhere", "GROUP_RANK": "3"}
    env = JOB.environment(0, HERE, 11, base)
    assert (env["RANK"], env["WORLD_SIZE"], env["GROUP_RANK"]) == ("0", "2", "0")
    assert env["MASTER_ADDR"] == "127.0.0.1"
    assert base["RANK"] == "7"


@pytest.mark.parametrize(
    ("visible", "count"),
    [("", 0), ("-1", 0), ("0", 1), ("0,1", 2), (" 2 , 3 ", 2), ("GPU-8f3a,GPU-1b2c", 2), ("7", 1)],
)
def test_visible_gpus(visible: str, count: int, tmp_path: Path) -> None:
    """CUDA_VISIBLE_DEVICES decides, whatever the driver has."""
    assert num_gpus({"CUDA_VISIBLE_DEVICES": visible}, tmp_path) == count


def test_gpus_of_the_driver(tmp_path: Path) -> None:
    for name in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / name).mkdir()
    assert num_gpus({}, tmp_path) == 2
    assert num_gpus({}, tmp_path / "nowhere") == 0


def test_ranks_are_what_the_config_fixes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "num_gpus", lambda env: 8)
    assert ranks_here(config(parallel={"dp": 3})) == 3
    assert ranks_here(config(parallel={"dp": 3, "tp": 2})) == 6
    assert ranks_here(config(launch={"processes": 5})) == 5


def test_else_one_rank_per_gpu_or_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "num_cores", lambda: 6)
    monkeypatch.setattr(module, "num_gpus", lambda env: 2)
    assert ranks_here(Config()) == 2
    assert ranks_here(config(run={"device": "cpu"})) == 6
    monkeypatch.setattr(module, "num_gpus", lambda env: 0)
    assert ranks_here(Config()) == 6


def test_threads_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "num_cores", lambda: 8)
    assert [threads_per_rank("auto", ranks) for ranks in (1, 2, 3, 16)] == [8, 4, 2, 1]
    assert threads_per_rank(5, 16) == 5
