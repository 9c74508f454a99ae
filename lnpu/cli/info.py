"""Configurations, registers and commands: `info`."""

import argparse

from lnpu.cli.arguments import CONFIG_NAMES, Subparsers
from lnpu.config import CONFIGS, get_config

__all__ = ["add"]


def add(commands: Subparsers) -> None:
    """Add the commands."""
    info = commands.add_parser("info", help="configurations, or one in detail with its register map")
    info.add_argument("config", nargs="?", help=f"one of {CONFIG_NAMES}")
    info.add_argument("--registers", action="store_true", help="print the register map")
    info.add_argument("--commands", action="store_true", help="print the fields of the commands")
    info.set_defaults(run=_info)


def _info(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from lnpu.ctrl.commands import LAYOUTS
    from lnpu.ctrl.registers import register_table

    if arguments.registers:
        print(register_table(), end="")
    if arguments.commands:
        for opcode, layout in LAYOUTS.items():
            print(f"{opcode.name} ({opcode.value:#04x})")
            for name, place in layout:
                print(f"  [{place.offset + place.width - 1}:{place.offset}] {name}")
    configs = [get_config(arguments.config)] if arguments.config else list(CONFIGS.values())
    if arguments.config or not (arguments.registers or arguments.commands):
        for config in configs:
            print(f"{config.name}: {config.macs_fp16} FP16 MACs a cycle, {config.sram_bytes / 1024:.0f} KiB of SRAM")
            if arguments.config:
                for name, value in asdict(config).items():
                    print(f"  {name} = {value}")
    return 0
