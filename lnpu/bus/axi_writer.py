"""Writes of the chip's clients as AXI4 bursts."""

from amaranth.hdl import Module, Shape, Signal, unsigned
from amaranth.lib import data
from amaranth.lib.wiring import In, Out

from lnpu.bus.axi_reader import BurstSplitter
from lnpu.config import ChipConfig
from lnpu.hdl import Block, place
from lnpu.interfaces import axi_write_signature, memory_write_signature
from lnpu.mem.fifo import RegisterFifo

__all__ = ["AxiWriter", "writer_events_layout"]


def writer_events_layout() -> data.StructLayout:
    """What the writer reports to the counters each cycle: a data `beat` of a request of `kind` was taken."""
    return data.StructLayout({"beat": 1, "kind": 3})


class AxiWriter(Block):
    """AXI4 write master for several clients.

    Requests are taken from the clients in turn (round-robin) and cut into INCR bursts of at most `burst_beats` words
    that do not cross a 4 KiB boundary. At most `writes_in_flight` bursts are outstanding, all with ID 0. The data of
    the requests are taken in the order of the requests, so a client that has asked and gives no data makes the others
    wait, and so does a long request: clients that others shall not wait for ask for little at a time, and not far
    ahead. A burst's address is presented before its first word, whether or not the data are there; the memory may take
    them in either order.

    At best a burst is asked for in every cycle and a word is sent in every cycle, one cycle after it was taken. All
    AXI outputs are registers; BREADY is always set.

    Parameters
    ----------
    config : ChipConfig
        Widths, longest burst and number of outstanding bursts.
    clients : int
        Number of clients, 1 or more.

    Members
    -------
    client0, client1, ... : In(memory_write_signature(config))
        `request.words` must be 1 or more. `idle` falls in the cycle after a request was taken and rises in the cycle
        after the last of the client's bursts was acknowledged.
    axi : Out(axi_write_signature(config))
    error : Out(1)
        Set for a cycle for every acknowledgement other than OKAY, in the cycle after it (in which `idle` may rise).
    events : Out(writer_events_layout())
        Registered.
    """

    def __init__(self, *, config: ChipConfig, clients: int = 2) -> None:
        if not isinstance(clients, int) or clients < 1:
            raise ValueError(f"clients must be 1 or more, not {clients!r}")
        self.config, self.clients = config, clients
        super().__init__(
            {
                "axi": Out(axi_write_signature(config)),
                **{f"client{number}": In(memory_write_signature(config)) for number in range(clients)},
                "error": Out(1),
                "events": Out(writer_events_layout()),
            }
        )

    def elaborate(self, platform):
        m = Module()
        config, axi = self.config, self.axi
        clients = [getattr(self, f"client{number}") for number in range(self.clients)]
        client_shape = Shape.cast(range(self.clients))
        bursts = config.writes_in_flight

        # Bursts whose data have not all been sent, and bursts that have not been acknowledged.
        route_layout = data.StructLayout({"client": client_shape, "kind": 3, "length": 8})
        route = place(m, "route", RegisterFifo(shape=route_layout, depth=bursts))
        pending = place(m, "pending", RegisterFifo(shape=unsigned(max(client_shape.width, 1)), depth=bursts))
        head = route.o.payload

        # Address channel
        burst = BurstSplitter(config, [client.request for client in clients])
        burst.build(m)
        address, length = Signal(config.address_bits, reset_less=True), Signal(8, reset_less=True)
        asking = Signal()
        m.d.comb += [
            axi.awvalid.eq(asking),
            axi.awaddr.eq(address),
            axi.awlen.eq(length),
            axi.awsize.eq((config.axi_bits // 8).bit_length() - 1),
            axi.awburst.eq(0b01),
            axi.awcache.eq(0b0011),
            burst.take.eq(burst.valid & route.i.ready & pending.i.ready & (~asking | axi.awready)),
            route.i.payload.client.eq(burst.client),
            route.i.payload.kind.eq(burst.kind),
            route.i.payload.length.eq(burst.beats - 1),
            route.i.valid.eq(burst.take),
            pending.i.payload.eq(burst.client),
            pending.i.valid.eq(burst.take),
        ]
        with m.If(axi.awready):
            m.d.sync += asking.eq(0)
        with m.If(burst.take):
            m.d.sync += [asking.eq(1), address.eq(burst.address), length.eq(burst.beats - 1)]

        # Data channel
        word_layout = data.StructLayout({"data": config.axi_bits, "strobe": config.axi_bits // 8})
        word, last, sending = Signal(word_layout, reset_less=True), Signal(reset_less=True), Signal()
        beat = Signal(8)
        free, taken = Signal(), Signal(self.clients)
        m.d.comb += [
            axi.wvalid.eq(sending),
            axi.wdata.eq(word.data),
            axi.wstrb.eq(word.strobe),
            axi.wlast.eq(last),
            free.eq(~sending | axi.wready),
            route.o.ready.eq(taken.any() & (beat == head.length)),
        ]
        with m.If(axi.wready):
            m.d.sync += sending.eq(0)
        for number, client in enumerate(clients):
            m.d.comb += [
                client.data.ready.eq(free & route.o.valid & (head.client == number)),
                taken[number].eq(client.data.ready & client.data.valid),
            ]
            with m.If(taken[number]):
                m.d.sync += [word.eq(client.data.payload), sending.eq(1)]
        with m.If(taken.any()):
            m.d.sync += [last.eq(beat == head.length), beat.eq(beat + 1)]
        with m.If(route.o.ready):
            m.d.sync += beat.eq(0)

        # Acknowledgements
        m.d.comb += [axi.bready.eq(1), pending.o.ready.eq(axi.bvalid)]
        for number, client in enumerate(clients):
            outstanding = Signal(range(bursts + 1), name=f"outstanding_{number}")
            begun, ended = Signal(name=f"begun_{number}"), Signal(name=f"ended_{number}")
            m.d.comb += [
                begun.eq(burst.take & (burst.client == number)),
                ended.eq(axi.bvalid & (pending.o.payload == number)),
                client.idle.eq(~(burst.valid & (burst.client == number)) & (outstanding == 0)),
            ]
            with m.If(begun & ~ended):
                m.d.sync += outstanding.eq(outstanding + 1)
            with m.Elif(ended & ~begun):
                m.d.sync += outstanding.eq(outstanding - 1)
            past = Signal.like(outstanding, name=f"past_{number}")  # of those, asked for before the last fence
            m.d.comb += client.fenced.eq(past == 0)
            with m.If(client.fence):
                m.d.sync += past.eq(outstanding - ended)
            with m.Elif(ended & (past != 0)):
                m.d.sync += past.eq(past - 1)

        m.d.sync += [
            self.error.eq(axi.bvalid & (axi.bresp != 0)),
            self.events.beat.eq(taken.any()),
            self.events.kind.eq(head.kind),
        ]
        return m
