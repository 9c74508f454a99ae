"""The SRAMs of a chip, counted in its Verilog."""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from lnpu.synth.macros import Macro, macro_of
from lnpu.toolchain import CLOCK_GATE

__all__ = ["sram_table", "srams"]

_MODULE = re.compile(r"^module (\S+?)\s*\((.*?)^endmodule", re.MULTILINE | re.DOTALL)
_INSTANCE = re.compile(r"^  (lnpu_\w+) (?:#\((.*?)\n  \) )?(?:\\\S+ |\w+) ?\(", re.MULTILINE | re.DOTALL)


def srams(files: Iterable[Path], top: str = "lnpu_chip") -> Counter[Macro]:
    """How many SRAM macros of each size there are under module `top`."""
    direct: dict[str, Counter[Macro]] = {}
    children: dict[str, Counter[str]] = {}
    for path in files:
        for name, body in _MODULE.findall(path.read_text()):
            direct[name], children[name] = Counter(), Counter()
            for module, parameters in _INSTANCE.findall(body):
                if module == "lnpu_sram_1r1w":
                    direct[name][macro_of(parameters)] += 1
                elif module != CLOCK_GATE.stem:
                    children[name][module] += 1
    if top not in direct:
        raise ValueError(f"top must be one of the modules, not {top!r}")
    found: dict[str, Counter[Macro]] = {}

    def count(module: str) -> Counter[Macro]:
        if module not in found:
            total = Counter(direct[module])
            for child, times in children[module].items():
                for shape, number in count(child).items():
                    total[shape] += times * number
            found[module] = total
        return found[module]

    return count(top)


def sram_table(shapes: Counter[Macro], name: str) -> str:
    """`SRAMS.md`: a table of them, with sums."""
    bits = {shape: shape.bits * number for shape, number in shapes.items()}
    return "\n".join(
        [
            f"# SRAMs of lnpu_chip, configuration {name}",
            "",
            "Each is an instance of `lnpu_sram_1r1w`: one write port, one read port, one clock.",
            "",
            "| DEPTH | WIDTH | GRANULARITY | write enables | instances | Kibit |",
            "|---|---|---|---|---|---|",
            *(
                f"| {s.depth} | {s.width} | {s.granularity} | {s.width // s.granularity} | {n} | {bits[s] / 1024:g} |"
                for s, n in sorted(shapes.items(), reverse=True)
            ),
            f"| | | | | {sum(shapes.values())} | {sum(bits.values()) / 1024:g} |",
            "",
        ]
    )
