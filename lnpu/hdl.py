"""Placement and emission of Verilog modules: every distinct module is emitted once.

Amaranth elaborates a submodule anew for every use, so an array of 256 PEs would become 256 copies of the same text.
Here a component that is worth a module of its own derives from `Block`, its parent places it with `place()`, and the
parent's netlist then holds a plain instance. `emit_verilog()` converts each distinct module once, into a file of its
own name.
"""

import re
from pathlib import Path

from amaranth.back import rtlil
from amaranth.back.verilog import _convert_rtlil_text
from amaranth.hdl import ClockSignal, Const, Elaboratable, Instance, ResetSignal, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import Out

__all__ = ["Block", "ClockGate", "Placed", "Sram", "emit_verilog", "place"]


class Block(wiring.Component):
    """A component that is emitted as one Verilog module, however often it is placed.

    Subclasses whose interface or behaviour depends on parameters return a `suffix` that tells the variants apart.

    Attributes
    ----------
    combinational : bool
        True where the module has no register, hence no clock and reset ports.
    """

    combinational: bool = False

    @property
    def suffix(self) -> str:
        """What distinguishes this variant from others of its class ("" if there is only one in a chip)."""
        return ""

    @property
    def module_name(self) -> str:
        """Verilog module name: `lnpu_`, the class name in snake case, and the suffix."""
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__).lower()
        return f"lnpu_{name}" + (f"_{self.suffix}" if self.suffix else "")


class Placed(Elaboratable):
    """One instance of a `Block` in its parent; has the module's ports as attributes."""

    def __init__(self, module: Block, label: str, clock: Value | None = None) -> None:
        self.module = module
        self._clock = ClockSignal() if clock is None else clock
        self.signature = module.signature
        for name, value in self.signature.members.create(path=(label,)).items():
            setattr(self, name, value)

    def elaborate(self, platform):
        ports = {}
        if not self.module.combinational:
            ports.update(i_clk=self._clock, i_rst=ResetSignal())
        for path, member, value in self.signature.flatten(self):
            direction = "o" if member.flow is Out else "i"
            ports[f"{direction}_{'__'.join(map(str, path))}"] = value
        _placed.setdefault(self.module.module_name, self.module)
        return Instance(self.module.module_name, **ports)


_placed: dict[str, Block] = {}


def place(m, name: str, module: Block, *, clock: Value | None = None) -> Placed:
    """Add an instance of `module` to `m` as submodule `name` and return it; `clock` is the parent's unless given."""
    module._MustUse__used = True  # it is elaborated once, when it is emitted, not here
    placed = Placed(module, name, clock)
    m.submodules[name] = placed
    return placed


class Sram(wiring.Component):
    """One-read one-write synchronous SRAM macro (`rtl/sram/lnpu_sram_1r1w.v`).

    Read data is valid the cycle after `r_en` and then holds. A read of the word being written in the same cycle
    returns the old word in this project's model and anything in a macro.

    Parameters
    ----------
    depth : int
        Number of words.
    width : int
        Bits in a word.
    granularity : int or None
        Bits per write-enable bit (default: the whole word).

    Members
    -------
    w_en : In(width // granularity); w_addr : In(range(depth)); w_data : In(width)
    r_en : In(1); r_addr : In(range(depth)); r_data : Out(width)
    """

    def __init__(self, *, depth: int, width: int, granularity: int | None = None) -> None:
        if depth < 2:
            raise ValueError(f"depth must be at least 2, not {depth!r}")
        if width < 1:
            raise ValueError(f"width must be at least 1, not {width!r}")
        granularity = width if granularity is None else granularity
        if granularity < 1 or width % granularity:
            raise ValueError(f"granularity must divide the width {width}, not {granularity!r}")
        self.depth, self.width, self.granularity = depth, width, granularity
        addr = (depth - 1).bit_length()
        super().__init__(
            {
                "w_en": wiring.In(width // granularity),
                "w_addr": wiring.In(addr),
                "w_data": wiring.In(width),
                "r_en": wiring.In(1),
                "r_addr": wiring.In(addr),
                "r_data": wiring.Out(width),
            }
        )

    def elaborate(self, platform):
        return Instance(
            "lnpu_sram_1r1w",
            p_DEPTH=self.depth,
            p_WIDTH=self.width,
            p_GRANULARITY=self.granularity,
            p_ADDR_BITS=(self.depth - 1).bit_length(),
            i_clk=ClockSignal(),
            i_w_en=self.w_en,
            i_w_addr=self.w_addr,
            i_w_data=self.w_data,
            i_r_en=self.r_en,
            i_r_addr=self.r_addr,
            o_r_data=self.r_data,
        )


class ClockGate(wiring.Component):
    """Clock gate (`rtl/clock/lnpu_clock_gate.v`): passes a pulse of the clock, or not.

    Members
    -------
    enable : In(1)
        The clock's edge at the end of this cycle shall pass.
    gated_clk : Out(1)
        To be the `clock` of a block that is placed.
    """

    def __init__(self) -> None:
        super().__init__({"enable": wiring.In(1), "gated_clk": wiring.Out(1)})

    def elaborate(self, platform):
        return Instance(
            "lnpu_clock_gate",
            i_clk=ClockSignal(),
            i_enable=self.enable,
            i_test_enable=Const(0, 1),
            o_gated_clk=self.gated_clk,
        )


def emit_verilog(top: Block, directory: Path) -> list[Path]:
    """Write `top` and every module below it to `directory`, one file a module; return the files, top first.

    Files whose content would not change are left alone; stale `lnpu_*.v` files are removed.
    """
    _placed.clear()
    _placed[top.module_name] = top
    netlists: dict[str, str] = {}
    while pending := [name for name in _placed if name not in netlists]:
        for name in pending:
            netlists[name] = rtlil.convert(_placed[name], name=name, emit_src=False)
    # One run of Yosys for all modules: starting it takes longer than converting one.
    text = _convert_rtlil_text("\n".join(netlists.values()), strip_internal_attrs=True)
    # Amaranth names a nested submodule "parent.child", which needs an escaped identifier.
    text = re.sub(r"\\([A-Za-z_]\w*(?:\.\w+)+) ", lambda match: match[1].replace(".", "_") + " ", text)
    modules: dict[str, str] = {}
    for match in re.finditer(r"^(?:\(\*.*\*\)\n)*module (\w+) *\(.*?^endmodule\n", text, re.MULTILINE | re.DOTALL):
        owner = max((name for name in netlists if match[1] == name or match[1].startswith(f"{name}_")), key=len)
        modules[owner] = modules.get(owner, "") + match[0]
    directory.mkdir(parents=True, exist_ok=True)
    files = []
    for name in netlists:
        path = directory / f"{name}.v"
        # The backend numbers its helper signals over the whole run; by module they do not depend on the others.
        content = _HEADER + re.sub(r"\$auto\$verilog_backend\.cc:\d+:dump_module\$\d+", "$initial", modules[name])
        if not path.exists() or path.read_text() != content:
            path.write_text(content)
        files.append(path)
    for stale in set(directory.glob("lnpu_*.v")) - set(files):
        stale.unlink()
    return files


_HEADER = "// Generated by Amaranth from the sources in lnpu/: do not edit.\n\n"
