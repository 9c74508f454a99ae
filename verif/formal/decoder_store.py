"""The decoder's last stage: blocks that are good come out as they went in, others as zeros, all in order, none twice.

What the harness puts in, beat by beat, tells its place among the beats of good blocks (modulo 64). When beats come,
which blocks are bad, from which beat on, and which are zeros without beats is free; so is when beats are taken.
"""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import data
from amaranth.lib.wiring import In, Out

from lnpu.config import TINY
from lnpu.fgmp.decoder import Decoder
from lnpu.formats import Code, element_beat
from lnpu.hdl import Block, place
from verif.formal.proof import Fault, Proof

__all__ = ["PROOFS"]

_BEAT, _BEATS = TINY.beat, TINY.block_beats
_DEPTH = 2 * _BEATS
_RELEASED = 4
"""Blocks that wait behind the one at the output, at most."""

_PICKED = data.StructLayout(
    {"raw": data.ArrayLayout(16, _BEAT), "nonzero": _BEAT, "fp16": _BEAT, "final": 1, "zero": 1, "bad": 1}
)
_ELEMENTS = element_beat(_BEAT)
_PEEKS = {
    "picked__ready": ("picked__ready", 1),
    **{f"store_{name}": (f"store_{name}", 6) for name in ("to", "base", "at")},
    "spoilt": ("store_spoilt", 1),
    "valid": ("beat_valid", 1),
    "zero": ("beat_zero", 1),
    "count": ("beats_out", 4),
    "level": ("released.level", 3),
    **{f"good{n}": (f"released.word{n}", 1) for n in range(_RELEASED)},
    "read": ("store.r_data", _ELEMENTS.size),
    **{f"word{n}": (f"\\dut.store.words[{n}]", _ELEMENTS.size) for n in range(_DEPTH)},
}


class ReleasesBlocks(Block):
    """The last stage of a decoder, behind a source of beats that the harness is."""

    def __init__(self) -> None:
        super().__init__(
            {
                "there": In(1),
                "zero": In(1),
                "bad": In(1),
                "ready": In(1),
                **{f"peek_{name}": In(width) for name, (_, width) in _PEEKS.items()},
                "cut_picked__payload": Out(_PICKED),
                "cut_picked__valid": Out(1),
                "assume": Out(1),
                "hold": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        dut = place(m, "dut", Decoder(config=TINY))
        peek = {name: getattr(self, f"peek_{name}") for name in _PEEKS}
        m.d.comb += dut.o.ready.eq(self.ready)

        # In: `beat` of a block, `tag` among the beats of good blocks; a bad block gives its tags back.
        beat, tag, first_tag, spoilt = Signal(4), Signal(6), Signal(6), Signal()
        zero, final, bad, taken_in = Signal(), Signal(), Signal(), Signal()
        picked = self.cut_picked__payload
        m.d.comb += [
            zero.eq(self.zero & (beat == 0)),
            final.eq(zero | (beat == _BEATS - 1)),
            bad.eq(spoilt | self.bad),
            taken_in.eq(self.there & peek["picked__ready"]),
            *(picked.raw[e].eq(_value(tag)) for e in range(_BEAT)),
            picked.nonzero.eq(Mux(zero, 0, (1 << _BEAT) - 1)),
            picked.fp16.eq((1 << _BEAT) - 1),
            picked.final.eq(final),
            picked.zero.eq(zero),
            picked.bad.eq(self.bad),
            self.cut_picked__valid.eq(self.there),
        ]
        with m.If(taken_in):
            m.d.sync += [beat.eq(Mux(final, 0, beat + 1)), spoilt.eq(~final & bad)]
            with m.If(~final):
                m.d.sync += tag.eq(tag + 1)
            with m.Elif(bad | zero):
                m.d.sync += tag.eq(first_tag)
            with m.Else():
                m.d.sync += [tag.eq(tag + 1), first_tag.eq(tag + 1)]

        # Out: blocks inside, oldest first, and whether each is good; of that, `done` beats are out.
        goods = [Signal(name=f"good{n}") for n in range(_RELEASED + 1)]
        level, remain = Signal(3), Signal(3)
        done, following = Signal(4), Signal(6)  # tag of the next beat that has one
        taken, pop, push = Signal(), Signal(), Signal()
        m.d.comb += [
            taken.eq(dut.o.valid & self.ready),
            pop.eq(taken & (done == _BEATS - 1)),
            push.eq(taken_in & final),
            remain.eq(level - pop),
        ]
        m.d.sync += [level.eq(remain + push), done.eq(done + taken), following.eq(following + (taken & goods[0]))]
        for n, good in enumerate(goods):
            with m.If(push & (remain == n)):
                m.d.sync += good.eq(~bad & ~zero)
            if n < _RELEASED:
                with m.Elif(pop):
                    m.d.sync += good.eq(goods[n + 1])
        waited, erred = Signal(), Signal()
        m.d.sync += [waited.eq((level != 0) & ~dut.o.valid), erred.eq(push & bad)]

        contract = [
            ~dut.o.valid | ((level != 0) & (Value.cast(dut.o.payload) == Mux(goods[0], _word(following), 0))),
            ~waited | dut.o.valid,
            peek["picked__ready"] | (level >= _RELEASED) | ((tag - peek["store_at"])[:6] == _DEPTH),
            dut.error == erred,
        ]
        # How the state of the block and that of the harness belong together.
        ending = dut.o.valid & (peek["count"] == 0)  # the last beat of a block is at the output
        held = (tag - peek["store_at"])[:6]
        words = [peek[f"word{n}"] for n in range(_DEPTH)]
        relation = [
            level == peek["level"] + ending,
            peek["level"] <= _RELEASED,
            *(
                (peek["level"] <= n) | (~peek[f"good{n}"] == Mux(ending, goods[n + 1], goods[n]))
                for n in range(_RELEASED)
            ),
            dut.o.valid == peek["valid"],
            ~dut.o.valid | (peek["zero"] == ~goods[0]),
            peek["count"] == (done + dut.o.valid)[:4],
            (level != 0) | (done == 0),
            ending | (peek["level"] != 0) | (peek["count"] == 0),
            peek["store_at"] == (following + (dut.o.valid & goods[0]))[:6],
            peek["store_to"] == tag,
            peek["store_base"] == first_tag,
            peek["spoilt"] == spoilt,
            tag == (first_tag + beat)[:6],
            held <= _DEPTH,
            held == (first_tag - peek["store_at"])[:6] + beat,
            (first_tag - following)[:6] + Mux((level != 0) & goods[0], done, 0)
            == sum(((good & (n < level)) << 4 for n, good in enumerate(goods)), start=0),
            ~dut.o.valid | ~goods[0] | (peek["read"] == _word(following)),
        ]
        for n, word in enumerate(words):
            ahead = (n - peek["store_at"])[:5]
            relation.append((ahead >= held) | (word == _word((peek["store_at"] + ahead)[:6])))
        m.d.comb += [self.assume.eq(1), self.hold.eq(Cat(*contract, *relation).all())]
        return m


def _value(tag):
    """A normal FP16 number that tells `tag`."""
    return 0x4000 | tag


def _word(tag):
    """A beat of such numbers."""
    return Cat(*[Cat(tag, Const(0x4000 >> 6, 10))] * _BEAT, *[Const(Code.FP16.value, 2)] * _BEAT)


PROOFS = [
    Proof(
        name="decoder-store",
        block="Decoder, 4 elements: its last stage",
        statement="the beats of good blocks come out once, in order, zeros for others; no deadlock",
        harness=ReleasesBlocks,
        method="induction",
        depth=8,
        peeks={f"peek_{name}": wire if wire.startswith("\\") else f"dut.{wire}" for name, (wire, _) in _PEEKS.items()},
        cuts=("picked__payload", "picked__valid"),
        faults=(Fault("store_go", 0), Fault("beat_issue", 0)),
    )
]
