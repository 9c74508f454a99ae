"""Results of long computations in JSON files, a file a job: finished jobs are not computed again.

Files that several processes may write are written whole, or under a lock.
"""

import fcntl
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

__all__ = ["Named", "lock", "read_result", "result_path", "write_json", "write_whole"]


class Named(Protocol):
    """What results are kept of."""

    @property
    def name(self) -> str:
        """Short and unique, for files."""

    @property
    def title(self) -> str:
        """For people."""


def result_path(directory: Path, job: Named) -> Path:
    """Where the result of a job is."""
    return directory / f"{job.name}.json"


def read_result(directory: Path, job: Named) -> dict[str, Any] | None:
    """The result of a job, or None if it has not finished."""
    path = result_path(directory, job)
    return json.loads(path.read_text()) if path.exists() else None


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Let one process at a time work on `path`; its folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that it is there whole or not at all; the folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    part = Path(name)
    try:
        write(part)
        part.chmod(0o644)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    write_whole(path, lambda part: part.write_text(text + "\n"))
