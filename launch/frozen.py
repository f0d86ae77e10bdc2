"""What a submitted job starts from: the effective config, and which code it was submitted with."""

from __future__ import annotations

import contextlib
import hashlib
import subprocess
from importlib import metadata
from pathlib import Path

from bigtrain.config.load import dump
from bigtrain.config.schema import Config
from bigtrain.run_folder import explained_io

_FOLDER = "slurm"  # in the run folder
_CODE = "code.txt"


def frozen_path(config: Config) -> Path:
    """Return the config that jobs of this run read."""
    return Path(config.run.dir) / _FOLDER / "config.yaml"


def freeze(config: Config, ranks_per_node: int) -> tuple[str, ...]:
    """Write the effective config and the version of the code; return the latter as lines.

    The job starts as many ranks on a node as were counted now, whatever else it is given.
    """
    path = frozen_path(config)
    launch = config.launch.model_copy(update={"processes": ranks_per_node})
    config = config.model_copy(update={"launch": launch})
    code = code_lines()
    with explained_io(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dump(config), encoding="utf-8")
        (path.parent / _CODE).write_text("\n".join(code) + "\n", encoding="utf-8")
        for number, folder in enumerate(_checkouts()):
            changes = _git(folder, "diff", "HEAD")
            target = path.parent / f"changes-{number}.diff"
            target.unlink(missing_ok=True)
            if changes:
                target.write_text(changes, encoding="utf-8")
    return code


def code_lines() -> tuple[str, ...]:
    """Return the version of bigtrain, and the commits of its checkout and of this folder's."""
    lines = [f"bigtrain {metadata.version('bigtrain')}"]
    for folder in _checkouts():
        commit = _git(folder, "rev-parse", "--short=12", "HEAD").strip()
        changes = _git(folder, "diff", "HEAD")
        digest = hashlib.sha256(changes.encode(errors="replace")).hexdigest()[:8]
        changed = f", changed since ({digest})" if changes else ""
        lines.append(f"{folder.name} at {commit}{changed}")
    return tuple(lines)


def changed_since(config_path: str) -> str | None:
    """Return a line of warning, if this config was frozen with other code than there is now."""
    was = None
    with contextlib.suppress(OSError, UnicodeDecodeError):
        was = Path(config_path).with_name(_CODE).read_text(encoding="utf-8").splitlines()
    now = list(code_lines()) if was is not None else None
    if was == now:
        return None
    return f"the code is not what this was submitted with: {', '.join(now or [])}; it was " + (
        ", ".join(was or [])
    )


def _checkouts() -> list[Path]:
    """Return the git checkouts of bigtrain's own files and of the current folder."""
    tops = []
    for folder in (Path(__file__).resolve().parent, Path.cwd()):
        top = _git(folder, "rev-parse", "--show-toplevel").strip()
        if top and _git(Path(top), "rev-parse", "--verify", "-q", "HEAD"):
            tops.append(Path(top))
    return list(dict.fromkeys(tops))


def _git(folder: Path, *words: str) -> str:
    """Return what git says of a folder; nothing where there is no git, or no checkout."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=20,
            check=False,
        )
        return done.stdout if done.returncode == 0 else ""
    return ""
