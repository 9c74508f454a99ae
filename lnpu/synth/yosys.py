"""Yosys, by way of the `pyosys` package, in a process of its own."""

import importlib.util
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from lnpu.toolchain import ToolError

__all__ = ["SynthesisError", "run_yosys"]

# An error of Yosys ends the whole process, so it gets one of its own.
_SCRIPT = "import sys\nfrom pyosys import libyosys as ys\nd = ys.Design()\nfor p in sys.stdin.read().splitlines(): \
ys.run_pass(p, d)"


class SynthesisError(ToolError):
    """Yosys failed on a design; the message ends with the end of its log."""


def run_yosys(passes: Iterable[str], folder: Path | None = None, *, log_file: Path | None = None) -> str:
    """Run passes of Yosys on a design that is empty at first.

    Parameters
    ----------
    passes : iterable of str
        Commands of Yosys, one a string.
    folder : Path or None
        Where the process runs, so what relative paths in the passes are relative to (default: here).
    log_file : Path or None
        Where the log goes too, if Yosys fails as well.

    Returns
    -------
    str
        The log.

    Raises
    ------
    SynthesisError
        If a pass fails.
    ToolError
        If pyosys is not installed.
    """
    if importlib.util.find_spec("pyosys") is None:
        raise ToolError("missing Python package: run `pip install pyosys==0.70`")
    result = subprocess.run(
        [sys.executable, "-c", _SCRIPT], input="\n".join(passes), cwd=folder, capture_output=True, text=True
    )
    log = result.stdout + result.stderr
    if log_file is not None:
        log_file.write_text(log)
    if result.returncode:
        where = f", log {log_file} ends" if log_file is not None else " on the design"
        raise SynthesisError(f"Yosys failed{where}:\n" + "\n".join(log.strip().splitlines()[-20:]))
    return log
