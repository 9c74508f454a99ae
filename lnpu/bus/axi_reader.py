"""Reads of the chip's clients as AXI4 bursts."""

from amaranth.hdl import Cat, Module, Mux, Shape, Signal
from amaranth.lib import data
from amaranth.lib.wiring import In, Out

from lnpu.config import ChipConfig
from lnpu.hdl import Block, place
from lnpu.interfaces import axi_read_signature, memory_read_signature
from lnpu.mem.fifo import RegisterFifo

__all__ = ["AxiReader", "BurstSplitter", "reader_events_layout"]

PAGE = 4096
"""No AXI burst crosses a multiple of this many bytes."""


def reader_events_layout() -> data.StructLayout:
    """What the reader reports to the counters each cycle.

    `beat`: a data word came, of a request of `kind`. `waiting`: a read is outstanding and no data is there.
    """
    return data.StructLayout({"beat": 1, "kind": 3, "waiting": 1})


class BurstSplitter:
    """Takes requests from clients in turn and cuts them into bursts (logic shared by the AXI reader and writer).

    It is not a component: `build` adds its logic to the parent, whose clocked registers it uses.

    Parameters
    ----------
    config : ChipConfig
        Widths and longest burst.
    clients : list
        The clients' `request` streams, as interface objects.

    Attributes
    ----------
    valid : Signal(1)
        There is a burst.
    take : Signal(1)
        To be driven by the parent: the burst is taken in this cycle. Only with `valid`.
    address, beats, last, client, kind : Signal
        Byte address of the burst, its length, whether it is the last of its request, whose it is, what it counts as.
    """

    def __init__(self, config: ChipConfig, clients: list) -> None:
        self._clients = clients
        self._config = config
        self._word_shift = (config.axi_bits // 8).bit_length() - 1
        page_beats = PAGE // (config.axi_bits // 8)
        self._longest = min(config.burst_beats, page_beats)
        self.valid = Signal(name="burst_valid")
        self.take = Signal(name="burst_take")
        self.address = Signal(config.address_bits, name="burst_address")
        self.beats = Signal(range(self._longest + 1), name="burst_beats")
        self.last = Signal(name="burst_last")
        self.client = Signal(range(len(clients)), name="burst_client")
        self.kind = Signal(3, name="burst_kind", reset_less=True)

    def build(self, m: Module) -> None:
        """Add the logic to `m`."""
        shift, count = self._word_shift, len(self._clients)
        word = Signal(self._config.address_bits - shift, name="burst_word", reset_less=True)
        left = Signal(16, name="burst_left", reset_less=True)

        page_bits = (PAGE >> shift).bit_length() - 1
        to_page_end = Signal(page_bits + 1, name="burst_to_page_end")
        end = Signal(17, name="burst_page_words")  # of the whole request, from the beginning of the page on
        m.d.comb += [
            to_page_end.eq((1 << page_bits) - word[:page_bits]),
            self.address.eq(word << shift),
            end.eq(word[:page_bits] + left),
            self.last.eq((left <= self._longest) & (end <= 1 << page_bits)),
        ]
        limit = Signal.like(self.beats, name="burst_limit")
        m.d.comb += [
            limit.eq(Mux(to_page_end < self._longest, to_page_end, self._longest)),
            self.beats.eq(Mux(left < limit, left, limit)),
        ]
        with m.If(self.take):
            m.d.sync += [word.eq(word + self.beats), left.eq(left - self.beats)]
            with m.If(self.last):
                m.d.sync += self.valid.eq(0)

        # Round-robin: of the clients that ask, the first after the one served last.
        asking = Signal(count, name="burst_asking")
        grant = Signal(range(count), name="burst_grant")
        m.d.comb += asking.eq(Cat(client.valid for client in self._clients))
        with m.Switch(self.client):
            for served in range(count):
                with m.Case(served):
                    for client in reversed([(served + 1 + step) % count for step in range(count)]):
                        with m.If(asking[client]):
                            m.d.comb += grant.eq(client)
        free = Signal(name="burst_free")
        m.d.comb += free.eq(~self.valid | (self.take & self.last))
        for number, client in enumerate(self._clients):
            m.d.comb += client.ready.eq(free & (grant == number) & client.valid)
            with m.If(client.ready):
                m.d.sync += [
                    self.valid.eq(1),
                    self.client.eq(number),
                    self.kind.eq(client.payload.kind),
                    word.eq(client.payload.address >> shift),
                    left.eq(client.payload.words),
                ]


class AxiReader(Block):
    """AXI4 read master for several clients.

    Requests are taken from the clients in turn (round-robin) and cut into INCR bursts of at most `burst_beats` words
    that do not cross a 4 KiB boundary. At most `reads_in_flight` bursts are outstanding, all with ID 0, so that data
    come in order; each word goes to the client that asked for it, with `last` set on the last word of a request.

    At best a burst is asked for in every cycle (the first in the second cycle after its request was taken) and a word
    is delivered in every cycle, one cycle after the memory presented it. All AXI outputs are registers. A client that
    leaves its data waiting makes the others wait too.

    Parameters
    ----------
    config : ChipConfig
        Widths, longest burst and number of outstanding bursts.
    clients : int
        Number of clients, 1 or more.

    Members
    -------
    client0, client1, ... : In(memory_read_signature(config))
        `request.words` must be 1 or more.
    axi : Out(axi_read_signature(config))
    error : Out(1)
        Set for a cycle for every word that came with a response other than OKAY, in the first cycle in which the word
        is offered to its client.
    events : Out(reader_events_layout())
        Registered; `beat` in the same cycle in which `error` would be.
    """

    def __init__(self, *, config: ChipConfig, clients: int = 3) -> None:
        if not isinstance(clients, int) or clients < 1:
            raise ValueError(f"clients must be 1 or more, not {clients!r}")
        self.config, self.clients = config, clients
        super().__init__(
            {
                "axi": Out(axi_read_signature(config)),
                **{f"client{number}": In(memory_read_signature(config)) for number in range(clients)},
                "error": Out(1),
                "events": Out(reader_events_layout()),
            }
        )

    def elaborate(self, platform):
        m = Module()
        config, axi = self.config, self.axi
        clients = [getattr(self, f"client{number}") for number in range(self.clients)]

        # Which client the words of each outstanding burst go to.
        route_layout = data.StructLayout({"client": Shape.cast(range(self.clients)), "kind": 3, "last": 1})
        route = place(m, "route", RegisterFifo(shape=route_layout, depth=config.reads_in_flight))
        head = route.o.payload

        # Address channel
        burst = BurstSplitter(config, [client.request for client in clients])
        burst.build(m)
        address, length = Signal(config.address_bits, reset_less=True), Signal(8, reset_less=True)
        asking = Signal()
        m.d.comb += [
            axi.arvalid.eq(asking),
            axi.araddr.eq(address),
            axi.arlen.eq(length),
            axi.arsize.eq((config.axi_bits // 8).bit_length() - 1),
            axi.arburst.eq(0b01),
            axi.arcache.eq(0b0011),
            burst.take.eq(burst.valid & route.i.ready & (~asking | axi.arready)),
            route.i.payload.client.eq(burst.client),
            route.i.payload.kind.eq(burst.kind),
            route.i.payload.last.eq(burst.last),
            route.i.valid.eq(burst.take),
        ]
        with m.If(axi.arready):
            m.d.sync += asking.eq(0)
        with m.If(burst.take):
            m.d.sync += [asking.eq(1), address.eq(burst.address), length.eq(burst.beats - 1)]

        # Data channel: a word that cannot go on at once waits in `spare`, so that RREADY is a register.
        word_layout = data.StructLayout({"data": config.axi_bits, "last": 1, "error": 1})
        spare, incoming = Signal(word_layout, reset_less=True), Signal(word_layout)
        spare_valid, word_valid, word_taken = Signal(), Signal(), Signal()
        m.d.comb += [axi.rready.eq(~spare_valid), word_valid.eq(spare_valid | axi.rvalid)]
        with m.If(spare_valid):
            m.d.comb += incoming.eq(spare)
        with m.Else():
            m.d.comb += [
                incoming.data.eq(axi.rdata),
                incoming.last.eq(axi.rlast),
                incoming.error.eq(axi.rresp != 0),
            ]
        with m.If(~spare_valid):
            m.d.sync += [spare.eq(incoming), spare_valid.eq(axi.rvalid & ~word_taken)]
        with m.Elif(word_taken):
            m.d.sync += spare_valid.eq(0)

        offered = Signal(self.clients)
        out = Signal(data.StructLayout({"data": config.axi_bits, "last": 1}), reset_less=True)
        ready = Signal()
        m.d.comb += [
            ready.eq(~offered.any() | (offered & Cat(client.response.ready for client in clients)).any()),
            word_taken.eq(word_valid & ready),
            route.o.ready.eq(word_taken & incoming.last),
        ]
        for number, client in enumerate(clients):
            m.d.comb += [client.response.valid.eq(offered[number]), client.response.payload.eq(out)]
            with m.If(ready):
                m.d.sync += offered[number].eq(word_valid & (head.client == number))
        with m.If(word_taken):
            m.d.sync += [out.data.eq(incoming.data), out.last.eq(incoming.last & head.last)]

        m.d.sync += [
            self.error.eq(word_taken & incoming.error),
            self.events.beat.eq(word_taken),
            self.events.kind.eq(head.kind),
            self.events.waiting.eq(route.o.valid & ~word_valid),
        ]
        return m
