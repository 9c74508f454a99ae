"""SRAM macros: the instances of `lnpu_sram_1r1w` in a design, each size of them as a black box of its own name."""

import re
from dataclasses import dataclass

__all__ = ["Macro", "macro_of", "name_macros"]

_INSTANCE = re.compile(r"\blnpu_sram_1r1w\s*#\(([^;]*?)\)\s*(\w+|\\\S+ )\s*\(")
_PARAMETER = re.compile(r"\.(\w+)\(\s*(?:\d+'[sS]?d)?(\d+)\s*\)")


@dataclass(frozen=True, order=True)
class Macro:
    """An SRAM of one read and one write port.

    Attributes
    ----------
    depth : int
        Words.
    width : int
        Bits of a word.
    granularity : int
        Bits per write enable.
    """

    depth: int
    width: int
    granularity: int

    @property
    def name(self) -> str:
        """As a module: `lnpu_sram_<depth>x<width>`, with `_<granularity>` where there are several write enables."""
        part = f"_{self.granularity}" if self.granularity != self.width else ""
        return f"lnpu_sram_{self.depth}x{self.width}{part}"

    @property
    def bits(self) -> int:
        return self.depth * self.width

    @property
    def ports(self) -> dict[str, tuple[str, int]]:
        """Direction and width of every port."""
        address = (self.depth - 1).bit_length()
        return {
            "clk": ("input", 1),
            "w_en": ("input", self.width // self.granularity),
            "w_addr": ("input", address),
            "w_data": ("input", self.width),
            "r_en": ("input", 1),
            "r_addr": ("input", address),
            "r_data": ("output", self.width),
        }

    def _header(self) -> str:
        ports = ", ".join(f"{direction} wire [{width - 1}:0] {name}" for name, (direction, width) in self.ports.items())
        return f"module {self.name} ({ports});\n".replace(" [0:0]", "")

    def black_box(self) -> str:
        """Verilog of the empty module."""
        return f"(* blackbox *)\n{self._header()}endmodule\n"

    def model(self) -> str:
        """Verilog of the module, by way of the model in rtl/sram/."""
        parameters = {
            "DEPTH": self.depth,
            "WIDTH": self.width,
            "GRANULARITY": self.granularity,
            "ADDR_BITS": (self.depth - 1).bit_length(),
        }
        values = ", ".join(f".{name}({value})" for name, value in parameters.items())
        pins = ", ".join(f".{name}({name})" for name in self.ports)
        return f"{self._header()}    lnpu_sram_1r1w #({values}) sram ({pins});\nendmodule\n"


def macro_of(parameters: str) -> Macro:
    """The macro of an instance of `lnpu_sram_1r1w`, from the parameters that its Verilog gives it."""
    values = {name: int(value) for name, value in _PARAMETER.findall(parameters)}
    return Macro(depth=values["DEPTH"], width=values["WIDTH"], granularity=values["GRANULARITY"])


def name_macros(verilog: str) -> tuple[str, set[Macro]]:
    """Let every instance of `lnpu_sram_1r1w` name a module of its size; the new text, and the sizes."""
    found = set()

    def replace(match: re.Match[str]) -> str:
        macro = macro_of(match[1])
        found.add(macro)
        return f"{macro.name} {match[2]} ("

    return _INSTANCE.sub(replace, verilog), found
