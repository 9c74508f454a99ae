"""Timing constraints (SDC) of the chip as a block."""

from lnpu.config import ChipConfig

__all__ = ["sdc"]


def sdc(config: ChipConfig) -> str:
    """`lnpu.sdc`: one clock, delays of all other ports as parts of its period, no exceptions.

    The period, in ns, and the other figures are variables at the top: starting points, not results of a layout.
    """
    return f"""# Timing constraints of lnpu_chip, configuration {config.name}. Generated; set the figures below for your system.
# Times in ns, capacitances in pF, as in the common open libraries; check with report_units.

set period 10.0
set uncertainty_part 0.05
set input_part 0.40
set output_part 0.40
set input_transition 0.10
set output_load 0.02

create_clock -name clk -period $period [get_ports clk]
set_clock_uncertainty [expr {{$uncertainty_part * $period}}] [get_clocks clk]

# Everything is synchronous to clk, `rst` too: there are no false and no multicycle paths.
set inputs [list]
foreach port [all_inputs] {{
    if {{[get_property $port full_name] ne "clk"}} {{ lappend inputs $port }}
}}
set_input_delay [expr {{$input_part * $period}}] -clock clk $inputs
set_input_transition $input_transition $inputs
set_output_delay [expr {{$output_part * $period}}] -clock clk [all_outputs]
set_load $output_load [all_outputs]
"""
