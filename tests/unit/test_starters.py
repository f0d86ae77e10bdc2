"""The commands that start agents on nodes, and what is told of a launch before it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from unit_helpers import ROOT, assert_explained

from bigtrain.comm.init import choose_device
from bigtrain.comm.world import World
from bigtrain.config.launching import LaunchSection
from bigtrain.config.schema import Config
from bigtrain.errors import LaunchError
from bigtrain.launch.plan import Plan, find_hosts, smaller
from bigtrain.launch.starters import passed_on, starters

AGENT = [sys.executable, "-m", "bigtrain.launch.agent"]


def launch(**keys: object) -> LaunchSection:
    return LaunchSection.model_validate(keys)


def plan(start: str, *nodes: str, least: int = 1) -> Plan:
    return Plan("there", start, nodes, 2, least)  # type: ignore[arg-type]


def test_srun_starts_one_agent_on_each_node_with_all_its_processors() -> None:
    env = {"SLURM_JOB_CPUS_PER_NODE": "8,6"}
    [command] = starters(plan("srun", "n1", "n3"), launch(), env, "/here")
    assert command[0] == "srun"
    assert command[-3:] == AGENT
    text = " ".join(command)
    assert "--nodes 2 --ntasks 2 --ntasks-per-node 1 --nodelist n1,n3 --cpus-per-task 6" in text


def test_ssh_passes_on_what_ranks_need_and_nothing_else() -> None:
    env = {"PATH": "/my bin", "NCCL_DEBUG": "INFO", "SECRET": "x", "PYTHONPATH": "/p"}
    env["CUDA_VISIBLE_DEVICES"] = ""  # the machine that we are on may have none
    env["HF_TOKEN"] = "hf_x"
    there = plan("ssh", "me@a", "b")
    first, second = starters(there, launch(ssh=["ssh", "-q"]), env, "/here")
    assert first[:3] == ["ssh", "-q", "me@a"]
    assert second[2] == "b"
    # Words of a command can be read by all users of a machine; what may be secret goes otherwise.
    assert first[3].startswith("env 'PATH=/my bin' PYTHONPATH=/p /")
    assert "hf_x" not in first[3]
    assert passed_on(there, env) == {"NCCL_DEBUG": "INFO", "HF_TOKEN": "hf_x"}
    assert passed_on(plan("srun", "a"), env) == {}


def test_apptainer_sees_the_folder_we_are_in() -> None:
    container = {"kind": "apptainer", "image": "a.sif", "mounts": ["/data:/d:ro"], "python": "py"}
    [command] = starters(plan("here", "localhost"), launch(container=container), {}, "/here")
    assert command == [
        *("apptainer", "exec", "--nv", "--pwd", "/here", "--bind", "/here"),
        *("--bind", "/data:/d:ro", "a.sif", "py", "-m", "bigtrain.launch.agent"),
    ]


def test_pyxis_is_words_for_srun() -> None:
    container = {"kind": "pyxis", "image": "nvcr.io#a", "mounts": ["/data"], "options": ["--x"]}
    [command] = starters(plan("srun", "n1"), launch(container=container), {}, "/here")
    assert command[-7:] == [
        "--container-image=nvcr.io#a",
        "--container-mounts=/here,/data",
        "--container-workdir=/here",
        "--x",
        *("python3", "-m", "bigtrain.launch.agent"),
    ]
    with pytest.raises(LaunchError) as caught:
        starters(plan("ssh", "a"), launch(container=container), {}, "/here")
    assert_explained(caught.value, "pyxis", "srun")


# -- hosts, and fewer of them ------------------------------------------------------------------


def test_hosts_by_name_or_file(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# ours\n\n a slots=4\nuser@b # old\n")
    assert find_hosts(str(path)) == ["a", "user@b"]
    assert find_hosts("a, b,") == ["a", "b"]
    assert find_hosts("a") == ["a"]
    assert find_hosts("") == []


@pytest.mark.parametrize("text", ["a,b,a", ",", " , "])
def test_bad_hosts(text: str) -> None:
    with pytest.raises(LaunchError) as caught:
        find_hosts(text)
    assert_explained(caught.value, "--hosts")


def test_an_empty_file_of_hosts(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# none\n")
    with pytest.raises(LaunchError, match="names no machine"):
        find_hosts(str(tmp_path / "hosts"))


def test_going_on_with_fewer_nodes() -> None:
    config = Config.model_validate({"train": {"global_batch": 8}})
    four = plan("ssh", "a", "b", "c", "d", least=1)
    left = smaller(config, four, {"b"})
    assert left is not None
    assert left.nodes == ("a", "c"), "six ranks cannot share a batch of eight"
    assert smaller(config, plan("ssh", "a", "b", least=2), {"b"}) is None
    assert smaller(config, plan("ssh", "a", "b", least=1), {"a", "b"}) is None


# -- before anything starts --------------------------------------------------------------------


def test_dry_run_needs_no_torch(tmp_path: Path) -> None:
    script = (
        "import sys; from typer.testing import CliRunner; from bigtrain.cli import app\n"
        "hosts = ['--hosts', 'a,b', 'launch.processes=1']\n"
        "for more in (hosts, ['--slurm'], ['launch.mpi={}'], []):\n"
        f"    words = ['launch', {str(ROOT / 'configs/quickstart.yaml')!r}, '--dry-run', *more]\n"
        "    done = CliRunner().invoke(app, words)\n"
        "    assert done.exit_code == 0, done.output\n"
        "    assert '2 ranks' in done.output or '#SBATCH' in done.output, done.output\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir()), "it wrote something"


# -- which GPU ---------------------------------------------------------------------------------


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    return monkeypatch


def test_a_task_of_slurm_that_sees_its_own_gpu_takes_it(one_gpu: pytest.MonkeyPatch) -> None:
    one_gpu.setenv("SLURM_STEP_NUM_TASKS", "4")
    world = World(rank=3, world_size=4, local_rank=3, local_world_size=4)
    assert choose_device("auto", world) == torch.device("cuda", 0)


def test_ranks_do_not_share_a_gpu(one_gpu: pytest.MonkeyPatch) -> None:
    world = World(rank=1, world_size=2, local_rank=1, local_world_size=2)
    with pytest.raises(LaunchError, match="2 ranks on this node, but 1 GPUs"):
        choose_device("auto", world)
