"""What `lnpu synth` shows: lines of text, and a page of HTML."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lnpu.page import card, image, in_a_row, page, section, table
from lnpu.synth.plots import treemap

__all__ = ["lines", "render_report", "write_report"]

_AREA = ("block", "instances", "um2 each", "GE each", "GE of all", "own GE", "SRAM bits")
_PATHS = (
    "block",
    "period, ns",
    "registers",
    "to SRAM",
    "from SRAM",
    "from input",
    "to output",
    "through",
    "slowest path",
)
_GROUPS = ("register", "to_macro", "from_macro", "input", "output", "through")


def _area_rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    unit = result["nand2_area"]
    return [
        (
            name,
            f"{block['instances']:,}",
            f"{block['area']:,.0f}",
            f"{block['area'] / unit:,.0f}",
            f"{block['area'] / unit * block['instances']:,.0f}",
            f"{block['own_area'] / unit:,.0f}",
            f"{block['sram_bits']:,}" if block["sram_bits"] else "",
        )
        for name, block in result["blocks"].items()
    ]


def _path_rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    timed = [(name, block) for name, block in result["blocks"].items() if block.get("paths")]
    for name, block in sorted(timed, key=lambda item: -item[1]["period"]):
        paths = block["paths"]
        slowest = max(paths.values(), key=lambda path: path["delay"])
        delays = [f"{paths[group]['delay']:.2f}" if group in paths else "" for group in _GROUPS]
        rows.append((name, f"{block['period']:.2f}", *delays, f"{slowest['start']} to {slowest['end']}"))
    return rows


def _peer_rows(pe: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [(name, f"{peer['area']:,.0f}", f"{peer['ratio']:.2f}") for name, peer in pe["peers"].items()]


def lines(result: Mapping[str, Any]) -> list[str]:
    """The result as text: a line a block, then totals."""
    periods = {row[0]: row[1] for row in _path_rows(result)}
    found = [f"{'block':<32}{'number':>8}{'um2':>14}{'GE':>12}{'period ns':>11}"]
    for name, number, area, gates, *_ in _area_rows(result):
        found.append(f"{name:<32}{number:>8}{area:>14}{gates:>12}{periods.get(name, ''):>11}")
    return [*found, *_summary(result)]


def _summary(result: Mapping[str, Any]) -> list[str]:
    totals, pe = result["totals"], result["pe"]
    found = [
        f"{result['config']} in {result['library']}: {totals['area'] / 1e6:.3f} mm2 of gates "
        f"({totals['area'] / result['nand2_area'] / 1e3:,.0f} kGE), {totals['sram_bits'] / 8192:,.0f} KiB in "
        f"{totals['sram_instances']:,} SRAM macros (not in the area)",
        "zero-skip controllers, encoder, decoders and dynamic controller: "
        f"{totals['skipping_of_cores']:.1%} of the cores",
        f"PE by the flow of its peers: {pe['area']:,.0f} um2, {pe['ge']:,.0f} GE",
    ]
    if "of_prototype" in pe:
        found.append(
            f"  {pe['of_prototype']:.2f} of the prototype, {pe['fp8_product_of_redmule']:.2f} of a RedMulE compute "
            "element for each FP8 product a cycle"
        )
    return found


def render_report(result: Mapping[str, Any]) -> str:
    """The page of HTML."""
    totals, pe = result["totals"], result["pe"]
    chip = next(iter(result["blocks"].values()))
    cards = [
        card(f"{totals['area'] / 1e6:.2f} mm2", "gates, without SRAM macros, wires and clock tree"),
        card(f"{totals['area'] / result['nand2_area'] / 1e3:,.0f} kGE", "in two-input NANDs"),
        card(f"{totals['sram_bits'] / 8192:,.0f} KiB", f"of SRAM in {totals['sram_instances']:,} macros"),
        card(f"{totals['skipping_of_cores']:.1%}", "zero skipping and FGMP against the cores"),
    ]
    if chip.get("period"):
        cards.append(card(f"{chip['period']:.2f} ns", "slowest path in the chip, to or from SRAM without its own time"))
    parts = [in_a_row(cards)]
    parts.append(
        section(
            "Area",
            "Every module's own gates, of all its instances together. SRAM macros are counted apart.",
            image("Area by module", *treemap(result)),
            table(_AREA, _area_rows(result)),
        )
    )
    if rows := _path_rows(result):
        explanation = (
            "Slowest paths in ns by static timing analysis, each block with all that is in it, slowest block first. "
            "Gates are mapped for area and not sized; no wires, an ideal clock, reset is no path. SRAM macros take no "
            "time of their own: the period less the delay of a path is what a macro may take."
        )
        parts.append(section("Critical paths", explanation, table(_PATHS, rows)))
    if pe["peers"]:
        explanation = (
            f"The PE, {pe['area']:,.0f} um2 with all its registers, against units of others by the same flow: "
            "areas in um2, and the PE's area over theirs."
        )
        parts.append(section("The PE and its peers", explanation, table(("unit", "um2", "PE over it"), _peer_rows(pe))))
    return page(f"Area and timing of LNPU, configuration {result['config']}, {result['library']}", parts)


def write_report(path: Path, result: Mapping[str, Any]) -> Sequence[str]:
    """Write the page; the lines to print."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render_report(result))
    return lines(result)
