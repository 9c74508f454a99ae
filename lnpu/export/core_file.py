"""The FuseSoC core file of a chip."""

from collections.abc import Sequence

from lnpu.config import ChipConfig

__all__ = ["VERSION", "core_file"]

VERSION = "0.1.0"


def core_file(config: ChipConfig, rtl: Sequence[str], sram: Sequence[str], clock: Sequence[str]) -> str:
    """`lnpu.core` (CAPI2) for a folder of Verilog.

    Parameters
    ----------
    rtl, sram, clock : sequence of str
        Verilog files; the models of SRAM and clock gate, which wrappers of a foundry's cells replace. Relative to the
        core file.
    """

    def files(names: Sequence[str]) -> list[str]:
        return [f"      - {name}" for name in names]

    return "\n".join(
        [
            "CAPI=2:",
            "",
            f"name: lnpu:lnpu:{config.name}:{VERSION}",
            f"description: LNPU training processor, configuration {config.name} (generated)",
            "",
            "filesets:",
            "  rtl:",
            "    file_type: verilogSource",
            "    files:",
            *files(rtl),
            "  sram:  # replace by a wrapper of foundry macros",
            "    file_type: verilogSource",
            "    files:",
            *files(sram),
            "  clock:  # replace by a wrapper of a foundry's clock gate",
            "    file_type: verilogSource",
            "    files:",
            *files(clock),
            "  lint_waivers:",
            "    file_type: vlt",
            "    files:",
            *files(["lint_waivers.vlt"]),
            "  constraints:",
            "    file_type: SDC",
            "    files:",
            *files(["lnpu.sdc"]),
            "",
            "targets:",
            "  default:",
            "    filesets: [rtl, sram, clock, constraints]",
            "    toplevel: lnpu_chip",
            "  lint:",
            "    flow: lint",
            "    flow_options:",
            "      tool: verilator",
            "      verilator_options: [-Wall, --no-timing]",
            "    filesets: [lint_waivers, rtl, sram, clock]",
            "    toplevel: lnpu_chip",
            "",
        ]
    )
