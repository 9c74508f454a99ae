"""Timing constraints (SDC) of the chip as a block."""

from amaranth.hdl import Shape
from amaranth.lib.wiring import Out

from lnpu.config import ChipConfig
from lnpu.hdl import Block

__all__ = ["sdc"]


def sdc(config: ChipConfig, top: Block) -> str:
    """`lnpu.sdc`: one clock, delays of all other ports of `top` as parts of its period, no exceptions.

    The period and the other figures are variables at the head: starting points, not results of a layout.
    """
    inputs: list[str] = ["rst"]
    outputs: list[str] = []
    for path, member, _ in top.signature.flatten(top):
        name = "__".join(map(str, path))
        bus = "[*]" if Shape.cast(member.shape).width > 1 else ""
        (outputs if member.flow is Out else inputs).append(name + bus)
    return f"""# Timing constraints of {top.module_name}, configuration {config.name}. Generated.
# Set these for your process and system; times and capacitances are in the units of your library.
set period 10.0
set uncertainty [expr {{0.05 * $period}}]
set input_delay [expr {{0.40 * $period}}]
set output_delay [expr {{0.40 * $period}}]
set input_transition 0.10
set output_load 0.02

create_clock -name clk -period $period [get_ports clk]
set_clock_uncertainty $uncertainty [get_clocks clk]
# It goes through the clock gates of the cores, whose cells bring the checks of their enables.

# Everything is synchronous to clk, rst too: no false paths, no multicycle paths.
set inputs [get_ports {{
{_lines(inputs)}
}}]
set outputs [get_ports {{
{_lines(outputs)}
}}]
set_input_delay $input_delay -clock clk $inputs
set_input_transition $input_transition $inputs
set_output_delay $output_delay -clock clk $outputs
set_load $output_load $outputs
"""


def _lines(names: list[str]) -> str:
    return "\n".join(f"    {name}" for name in names)
