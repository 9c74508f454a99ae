"""The store of a core's exact partial sums."""

from amaranth.hdl import Module
from amaranth.lib.wiring import In, Out

from lnpu.config import ChipConfig
from lnpu.formats import psum_layout
from lnpu.hdl import Block, Sram

__all__ = ["PsumStore"]


class PsumStore(Block):
    """`psum_rows` rows of `lanes` exact partial sums, one row read and one written a cycle.

    A read of the row that is written in the same cycle returns the old one.

    Parameters
    ----------
    config : ChipConfig
        Its `psum_rows`, `lanes` and `acc_bits`.

    Members
    -------
    write_enable : In(1); write_row : In(range(psum_rows)); write : In(psum_layout(acc_bits)).array(lanes)
    read_enable : In(1); read_row : In(range(psum_rows))
    read : Out(psum_layout(acc_bits)).array(lanes)
        From the cycle after `read_enable` until the next one.
    """

    def __init__(self, *, config: ChipConfig) -> None:
        self.config = config
        row = (config.psum_rows - 1).bit_length()
        psum, lanes = psum_layout(config.acc_bits), config.lanes
        super().__init__(
            {
                "write_enable": In(1),
                "write_row": In(row),
                "write": In(psum).array(lanes),
                "read_enable": In(1),
                "read_row": In(row),
                "read": Out(psum).array(lanes),
            }
        )

    @property
    def suffix(self) -> str:
        return f"{self.config.psum_rows}x{self.config.lanes}x{self.config.acc_bits}"

    def elaborate(self, platform):
        m = Module()
        width = psum_layout(self.config.acc_bits).size
        for n in range(self.config.lanes):
            m.submodules[f"lane_{n}"] = sram = Sram(depth=self.config.psum_rows, width=width)
            m.d.comb += [
                sram.w_en.eq(self.write_enable),
                sram.w_addr.eq(self.write_row),
                sram.w_data.eq(self.write[n]),
                sram.r_en.eq(self.read_enable),
                sram.r_addr.eq(self.read_row),
                self.read[n].eq(sram.r_data),
            ]
        return m
