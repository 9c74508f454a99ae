"""Rounding of an exact sum to FP16 or FP32."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, signed
from amaranth.lib.wiring import In, Out

from lnpu.formats import F16_INF, F16_NAN, F32_NAN, PSUM_WORD, psum_layout
from lnpu.fp.common import normalise, register, shift_right_sticky
from lnpu.fp.half import half_to_single
from lnpu.hdl import Block

__all__ = ["AccumulatorRound"]

_LSB = -48  # exponent of the accumulator's lowest bit
_F32_INF = 0xFF << 23


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

    LATENCY = 6
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

        # 2, 3: normalise, by multiples of 16 and by the rest: 24 bits, guard and sticky. The biased exponent of the
        # highest bit (of u) is `less` + 1 less what they were shifted by, which is `distance` below the smallest one.
        levels = (self.acc_bits - 1).bit_length()
        coarse, rest, count = normalise(m, sum_1, keep=25, sign=sign_1, levels=range(4, levels), name="coarse")
        coarse_2 = keep(coarse, "coarse_2")
        rest_2 = keep(rest, "rest_2")
        count_2 = keep(count, "count_2")
        sign_2 = keep(sign_1, "sign_2")
        nan_2 = keep(nan_1, "nan_2")
        infinite_2 = keep(infinite_1, "infinite_2")
        less = Signal(signed(13))
        m.d.comb += less.eq(shift_1 + (self.acc_bits - 3 + _LSB) + Mux(fp16_1, 15, 127))
        less_2 = keep(less, "less_2")
        scale_2 = keep(scale_1, "scale_2")
        fp16_2 = keep(fp16_1, "fp16_2")
        saturate_2 = keep(saturate_1, "saturate_2")

        normal, rest, count = normalise(m, coarse_2, keep=25, sign=sign_2, levels=range(4), name="normal")
        significand_3 = keep(Cat(rest | rest_2, normal), "significand_3")
        distance = Signal(signed(14))
        m.d.comb += distance.eq(Cat(count, count_2) - less_2)
        distance_3 = keep(distance, "distance_3")
        sign_3 = keep(sign_2, "sign_3")
        nan_3 = keep(nan_2, "nan_3")
        infinite_3 = keep(infinite_2, "infinite_3")
        scale_3 = keep(scale_2, "scale_3")
        fp16_3 = keep(fp16_2, "fp16_3")
        saturate_3 = keep(saturate_2, "saturate_3")

        # 4: align to the format's precision and smallest exponent. A zero goes through all this as a tiny number.
        zero = Signal()
        amount = Signal(5)
        field = Signal(8)
        beyond = Signal()
        m.d.comb += [
            zero.eq(significand_3[-1] == sign_3),
            beyond.eq(distance_3 <= Mux(fp16_3, 1 - 31, 1 - 255)),
        ]
        with m.If(zero | (distance_3 > 31)):
            m.d.comb += amount.eq(31)
        with m.Elif(distance_3 > 0):
            m.d.comb += amount.eq(distance_3)
        with m.Else():
            m.d.comb += field.eq(1 - distance_3)
        precise = Signal(26)
        narrow = Cat(significand_3[:14].any(), significand_3[14:], sign_3.replicate(13))
        m.d.comb += precise.eq(Mux(fp16_3, narrow, significand_3))
        aligned_4 = keep(shift_right_sticky(m, precise, amount, name="align", fill=sign_3), "aligned_4")
        field_4 = keep(field, "field_4")
        beyond_4 = keep(beyond & ~zero, "beyond_4")
        infinite_4 = keep(infinite_3, "infinite_4")
        sign_4 = keep(sign_3, "sign_4")
        nan_4 = keep(nan_3, "nan_4")
        scale_4 = keep(scale_3, "scale_4")
        fp16_4 = keep(fp16_3, "fp16_4")
        saturate_4 = keep(saturate_3, "saturate_4")

        # 5: round, to a pattern of 15 or 31 bits below the sign. Where only zeros follow the guard bit of a negative
        # sum, there are ones behind that of u: the guard bit 0 is a tie, 1 is one more.
        u = Signal(24)
        packed = Signal(31)
        inexact, guard, up = aligned_4[0], Signal(), Signal()
        m.d.comb += [
            Cat(guard, u).eq(aligned_4[1:] ^ sign_4.replicate(25)),
            packed.eq(Mux(fp16_4, Cat(u[:10], field_4[:5]), Cat(u[:23], field_4))),
            up.eq(Mux(~inexact & (guard ^ sign_4), u[0], guard)),
        ]
        rounded = Signal(31, name="sum_rounded")
        m.d.comb += rounded.eq(packed + up)
        overflow = Signal()
        nonfinite = Signal()
        pattern = Signal(31)
        m.d.comb += [
            overflow.eq(beyond_4 | Mux(fp16_4, rounded[10:15].all(), rounded[23:].all())),
            nonfinite.eq(nan_4 | infinite_4 | (overflow & ~saturate_4)),
        ]
        with m.If(nan_4):
            m.d.comb += pattern.eq(Mux(fp16_4, F16_NAN, F32_NAN))
        with m.Elif(nonfinite):
            m.d.comb += pattern.eq(Mux(fp16_4, F16_INF, _F32_INF))
        with m.Elif(overflow):
            m.d.comb += pattern.eq(Mux(fp16_4, F16_INF - 1, _F32_INF - 1))
        with m.Else():
            m.d.comb += pattern.eq(rounded)
        pattern_5 = keep(pattern, "pattern_5")
        sign_5 = keep(sign_4 & ~nan_4, "sign_5")
        nonfinite_5 = keep(nonfinite, "nonfinite_5")
        scale_5 = keep(scale_4, "scale_5")
        fp16_5 = keep(fp16_4, "fp16_5")

        # 6: bring FP16 to FP32.
        scaled = half_to_single(m, Cat(pattern_5[:15], sign_5), scale_5, name="scaled")
        m.d.comb += [
            self.o.eq(keep(Mux(fp16_5, scaled, Cat(pattern_5, sign_5)), "result_6")),
            self.nonfinite.eq(keep(nonfinite_5, "nonfinite_6")),
        ]
        return m
