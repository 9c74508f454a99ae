"""The interconnect and the RAM of the example system, with two masters' ports and the slave's stalls to choose."""

from amaranth.hdl import Cat, ClockSignal, Instance, Module, ResetSignal, Signal
from amaranth.lib.wiring import In, Out

from lnpu.hdl import Block, place
from lnpu.mem.fifo import RegisterFifo

__all__ = ["AxiSystem"]

ADDRESS, DATA, ID = 32, 64, 1
_WRITES_AHEAD = 32
"""More than the interconnect may grant."""

_REQUESTS = {"ar": ("addr", "len", "id"), "aw": ("addr", "len", "id"), "w": ("data", "strb", "last")}
_RESPONSES = {"r": ("data", "resp", "last", "id"), "b": ("resp", "id")}
_WIDTHS = {"addr": ADDRESS, "len": 8, "data": DATA, "strb": DATA // 8, "last": 1, "resp": 2}


class AxiSystem(Block):
    """`examples/soc/axi_interconnect.v` on `examples/soc/axi_ram.v`.

    Parameters
    ----------
    log2_bytes : int
        Size of the RAM.

    Members
    -------
    m_arvalid, ... : as in `axi_interconnect.v`
        Ports of the masters; field m of each belongs to master m.
    slave_arready, ... : In(1)
        While 0, no transfer of that channel passes between interconnect and RAM.
    """

    def __init__(self, *, log2_bytes: int) -> None:
        self.log2_bytes = log2_bytes
        members = {}
        for channel, fields in _REQUESTS.items():
            members |= {f"m_{channel}valid": In(2), f"m_{channel}ready": Out(2)}
            members |= {f"m_{channel}{field}": In(2 * _WIDTHS.get(field, ID)) for field in fields}
        for channel, fields in _RESPONSES.items():
            members |= {f"m_{channel}valid": Out(2), f"m_{channel}ready": In(2)}
            members |= {f"m_{channel}{field}": Out(_WIDTHS.get(field, ID)) for field in fields}
        members |= {f"slave_{channel}go": In(1) for channel in (*_REQUESTS, *_RESPONSES)}
        super().__init__(members)

    def elaborate(self, platform):
        m = Module()
        fabric, ram = {}, {}
        for name, member in self.signature.members.items():
            if name.startswith("m_"):
                fabric[f"{'i' if member.flow is In else 'o'}_{name}"] = getattr(self, name)
        for channels, outward in ((_REQUESTS, True), (_RESPONSES, False)):
            for channel, fields in channels.items():
                source, target = ("o_s_", "i_") if outward else ("i_s_", "o_")
                giver, taker = (fabric, ram) if outward else (ram, fabric)
                for field in fields:
                    wire = Signal(ID + 1 if field == "id" else _WIDTHS[field], name=f"s_{channel}{field}")
                    fabric[f"{source}{channel}{field}"] = wire
                    ram[f"{target}{channel}{field}"] = wire
                go = getattr(self, f"slave_{channel}go")
                valid, ready = Signal(name=f"s_{channel}valid"), Signal(name=f"s_{channel}ready")
                prefixes = ("s_", "") if outward else ("", "s_")
                giver[f"o_{prefixes[0]}{channel}valid"] = valid
                giver[f"i_{prefixes[0]}{channel}ready"] = ready & go
                if channel == "aw":
                    self._queue(m, ram, valid & go, ready)
                else:
                    taker[f"i_{prefixes[1]}{channel}valid"] = valid & go
                    taker[f"o_{prefixes[1]}{channel}ready"] = ready
        widths = {"p_ADDR_BITS": ADDRESS, "p_DATA_BITS": DATA}
        clocks = {"i_clk": ClockSignal(), "i_rst": ResetSignal()}
        m.submodules.fabric = Instance("axi_interconnect", **widths, p_ID_BITS=ID, **clocks, **fabric)
        m.submodules.ram = Instance(
            "axi_ram", **widths, p_ID_BITS=ID + 1, p_LOG2_BYTES=self.log2_bytes, **clocks, **ram
        )
        return m

    def _queue(self, m, ram, valid, ready):
        """Write addresses wait for the RAM, so that the interconnect grants many whose data are still to come."""
        ports = [f"i_aw{field}" for field in _REQUESTS["aw"]]
        fields = [ram[port] for port in ports]
        queue = place(m, "queue", RegisterFifo(shape=sum(map(len, fields)), depth=_WRITES_AHEAD))
        waiting = [Signal.like(field, name=f"queue_{port}") for port, field in zip(ports, fields, strict=True)]
        m.d.comb += [
            queue.i.payload.eq(Cat(fields)),
            queue.i.valid.eq(valid),
            ready.eq(queue.i.ready),
            Cat(waiting).eq(queue.o.payload),
        ]
        ram |= dict(zip(ports, waiting, strict=True)) | {
            "i_awvalid": queue.o.valid,
            "o_awready": queue.o.ready,
        }
