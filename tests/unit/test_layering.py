"""DESIGN.md section 3: who may import whom, and what never imports torch."""

from __future__ import annotations

import subprocess
import sys

import pytest
from unit_imports import KNOWN, LEVELS, TORCH_FREE, Import, imports_of, modules, reaches, violation

MODULES = dict(modules())


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """Return one line per forbidden import in `source`, read as the module of that name."""
    found = imports_of(source, module, is_package)
    why = [(i, violation(module, i)) for i in found]
    return [f"{module}:{i.line} imports {i.target}: {reason}" for i, reason in why if reason]


@pytest.mark.parametrize("module", MODULES)
def test_imports_follow_the_table(module: str) -> None:
    path = MODULES[module]
    assert violations(path.read_text(), module, path.name == "__init__.py") == []


def test_every_module_has_a_place() -> None:
    """A new package or file at the top must be put into the table first."""
    parts = {[*module.split("."), ""][1] for module in MODULES}
    assert parts <= KNOWN, f"{sorted(parts - KNOWN)} have no place in DESIGN.md's table"


@pytest.mark.parametrize(
    "module",
    [m for m in MODULES if [*m.split("."), ""][1] in LEVELS[0] | {"launch", "cli", ""}]
    + [m for m in TORCH_FREE if m in MODULES],
)
def test_torch_is_not_reached(module: str) -> None:
    """Not even through the module-level imports of what it imports."""
    assert reaches(module, "torch") is None


def test_torch_is_reached_from_comm() -> None:
    """The search above does find torch where it is."""
    assert reaches("bigtrain.comm.mesh", "torch") == ["bigtrain.comm.mesh", "torch"]
    chain = reaches("bigtrain.checkpoint.load", "torch")
    assert chain is not None
    assert chain[-1].startswith("torch")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("bigtrain.config.load", "import torch"),
        ("bigtrain.config.load", "def f():\n    import torch.nn as nn"),
        ("bigtrain.config.load", "from bigtrain.comm.mesh import Mesh"),
        ("bigtrain.config.load", "import numpy"),
        ("bigtrain.checkpoint.manifest", "import torch"),
        ("bigtrain.pipeline.schedule", "import torch"),
        ("bigtrain.config.check", "from bigtrain.pipeline.stage import Stage"),
        ("bigtrain.cli", "from bigtrain.pipeline.schedule import make_table"),
        ("bigtrain.pipeline.simulate", "def f():\n    from matplotlib.figure import Figure"),
        ("bigtrain.pipeline.draw", "from matplotlib.figure import Figure"),
        ("bigtrain.comm.mesh", "from bigtrain.optim import AdamW"),
        ("bigtrain.comm.mesh", "from bigtrain import Trainer"),
        ("bigtrain.zero.stages", "from bigtrain.onebit import codec"),
        ("bigtrain.zero.stages", "from bigtrain import onebit"),
        ("bigtrain.zero.stages", "from ..onebit import codec"),
        ("bigtrain.optim.optimizer", "from bigtrain.data.stream import TrainStream"),
        ("bigtrain.data.build", "from bigtrain.models import GPT"),
        ("bigtrain.data.build", "from bigtrain.tensor import layers"),
        ("bigtrain.models.gpt", "from bigtrain.pipeline import stage"),
        ("bigtrain.trainer", "from bigtrain.launch.job import Job"),
        ("bigtrain.launch.local", "from bigtrain.comm.world import World"),
        ("bigtrain.launch.local", "import torch"),
        ("bigtrain.cli", "from bigtrain.config.load import load_config"),
        ("bigtrain.newcomer", "import os"),
        ("bigtrain.config.load", "from bigtrain.newcomer import thing"),
        ("bigtrain.config.load", "if not TYPE_CHECKING:\n    import torch"),
        ("bigtrain.config.load", "if TYPE_CHECKING:\n    pass\nelse:\n    import torch"),
        ("bigtrain.config.load", "try:\n    import torch\nexcept ImportError:\n    torch = None"),
        ("bigtrain.config.load", "class A:\n    import torch"),
    ],
)
def test_forbidden_imports_are_flagged(module: str, source: str) -> None:
    assert violations(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("bigtrain.config.load", "import os\nimport yaml\nfrom bigtrain.errors import ConfigError"),
        ("bigtrain.config.load", "if TYPE_CHECKING:\n    import torch"),
        ("bigtrain.config.load", "if typing.TYPE_CHECKING:\n    from bigtrain.trainer import T"),
        ("bigtrain.config.load", "from . import schema\nfrom .check import check"),
        ("bigtrain.comm.mesh", "import torch\nfrom bigtrain.config.layout import Layout"),
        ("bigtrain.zero.stages", "from bigtrain.zero.shard import cut\nfrom bigtrain.ops import x"),
        ("bigtrain.models.gpt", "from bigtrain.tensor import ColumnParallelLinear"),
        ("bigtrain.checkpoint.save", "from bigtrain import __version__"),
        ("bigtrain.pipeline.draw", "def f():\n    from matplotlib.figure import Figure"),
        ("bigtrain.pipeline.stage", "import torch\nfrom bigtrain.pipeline.schedule import Table"),
        ("bigtrain.config.check", "from bigtrain.pipeline.schedule import make_table"),
        ("bigtrain.cli", "import typer\ndef f():\n    from bigtrain.trainer import Trainer"),
        ("bigtrain.launch.local", "from .job import Job\nfrom bigtrain.errors import LaunchError"),
        ("bigtrain.run", "from bigtrain.trainer import Trainer\nfrom bigtrain.zero import x"),
    ],
)
def test_legal_imports_pass(module: str, source: str) -> None:
    assert violations(source, module) == []


def test_relative_imports_of_a_package_are_resolved() -> None:
    """`from . import x` means another place in `__init__.py` than in a module beside it."""
    (inside,) = imports_of("from .job import Job", "bigtrain.launch", is_package=True)
    (beside,) = imports_of("from .job import Job", "bigtrain.launch.local")
    assert inside == beside == Import("bigtrain.launch.job.Job", False, 1)


@pytest.mark.parametrize(
    "name",
    [
        "bigtrain",
        "bigtrain.cli",
        "bigtrain.config.load",
        "bigtrain.launch.local",
        "bigtrain.checkpoint.report",
        "bigtrain.pipeline.report",
        "bigtrain.run_folder",
        "bigtrain.machine",
    ],
)
def test_importing_leaves_torch_out(name: str) -> None:
    """In a fresh interpreter, so that what libraries import in turn counts too."""
    script = f"import sys, {name}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr or f"importing {name} imports torch"
