"""A core with a gated clock beside one whose clock runs, on the same inputs."""

from amaranth.hdl import Cat, Module, Value
from amaranth.lib.wiring import In, Out

from lnpu.config import ChipConfig
from lnpu.core.core import Core
from lnpu.core.gated_core import GatedCore
from lnpu.hdl import Block, place

__all__ = ["CoreTwins"]


class CoreTwins(Block):
    """Ports of a `Core`, and two more; the outputs are those of the one with the gated clock.

    Parameters
    ----------
    config : ChipConfig
    without : str or None
        A defect of the gate: one of `GatedCore.causes` that it does not know.

    Members
    -------
    compare_psum : In(1)
        Partial sums have been written: `psum` is compared too.
    differ : Out(1)
        An output is not that of the core with the running clock.
    """

    def __init__(self, *, config: ChipConfig, without: str | None = None) -> None:
        self.config = config
        self.twins = {"gated": _DeafCore(config=config, without=without), "free": Core(config=config)}
        super().__init__({**self.twins["free"].signature.members, "compare_psum": In(1), "differ": Out(1)})

    def elaborate(self, platform):
        m = Module()
        gated, free = (place(m, name, core) for name, core in self.twins.items())
        mine = {path: value for path, _, value in self.signature.flatten(self)}
        differ = []
        for (path, member, one), (*_, other) in zip(
            gated.signature.flatten(gated), free.signature.flatten(free), strict=True
        ):
            port, one, other = (Value.cast(value) for value in (mine[path], one, other))
            if member.flow is In:
                m.d.comb += [one.eq(port), other.eq(port)]
            else:
                m.d.comb += port.eq(one)
                differ.append((one != other) & (self.compare_psum | (path[0] != "psum")))
        m.d.comb += self.differ.eq(Cat(differ).any())
        return m


class _DeafCore(GatedCore):
    """A `GatedCore` that does not know one of the causes."""

    def __init__(self, *, config: ChipConfig, without: str | None) -> None:
        super().__init__(config=config)
        self.without = without

    def causes(self) -> dict[str, Value]:
        return {name: cause for name, cause in super().causes().items() if name != self.without}
