"""The `lnpu` command: a module for each group of its commands."""

import argparse
import sys
from collections.abc import Sequence

from lnpu.cli import bench, export, info, operation, silicon, study, train
from lnpu.toolchain import ToolError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="lnpu", description="LNPU: an open deep-learning training processor")
    commands = parser.add_subparsers(dest="command", required=True)
    for group in (train, export, operation, study, bench, silicon, info):
        group.add(commands)
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except (ValueError, TypeError, MemoryError, OSError, ToolError) as error:
        print(f"lnpu {arguments.command}: {error}", file=sys.stderr)
        return 2
