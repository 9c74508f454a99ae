"""The encoder's first stages: every element of a block gets into its masks and, in order, into its lines of payloads.

Elements are free: what the quantizers make of them, and when they come; so is when the memories behind take lines and
blocks. The harness follows an element through the stages, packs the bytes of a block one element after the other, and
compares lines, masks and sizes where they are written. What can go on does so in the same cycle.
"""

from amaranth.hdl import Cat, Const, Module, Mux, Signal
from amaranth.lib import data
from amaranth.lib.wiring import In, Out

from lnpu.config import BLOCK, TINY
from lnpu.fgmp.encoder import Encoder, block_size
from lnpu.formats import Code, NonzeroMode, PrecisionMode
from lnpu.hdl import Block, place
from verif.formal.proof import Fault, Proof

__all__ = ["PROOFS"]

_BEAT, _LINE = TINY.beat, 8 * TINY.axi_bits // 8
_META = data.StructLayout({"nonzero": 2, "precision": 2, "nonzeros": 64, "precisions": 64, "payload_words": 5})
_ELEMENT = data.StructLayout({"code": 2, "payload": 16})
_LIST = 7

_QUANTIZER = {"code": 2, "fp8": 8, "value": 16, "underflow": 1}
_MEMORIES = {"lines": _LINE, "metas": _META, "ahead": block_size()}
_PEEKS = {
    "quantized_valid": 1, **{f"code{e}": 2 for e in range(_BEAT)}, **{f"payload{e}": 16 for e in range(_BEAT)},
    "packed_valid": 1, "packed": 16 * _BEAT, "packed_bytes": 4, "packed_nonzeros": _BEAT, "packed_nonzero_count": 3,
    "packed_precisions": _BEAT,
    "index": 4, "fill": 3, "tail": _LINE, "flush": 1, "mask": BLOCK, "precision_mask": BLOCK, "nonzero_total": 7,
    "fp16_total": 7, "listed": 6 * _LIST,
    "gathered_valid": 1, "gathered_mask": BLOCK, "gathered_precisions": BLOCK, "gathered_nonzeros": 7,
    "gathered_fp16": 7, "gathered_list": 6 * _LIST,
    **{f"{name}__i__payload": layout for name, layout in _MEMORIES.items()},
    **{f"{name}__i__valid": 1 for name in _MEMORIES},
}  # fmt: skip


class GathersBlocks(Block):
    """An encoder without quantizers and memories, whose place the harness takes."""

    def __init__(self) -> None:
        super().__init__(
            {
                "there": In(1),
                **{f"element{e}": In(_ELEMENT) for e in range(_BEAT)},
                **{f"{name}_room": In(1) for name in _MEMORIES},
                **{f"peek_{name}": In(shape) for name, shape in _PEEKS.items()},
                **{f"cut_quantizer{e}__{port}": Out(width) for e in range(_BEAT) for port, width in _QUANTIZER.items()},
                **{f"cut_{name}__o__payload": Out(layout) for name, layout in _MEMORIES.items()},
                **{f"cut_{name}__{port}": Out(1) for name in _MEMORIES for port in ("o__valid", "i__ready")},
                "assume": Out(1),
                "hold": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        dut = place(m, "dut", Encoder(config=TINY))
        peek = {name: getattr(self, f"peek_{name}") for name in _PEEKS}
        elements = [getattr(self, f"element{e}") for e in range(_BEAT)]
        m.d.comb += dut.i.valid.eq(self.there)
        for name in _MEMORIES:
            m.d.comb += getattr(self, f"cut_{name}__i__ready").eq(getattr(self, f"{name}_room"))
        for e, element in enumerate(elements):
            m.d.comb += [
                getattr(self, f"cut_quantizer{e}__code").eq(element.code),
                getattr(self, f"cut_quantizer{e}__fp8").eq(element.payload),
                getattr(self, f"cut_quantizer{e}__value").eq(element.payload),
            ]

        # Two beats on the way.
        beats = [[Signal(_ELEMENT, name=f"{stage}{e}") for e in range(_BEAT)] for stage in ("first", "second")]
        first_there, second_there, step = Signal(), Signal(), Signal()
        first_free, second_free = Signal(), Signal()
        m.d.comb += [second_free.eq(~second_there | step), first_free.eq(~first_there | second_free)]
        with m.If(first_free):
            m.d.sync += first_there.eq(self.there)
            for element, kept in zip(elements, beats[0], strict=True):
                narrow = Mux(element.code == Code.FP8, element.payload[:8], element.payload)
                m.d.sync += [
                    kept.code.eq(element.code),
                    kept.payload.eq(Mux(element.code == Code.ZERO, 0, narrow)),
                ]
        with m.If(second_free):
            m.d.sync += second_there.eq(first_there)
            m.d.sync += [kept.eq(element) for element, kept in zip(*beats, strict=True)]

        # Bytes and masks of the second, one element after the other, behind those of the block so far.
        index, fill, pending = Signal(4), Signal(3), Signal(_LINE)
        mask, precisions, ranks = Signal(BLOCK), Signal(BLOCK), Signal(6 * _LIST)
        nonzeros, fp16 = Signal(7), Signal(7)
        packed, size, count = Const(0, 16 * _BEAT), Const(0, 4), Const(0, 3)
        beat_precisions, beat_mask = Const(0, _BEAT), []
        now_precisions, now_ranks, now_nonzeros, now_fp16 = precisions, ranks, nonzeros, fp16
        for element in beats[1]:
            present, wide = element.code != Code.ZERO, element.code == Code.FP16
            packed = (packed | (element.payload << (size << 3)))[: 16 * _BEAT]
            size = (size + present + wide)[:4]
            beat_precisions = (beat_precisions | (wide << count))[:_BEAT]
            count = (count + present)[:3]
            beat_mask.append(present)
            now_precisions = (now_precisions | (wide << now_nonzeros))[:BLOCK]
            spot = Signal(6 * _LIST, name=f"ranks{len(beat_mask)}")
            m.d.comb += spot.eq(now_ranks)
            for k in range(_LIST):
                with m.If(wide & (now_fp16 == k)):
                    m.d.comb += spot[6 * k : 6 * k + 6].eq(now_nonzeros)
            now_ranks = spot
            now_nonzeros, now_fp16 = (now_nonzeros + present)[:7], (now_fp16 + wide)[:7]
        combined, total, last, full = Signal(2 * _LINE), Signal(4), Signal(), Signal()
        now_mask = Signal(BLOCK)
        m.d.comb += [
            combined.eq(pending | (packed << (fill << 3))),
            total.eq(fill + size),
            last.eq(index == 15),
            full.eq(total >= 8),
            now_mask.eq(mask | (Cat(beat_mask) << (index << 2))),
        ]

        # A line that the last block left behind goes first. A block that is complete waits for room for masks and size.
        owed, owed_line = Signal(), Signal(_LINE)
        done, room = Signal(), Signal()
        line, writes = Signal(_LINE), Signal()
        m.d.comb += [
            room.eq(~done | (self.metas_room & self.ahead_room)),
            step.eq(second_there & self.lines_room & (room | ~last) & ~(owed & full)),
            writes.eq(owed | (step & (full | (last & (total != 0))))),
            line.eq(Mux(owed, owed_line, combined[:_LINE])),
        ]
        block = {
            name: (Signal(len(value), name=f"done_{name}"), value)
            for name, value in (
                ("mask", now_mask),
                ("precisions", now_precisions),
                ("nonzeros", now_nonzeros),
                ("fp16", now_fp16),
                ("list", now_ranks),
            )
        }
        with m.If(self.lines_room):
            m.d.sync += owed.eq(0)
        with m.If(room):
            m.d.sync += done.eq(step & last)
        with m.If(step & last):
            m.d.sync += [index.eq(0), fill.eq(0), pending.eq(0)]
            m.d.sync += [owed.eq(total > 8), owed_line.eq(combined[_LINE:])]
            m.d.sync += [value.eq(0) for value in (mask, precisions, ranks, nonzeros, fp16)]
            m.d.sync += [kept.eq(value) for kept, value in block.values()]
        with m.Elif(step):
            m.d.sync += [
                index.eq(index + 1),
                fill.eq(total[:3]),
                pending.eq(Mux(full, combined[_LINE:], combined[:_LINE])),
                mask.eq(now_mask),
                precisions.eq(now_precisions),
                ranks.eq(now_ranks),
                nonzeros.eq(now_nonzeros),
                fp16.eq(now_fp16),
            ]

        rules = [
            dut.i.ready == first_free,
            peek["lines__i__valid"] == writes,
            ~writes | (peek["lines__i__payload"] == line),
            peek["metas__i__valid"] == (done & self.ahead_room),
            peek["ahead__i__valid"] == (done & self.metas_room),
            ~done | self._describes(peek, {name: kept for name, (kept, _) in block.items()}),
        ]
        # How the state of the block and that of the harness belong together.
        rules += [
            peek["quantized_valid"] == first_there,
            peek["packed_valid"] == second_there,
            ~first_there
            | Cat(
                (peek[f"code{e}"] == kept.code) & (peek[f"payload{e}"] == kept.payload)
                for e, kept in enumerate(beats[0])
            ).all(),
            *(
                ~there
                | (
                    (kept.code != Code.PADDING)
                    & ((kept.code != Code.ZERO) | (kept.payload == 0))
                    & ((kept.code == Code.FP16) | (kept.payload[8:] == 0))
                )
                for there, beat in zip((first_there, second_there), beats, strict=True)
                for kept in beat
            ),
            ~second_there
            | Cat(
                peek["packed"] == packed,
                peek["packed_bytes"] == size,
                peek["packed_nonzeros"] == Cat(beat_mask),
                peek["packed_nonzero_count"] == count,
                peek["packed_precisions"] == beat_precisions,
            ).all(),
            peek["index"] == index,
            peek["fill"] == fill,
            peek["flush"] == owed,
            peek["tail"] == Mux(owed, owed_line, pending),
            ~owed | ((pending == 0) & (index == 0) & (fill == 0)),
            *((n < fill) | (pending.word_select(n, 8) == 0) for n in range(8)),
            (peek["mask"] >> (BLOCK - (index << 2))[:7]) == mask,
            peek["precision_mask"] == precisions,
            peek["nonzero_total"] == nonzeros,
            peek["fp16_total"] == fp16,
            peek["listed"] == ranks,
            *((k < fp16) | (ranks[6 * k : 6 * k + 6] == 0) for k in range(_LIST)),
            *((k < 4 * index) | ~mask[k] for k in range(BLOCK)),
            *((k < nonzeros) | ~precisions[k] for k in range(BLOCK)),
            nonzeros <= 4 * index,
            fp16 <= nonzeros,
            peek["gathered_valid"] == done,
            *(~done | (peek[f"gathered_{name}"] == kept) for name, (kept, _) in block.items()),
            ~done | ((block["nonzeros"][0] <= BLOCK) & (block["fp16"][0] <= block["nonzeros"][0])),
        ]
        m.d.comb += [
            self.assume.eq(Cat(element.code != Code.PADDING for element in elements).all()),
            self.hold.eq(Cat(rules).all()),
        ]
        return m

    def _describes(self, peek, block):
        """What is written of a block tells its modes, masks and sizes."""
        meta, size = peek["metas__i__payload"], peek["ahead__i__payload"]
        nonzeros, fp16 = block["nonzeros"], block["fp16"]
        mask_bytes = ((nonzeros + 7) >> 3)[:4]
        mixed = (fp16 != 0) & (fp16 != nonzeros)
        few = mixed & (fp16 < mask_bytes)
        masked = (nonzeros != 0) & (nonzeros != BLOCK)
        nonzero = Mux(nonzeros == 0, NonzeroMode.EMPTY, Mux(masked, NonzeroMode.MASKED, NonzeroMode.DENSE))
        uniform = Mux(fp16 == 0, PrecisionMode.FP8, PrecisionMode.FP16)
        head = 1 + Mux(masked, 8, 0) + Mux(few, fp16, Mux(mixed, mask_bytes, 0))
        entries = Cat(Cat(block["list"][6 * k : 6 * k + 6], Const(0, 1), fp16 == k + 1) for k in range(_LIST))
        return Cat(
            meta.nonzero == nonzero,
            meta.precision == Mux(few, PrecisionMode.FEW, Mux(mixed, PrecisionMode.MIXED, uniform)),
            meta.nonzeros == block["mask"],
            ~mixed | (meta.precisions == Mux(few, entries, block["precisions"])),
            meta.payload_words == (nonzeros + fp16 + 7) >> 3,
            size.head == head,
            size.length == head + nonzeros + fp16,
        ).all()


PROOFS = [
    Proof(
        name="encoder-blocks",
        block="Encoder, 4 elements and 64 bits: its stages up to lines and masks, behind the quantizers",
        statement="every element is in its masks and lines once, in order; what can go on does",
        harness=GathersBlocks,
        method="induction",
        depth=6,
        peeks={f"peek_{name}": f"dut.{name}" for name in _PEEKS},
        without={f"quantizer{e}": tuple(_QUANTIZER) for e in range(_BEAT)}
        | dict.fromkeys(_MEMORIES, ("o__payload", "o__valid", "i__ready")),
        faults=(Fault("quantized_ready", 1), Fault("packed_ready", 1)),
    )
]
