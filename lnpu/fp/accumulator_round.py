"""Rounding of an exact sum to FP16 or FP32."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, signed
from amaranth.lib.wiring import In, Out

from lnpu.formats import F16_INF, F16_NAN, F32_NAN, PSUM_WORD, psum_layout
from lnpu.fp.common import normalise, register, shift_right_sticky
from lnpu.fp.half import half_to_single
from lnpu.hdl import Block

__all__ = ["AccumulatorRound"]

_LSB = -48  # exponent of the accumulator's lowest bit


class AccumulatorRound(Block):
    """An exact sum times 2^shift, rounded once (to nearest even) to FP16 or FP32; then times 2^scale, exactly, in FP32.

    Subnormals of both formats are exact. An exact zero is +0, a negative number that rounds to zero -0. NaN if
    `psum.nan` or both infinities, else the infinity if there is one.

    Takes operands in every cycle with `enable`; the result is on `o` after `LATENCY` such cycles.

    Parameters
    ----------
    acc_bits : int
        Width of the sum, at least 27.

    Members
    -------
    enable : In(1)
        All registers hold while it is 0.
    psum : In(psum_layout(acc_bits))
        The sum, LSB 2^-48, with any carries.
    shift : In(signed(12))
        Any.
    scale : In(signed(8))
        -64 to 64; only with `fp16`, else it is taken as 0.
    fp16 : In(1)
        Round to FP16, else to FP32.
    saturate : In(1)
        A finite sum beyond the format's range gives its largest finite value, else infinity.
    o : Out(32)
        FP32 pattern.
    nonfinite : Out(1)
        `o` is infinite or NaN.
    """

    LATENCY = 4
    """Enabled cycles from operands to result."""

    def __init__(self, acc_bits: int = 97) -> None:
        if acc_bits < 27:
            raise ValueError(f"acc_bits must be at least 27, not {acc_bits!r}")
        self.acc_bits = acc_bits
        super().__init__(
            {
                "enable": In(1),
                "psum": In(psum_layout(acc_bits)),
                "shift": In(signed(12)),
                "scale": In(signed(8)),
                "fp16": In(1),
                "saturate": In(1),
                "o": Out(32),
                "nonfinite": Out(1),
            }
        )

    @property
    def suffix(self) -> str:
        return f"{self.acc_bits}"

    def elaborate(self, platform):
        m = Module()

        def keep(value, name):
            return register(m, self.enable, value, name=name)

        # A negative sum stays in two's complement until it is rounded: its magnitude is its complement u plus one, that
        # is, u with ones without end behind it.

        # 1: the sum with the carries that wait.
        waiting = Cat(Cat(Const(0, PSUM_WORD - bool(i)), carry) for i, carry in enumerate(self.psum.carries))
        acc = Signal(self.acc_bits)
        m.d.comb += acc.eq(self.psum.acc + waiting)
        infinite = self.psum.pinf | self.psum.ninf
        sum_1 = keep(acc[:-1], "sum_1")
        sign_1 = keep(Mux(infinite, self.psum.ninf, acc[-1]), "sign_1")
        nan_1 = keep(self.psum.nan | (self.psum.pinf & self.psum.ninf), "nan_1")
        infinite_1 = keep(infinite, "infinite_1")
        shift_1 = keep(self.shift, "shift_1")
        scale_1 = keep(self.scale, "scale_1")
        fp16_1 = keep(self.fp16, "fp16_1")
        saturate_1 = keep(self.saturate, "saturate_1")

        # 2: normalise: 24 bits, guard and sticky, and the exponent of the highest bit (of u).
        normal, rest, count = normalise(m, sum_1, keep=25, sign=sign_1, name="normal")
        significand_2 = keep(Cat(rest, normal), "significand_2")
        exponent = Signal(signed(13))
        m.d.comb += exponent.eq(shift_1 - count + (self.acc_bits - 2 + _LSB))
        exponent_2 = keep(exponent, "exponent_2")
        sign_2 = keep(sign_1, "sign_2")
        nan_2 = keep(nan_1, "nan_2")
        infinite_2 = keep(infinite_1, "infinite_2")
        scale_2 = keep(scale_1, "scale_2")
        fp16_2 = keep(fp16_1, "fp16_2")
        saturate_2 = keep(saturate_1, "saturate_2")

        # 3: align to the format's precision and smallest exponent. A zero goes through all this as a tiny number.
        zero = Signal()
        biased = Signal(signed(14))
        distance = Signal(signed(14))
        amount = Signal(5)
        field = Signal(8)
        beyond = Signal()
        m.d.comb += [
            zero.eq(significand_2[-1] == sign_2),
            biased.eq(exponent_2 + Mux(fp16_2, 15, 127)),
            distance.eq(1 - biased),
            beyond.eq(biased >= Mux(fp16_2, 31, 255)),
        ]
        with m.If(zero | (distance > 31)):
            m.d.comb += amount.eq(31)
        with m.Elif(distance > 0):
            m.d.comb += amount.eq(distance)
        with m.Else():
            m.d.comb += field.eq(biased)
        precise = Signal(26)
        narrow = Cat(significand_2[:14].any(), significand_2[14:], sign_2.replicate(13))
        m.d.comb += precise.eq(Mux(fp16_2, narrow, significand_2))
        aligned_3 = keep(shift_right_sticky(m, precise, amount, name="align", fill=sign_2), "aligned_3")
        field_3 = keep(field, "field_3")
        beyond_3 = keep(beyond & ~zero, "beyond_3")
        infinite_3 = keep(infinite_2, "infinite_3")
        sign_3 = keep(sign_2, "sign_3")
        nan_3 = keep(nan_2, "nan_3")
        scale_3 = keep(scale_2, "scale_3")
        fp16_3 = keep(fp16_2, "fp16_3")
        saturate_3 = keep(saturate_2, "saturate_3")

        # 4: round, to a pattern of 15 or 31 bits below the sign, and bring FP16 to FP32. Where only zeros follow the
        # guard bit of a negative sum, there are ones behind that of u: the guard bit 0 is a tie, 1 is one more.
        u = Signal(24)
        packed = Signal(31)
        inexact, guard, up = aligned_3[0], Signal(), Signal()
        m.d.comb += [
            Cat(guard, u).eq(aligned_3[1:] ^ sign_3.replicate(25)),
            packed.eq(Mux(fp16_3, Cat(u[:10], field_3[:5]), Cat(u[:23], field_3))),
            up.eq(Mux(~inexact & (guard ^ sign_3), u[0], guard)),
        ]
        rounded = Signal(31, name="sum_rounded")
        m.d.comb += rounded.eq(packed + up)
        overflow = Signal()
        nonfinite = Signal()
        half = Signal(16)
        single = Signal(32)
        m.d.comb += [
            overflow.eq(beyond_3 | Mux(fp16_3, rounded[10:15].all(), rounded[23:].all())),
            nonfinite.eq(nan_3 | infinite_3 | (overflow & ~saturate_3)),
        ]
        with m.If(nan_3):
            m.d.comb += [half.eq(F16_NAN), single.eq(F32_NAN)]
        with m.Elif(nonfinite):
            m.d.comb += [half.eq(Cat(Const(F16_INF, 15), sign_3)), single.eq(Cat(Const(0xFF << 23, 31), sign_3))]
        with m.Elif(overflow):
            m.d.comb += [
                half.eq(Cat(Const(F16_INF - 1, 15), sign_3)),
                single.eq(Cat(Const((0xFF << 23) - 1, 31), sign_3)),
            ]
        with m.Else():
            m.d.comb += [half.eq(Cat(rounded[:15], sign_3)), single.eq(Cat(rounded, sign_3))]
        scaled = half_to_single(m, half, scale_3, name="scaled")
        m.d.comb += [
            self.o.eq(keep(Mux(fp16_3, scaled, single), "result_4")),
            self.nonfinite.eq(keep(nonfinite, "nonfinite_4")),
        ]
        return m
