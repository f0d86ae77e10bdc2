"""Files with one JSON record per line and step, which a resume can wind back."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any


class JsonLines:
    """Appends records to a file; each is handed to the system before `add` returns."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115  see close()

    def add(self, record: dict[str, Any]) -> None:
        """Append one record; a NaN or an infinity, which JSON does not have, becomes null."""
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        self._file.write(json.dumps(finite) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file; a line that a kill cut off is left out."""
    records = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def forget_after(path: Path, step: int) -> None:
    """Remove the records of later steps, which a resumed run will write again."""
    if path.exists():
        kept = [record for record in read_lines(path) if record["step"] <= step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(temporary, path)
