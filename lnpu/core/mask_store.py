"""The store of a core's masks: which partial sums are to be computed."""

from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import data
from amaranth.lib.wiring import In, Out

from lnpu.config import ChipConfig
from lnpu.core.page_write import page_write
from lnpu.hdl import Block, Sram
from lnpu.interfaces import buffer_write

__all__ = ["MaskStore"]


class MaskStore(Block):
    """Two pages of `psum_rows` x `lanes` bits, one for each partial sum.

    A row is begun by its beat at column 0, which clears the bits of all later columns; these get theirs from beats of
    their own. Until it is begun, a row is undefined. In a cycle each page takes a beat; at the same time a row is read,
    and of another one whether it has a bit set. A read that coincides with the write of the same row returns the old
    bits.

    Parameters
    ----------
    config : ChipConfig
        Its `psum_rows`, `lanes` and `beat`.

    Members
    -------
    write : In(ArrayLayout(buffer_write(config), 2))
        Every valid beat is written: `buffer` and `cores` are the core's business. Two in a cycle are of different
        pages; otherwise only the first is written.
    any_enable : In(1); any_page : In(1); any_row : In(range(psum_rows))
    any : Out(1)
        A bit of that row is set; from the cycle after `any_enable` until the next one.
    live_enable : In(1); live_page : In(1); live_row : In(range(psum_rows))
    live : Out(lanes)
        The bits of that row, from the cycle after `live_enable` until the next one.
    """

    def __init__(self, *, config: ChipConfig) -> None:
        self.config = config
        row = (config.psum_rows - 1).bit_length()
        super().__init__(
            {
                "write": In(data.ArrayLayout(buffer_write(config), 2)),
                "any_enable": In(1),
                "any_page": In(1),
                "any_row": In(row),
                "any": Out(1),
                "live_enable": In(1),
                "live_page": In(1),
                "live_row": In(row),
                "live": Out(config.lanes),
            }
        )

    @property
    def suffix(self) -> str:
        return f"{self.config.psum_rows}x{self.config.lanes}x{self.config.beat}"

    def elaborate(self, platform):
        m = Module()
        beat, rows = self.config.beat, self.config.psum_rows
        low = beat.bit_length() - 1
        groups = self.config.lanes // beat

        # Which page the rows on `any` and `live` are of.
        any_page, live_page = Signal(name="page_of_any", reset_less=True), Signal(name="page_of_live", reset_less=True)
        with m.If(self.any_enable):
            m.d.sync += any_page.eq(self.any_page)
        with m.If(self.live_enable):
            m.d.sync += live_page.eq(self.live_page)

        some, bits = [], []
        for page in range(2):
            valid, (row, column, mask) = page_write(m, self.write, page, "row", "column", "mask")
            group, begins = column[low:], Signal(name=f"begins_{page}")
            written = Signal(groups, name=f"groups_{page}")
            m.d.comb += begins.eq(group == 0)
            with m.If(valid):
                m.d.comb += written.eq(Mux(begins, -1, 1 << group))
            # Of each group of lanes, its bits, and whether one is set.
            later = Mux(begins, 0, mask)
            m.submodules[f"live_{page}"] = live = Sram(depth=rows, width=beat * groups, granularity=beat)
            m.submodules[f"any_{page}"] = any_ = Sram(depth=rows, width=groups, granularity=1)
            m.d.comb += [
                live.w_en.eq(written),
                live.w_addr.eq(row),
                live.w_data.eq(Cat(mask, later.replicate(groups - 1))),
                live.r_en.eq(self.live_enable & (self.live_page == page)),
                live.r_addr.eq(self.live_row),
                any_.w_en.eq(written),
                any_.w_addr.eq(row),
                any_.w_data.eq(Cat(mask.any(), later.any().replicate(groups - 1))),
                any_.r_en.eq(self.any_enable & (self.any_page == page)),
                any_.r_addr.eq(self.any_row),
            ]
            bits.append(live.r_data)
            some.append(any_.r_data.any())
        m.d.comb += [self.any.eq(Mux(any_page, some[1], some[0])), self.live.eq(Mux(live_page, bits[1], bits[0]))]
        return m
