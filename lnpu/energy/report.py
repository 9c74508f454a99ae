"""The page of HTML of an energy run, and its lines of text."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lnpu.energy.account import COMPONENTS
from lnpu.energy.efficiency import PUBLISHED
from lnpu.energy.memory import DRAM_BIT, NODE_65, Node
from lnpu.energy.run import totals
from lnpu.energy.step import VARIANTS
from lnpu.page import GRID, card, image, in_a_row, legend, new_figure, number, page, section, table

__all__ = ["lines", "render_report", "write_report"]

_LABELS = {
    "dense": "dense FP16",
    "precision": "+ FP8 pairs",
    "skipping": "+ zero skipping",
    "fgmp": "+ encoded memory (as built)",
}
_COLOURS = ("#0072b2", "#56b4e9", "#666666", "#999999", "#cccccc", "#009e73", "#f0e442", "#cc79a7", "#d55e00")


def bars(report: dict[str, Any], scale: float = 1.0, *, memory: bool = True) -> tuple[Figure, float]:
    """Millijoules an image of every variant by component; the chip's parts times `scale`."""
    figure, (axis,) = new_figure(3.8)
    batch = report["settings"]["batch"]
    left = [0.0] * len(VARIANTS)
    places = list(range(len(VARIANTS)))[::-1]
    for (name, label), colour in zip(COMPONENTS.items(), _COLOURS, strict=True):
        if name == "memory" and not memory:
            continue
        factor = 1e3 / batch * (1.0 if name == "memory" else scale)
        values = [report["energies"][variant][name] * factor for variant in VARIANTS]
        axis.barh(places, values, left=left, height=0.6, color=colour, label=label)
        left = [a + b for a, b in zip(left, values, strict=True)]
    for place, total in zip(places, left, strict=True):
        axis.annotate(
            f" {total:.3g} mJ, {left[0] / total:.2f}x", (total, place), va="center", fontsize=9, annotation_clip=False
        )
    axis.set_yticks(places, [_LABELS[name] for name in VARIANTS])
    axis.set_xlim(0, 1.2 * max(left))
    axis.set_xlabel("mJ an image")
    axis.grid(axis="x", color=GRID)
    legend(axis, 5)
    return figure, 10


def _event_rows(report: dict[str, Any]) -> Iterable[tuple[str, str, str]]:
    def pj(joules: float) -> str:
        return f"{joules * 1e12:.3g}"

    pe, core, coding = (report["events"][name] for name in ("pe", "core", "coding"))
    yield "PE: FP16 product (a cycle, clock included)", pj(pe["fp16"]), "measured"
    yield "PE: two FP8 products (a cycle, clock included)", pj(pe["pair"]), "measured"
    yield "PE: idle cycle, clock running", pj(pe["idle"]), "measured"
    yield "PE: restart of its sum", pj(pe["load"]), "measured"
    yield "flip-flop: clock, a cycle", pj(report["events"]["flip_flop"]), "measured"
    labels = {
        "idle": "idle cycle, clock gated", "clock": "cycle of its clock",
        "visit": "visit (a row of 64 without elements)", "fp16": "FP16 element issued",
        "pair": "cycle with FP8 elements", "fp16_masked": "FP16 element issued, lane masked",
        "pair_masked": "cycle with FP8 elements, lane masked", "fill": "element written to a buffer",
    }  # fmt: skip
    for name, label in labels.items():
        yield f"core, shared part: {label}", pj(core[name]["core"]), "measured"
        yield f"core, a lane: {label}", pj(core[name]["lane"]), "measured"
    for way in ("encoded", "decoded"):
        for kind, label in (("zero", "zero"), ("fp8", "FP8"), ("fp16", "FP16")):
            yield f"element {way}: {label}", pj(coding[f"{way}_{kind}"]), "measured"
    yield (
        "skipped zero, its share of a visit of 64 elements half of which are zeros",
        pj(core["visit"]["core"] / 32),
        "derived",
    )
    yield "external memory, a bit", pj(DRAM_BIT), "cited"


def lines(report: dict[str, Any]) -> list[str]:
    """The main figures."""
    node = Node(**report["node"])
    found = [f"{report['library']}, {report['node']['size']:g} nm, {report['voltage']:g} V"]
    found += [f"{label:<64}{value:>9} pJ  {kind}" for label, value, kind in _event_rows(report)]
    batch = report["settings"]["batch"]
    for name in VARIANTS:
        whole = totals(report["energies"][name], node)
        ratio = report["ratios"]["as_built"][name]
        ungated = report["ratios"]["ungated"][name]
        found.append(
            f"{_LABELS[name]:<30}{whole['chip'] / batch * 1e3:10.3g} mJ an image on the chip ({ratio['chip']:.2f}x); "
            f"{whole['system_65'] / batch * 1e3:.3g} mJ at 65 nm with memory ({ratio['system_65']:.2f}x); "
            f"without clock gates {ungated['chip']:.2f}x, {ungated['system_65']:.2f}x"
        )
    for row in report["peak"]:
        found.append(
            f"{row['precision']} {row['sparsity']:4.0%} zeros: {row['counted_65']:.3g} TFLOPS/W at 65 nm with skipped "
            f"operations counted, {row['done_65']:.3g} without"
        )
    training = report["training"]
    found.append(
        f"training at 65 nm with memory: {training['value']:.3g} TFLOPS/W, {training['v100_achieved']:.2f}x a V100 "
        f"that trains, {training['v100_peak']:.2f}x its peak"
    )
    reached = report["ratios"]["as_built"]["fgmp"]["chip"]
    verdict = "reached" if reached >= report["required"] else "NOT reached"
    found.append(
        f"dense FP16 over FGMP with zero skipping: {reached:.2f}x on the chip, {report['required']}x {verdict}"
    )
    return found


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write the page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render_report(report))


def render_report(report: dict[str, Any]) -> str:
    """The page of HTML."""
    node = Node(**report["node"])
    ratios = report["ratios"]["as_built"]
    reached = ratios["fgmp"]["chip"]
    settings = report["settings"]
    batch = settings["batch"]
    required = report["required"]
    cards = in_a_row(
        [
            card(
                f"{reached:.2f}x", f"dense FP16 over FGMP and zero skipping, the chip; {required}x wanted",
                "good" if reached >= required else "bad",
            ),
            card(f"{ratios['fgmp']['system_65']:.2f}x", "with external memory, chip at 65 nm"),
            card(f"{report['ratios']['ungated']['fgmp']['chip']:.2f}x", "the chip, if clocks of idle cores ran"),
            card(f"{report['training']['value']:.3g} TFLOPS/W", "training at 65 nm, with external memory"),
        ]
    )  # fmt: skip
    scale = node.scale_to(NODE_65)
    rows = []
    for name in VARIANTS:
        one = report["energies"][name]
        rows.append(
            (
                _LABELS[name],
                *(f"{one[part] / batch * 1e3:.4g}" for part in COMPONENTS),
                f"{ratios[name]['chip']:.2f}x",
                f"{ratios[name]['system_65']:.2f}x",
            )
        )
    headings = ("mJ an image", *COMPONENTS.values(), "chip", "system, 65 nm")
    checks = [
        (name, number(one["cycles"]), number(one["visit"]), f"{one['measured'] * 1e9:.4g}",
         f"{one['modelled'] * 1e9:.4g}", f"{one['modelled'] / one['measured'] - 1:+.1%}")
        for name, one in report["events"]["core"]["checked"].items()
    ]  # fmt: skip
    peak = [
        (row["precision"].upper(), f"{row['sparsity']:.0%}",
         *(f"{row[key]:.3g}" for key in ("counted", "done", "counted_65", "done_65")))
        for row in report["peak"]
    ]  # fmt: skip
    published = [
        (one.name, one.what, "-" if one.node is None else f"{one.node.size:g} nm, {one.node.voltage:g} V",
         f"{one.value:.3g}", "-" if one.at_65 is None else f"{one.at_65:.3g}")
        for one in PUBLISHED
    ]  # fmt: skip
    library = f"{report['library']}, {node.size:g} nm, {node.voltage:g} V"
    parts = [
        cards,
        section(
            "A training step",
            f"ResNet-18, width {settings['width']}, {settings['image']}x{settings['image']}, batch {batch}, on "
            f"{report['config']['name']}; {library}. Each variant has one thing more than the one above.",
            image("Energy by component", *bars(report, memory=False)),
            table(headings, rows, row_class=lambda row: "total" if row == len(rows) - 1 else ""),
        ),
        section(
            "The same at 65 nm, with external memory",
            "The chip's parts scaled by L V^2; external memory as it is.",
            image("Energy with external memory", *bars(report, scale)),
        ),
        section(
            "Events",
            f"Gates of {library}: picojoules. Without wires, glitches and a clock tree.",
            table(("event", "pJ", ""), list(_event_rows(report)), text_columns=1),
        ),
        section(
            "Check of the events",
            "Energy of tiles with zeros, in the core's gates, against visits and elements times their energies (nJ).",
            table(("tile", "cycles", "visits", "gates", "events", "difference"), checks),
        ),
        section(
            "Busy cores",
            "TFLOPS/W of busy cores with operands in their buffers, skipped operations counted or not; no loads, no "
            "external memory.",
            table(
                ("precision", "zeros", "counted", "not counted", "counted, 65 nm", "not counted, 65 nm"),
                peak,
                text_columns=1,
            ),
            table(("published", "what", "technology", "TFLOPS/W", "at 65 nm by L V^2"), published, text_columns=3),
        ),
    ]
    return page(f"Energy of LNPU in {report['library']}", parts)
