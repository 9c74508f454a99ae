"""The report of an FPGA run: one HTML page with its plot inside, and the same figures as JSON."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lnpu.page import GRID, card, image, in_a_row, new_figure, number, page, percent, section, table
from lnpu.results import write_json, write_whole

__all__ = ["bars", "lines", "render_report", "write_report"]

_COLOURS = {"LUT4": "#0072b2", "flip-flops": "#56b4e9", "block RAMs": "#e69f00", "multipliers": "#009e73"}


def write_report(directory: Path, result: Mapping[str, Any]) -> Path:
    """Write `NAME.html` and `NAME.json`, NAME being the configuration's (and the block's); return the page."""
    name, block = result["config"]["name"], result["settings"]["block"]
    if block != "chip":
        name = f"{name}-{block}"
    path = directory / f"{name}.html"
    write_json(directory / f"{name}.json", result)
    write_whole(path, lambda part: part.write_text(render_report(result)))
    return path


def lines(result: Mapping[str, Any]) -> list[str]:
    """The main figures as lines of text."""
    found = [
        f"{name}: {site['used']:,} of {site['available']:,} ({percent(site['used'], site['available'])})"
        for name, site in result["utilisation"].items()
    ]
    for name, clock in result["clocks"].items():
        found.append(f"clock {name}: {clock['achieved']:.1f} MHz, asked for {clock['asked']:g} MHz")
    return found


def bars(result: Mapping[str, Any]) -> tuple[Figure, float]:
    """Share of the device that each block takes, and the plot's width in hundreds of pixels."""
    blocks = {name: used for name, used in result["blocks"].items() if "." not in name}
    order = sorted(blocks, key=lambda name: blocks[name]["LUT4"])
    figure, (axis,) = new_figure(0.4 * len(order) + 1.2)
    for i, (resource, colour) in enumerate(_COLOURS.items()):
        available = result["utilisation"][resource]["available"]
        places = [row + 0.3 - 0.2 * i for row in range(len(order))]
        shares = [100 * blocks[name][resource] / available for name in order]
        axis.barh(places, shares, height=0.2, color=colour, label=resource)
    axis.set_yticks(range(len(order)), order)
    axis.set_xlabel("share of the device (%)")
    axis.grid(axis="x", color=GRID)
    axis.tick_params(axis="y", length=0)
    axis.legend(loc="lower right", frameon=False)
    return figure, 10


def render_report(result: Mapping[str, Any]) -> str:
    """The page of HTML."""
    settings = result["settings"]
    cards = [
        card(
            f"{clock['achieved']:.1f} MHz",
            f"{clock_name}, asked for {clock['asked']:g} MHz",
            "good" if clock["achieved"] >= clock["asked"] else "bad",
        )
        for clock_name, clock in result["clocks"].items()
    ]
    cards += [
        card(percent(site["used"], site["available"]), f"of the {resource}")
        for resource, site in result["utilisation"].items()
    ]
    rows = [
        (resource, number(site["used"]), number(site["available"]), percent(site["used"], site["available"]))
        for resource, site in result["utilisation"].items()
    ]
    parts = [
        in_a_row(cards),
        section(
            "Utilisation",
            "After packing, as nextpnr counts it. A carry chain takes a LUT a bit, a distributed RAM of 16 x 4 "
            "bits six.",
            table(("resource", "used", "available", "share"), rows),
        ),
        section("Blocks", "Shares of the device after synthesis.", image("Resources by block", *bars(result))),
        section(
            "Blocks and their parts",
            "After synthesis. Yosys gives every cell the name of a net that it is connected to; the cell counts for "
            "the block of that name, so logic at the border of two blocks may be counted for either. Parts whose "
            "names differ in a number are added up.",
            table(("block", *_COLOURS), _block_rows(result["blocks"])),
        ),
    ]
    for clock_name, clock in result["clocks"].items():
        if clock["path"]:
            parts.append(section(f"Critical path of {clock_name}", _path_text(clock), _path_table(clock)))
    facts = [*settings.items(), *((f"{step}, seconds", value) for step, value in result["seconds"].items())]
    facts += list(result["config"].items())
    parts.append(
        section(
            "Settings",
            "The ports are on a shift register (lnpu/fpga/scan_chain.py), so that few pins do.",
            table(("setting", "value"), [(key, number(value)) for key, value in facts], text_columns=2),
        )
    )
    what = "LNPU" if settings["block"] == "chip" else f"LNPU's block {settings['block']}"
    return page(f"{what} on an ECP5, configuration {result['config']['name']}", parts)


def _block_rows(blocks: Mapping[str, Mapping[str, int]]) -> list[tuple[str, ...]]:
    rows = []
    tops = sorted((name for name in blocks if "." not in name), key=lambda name: -blocks[name]["LUT4"])
    for top in tops:
        inside = sorted((name for name in blocks if name.startswith(f"{top}.")), key=lambda name: -blocks[name]["LUT4"])
        for name in (top, *inside):
            label = name if name == top else f"\N{EM SPACE}{name.partition('.')[2]}"
            rows.append((label, *(number(blocks[name][resource]) for resource in _COLOURS)))
    return rows


def _path_text(clock: Mapping[str, Any]) -> str:
    total = sum(clock["path_by_block"].values())
    routing = sum(hop["delay"] for hop in clock["path"] if hop["kind"] == "routing")
    shares = ", ".join(f"{block} {delay:.2f} ns" for block, delay in clock["path_by_block"].items())
    return f"{total:.2f} ns, {percent(routing, total)} of them routing. By block: {shares}."


def _path_table(clock: Mapping[str, Any]) -> str:
    rows, at = [], 0.0
    for hop in clock["path"]:
        at += hop["delay"]
        rows.append((hop["block"], hop["kind"], f"{hop['delay']:.2f}", f"{at:.2f}", _short(hop["cell"])))
    return table(("block", "step", "ns", "in all", "to the cell"), rows, text_columns=2)


def _short(cell: str) -> str:
    """The net that a cell was named after, and the cell's own type."""
    return cell if len(cell) <= 60 else f"{cell[:40]}...{cell[-17:]}"
