"""What the floating-point units share: fields of a number, leading zeros, shifts that keep what they drop, registers.

All functions build combinational logic in `m` (`register` excepted); `name` is a prefix for the signals that they make.
"""

from dataclasses import dataclass

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value

__all__ = [
    "Unpacked",
    "leading_zeros",
    "normalise",
    "register",
    "round_packed",
    "shift_left",
    "shift_right_sticky",
    "unpack",
]


@dataclass(frozen=True)
class Unpacked:
    """Fields of an IEEE number: (-1)^sign * significand * 2^(exponent - bias - fraction bits) if it is finite."""

    sign: Value
    exponent: Value
    """Biased; 1 for subnormals and zeros."""
    significand: Value
    """Fraction and, above it, the hidden bit."""
    zero: Value
    infinite: Value
    nan: Value


def unpack(m: Module, pattern: Value, *, exponent_bits: int, fraction_bits: int, name: str) -> Unpacked:
    """Fields of an IEEE pattern."""
    field = pattern[fraction_bits : fraction_bits + exponent_bits]
    fraction = pattern[:fraction_bits]
    normal = Signal(name=f"{name}_normal")
    empty = Signal(name=f"{name}_fraction_zero")
    top = Signal(name=f"{name}_exponent_ones")
    exponent = Signal(exponent_bits, name=f"{name}_exponent")
    significand = Signal(fraction_bits + 1, name=f"{name}_significand")
    m.d.comb += [
        normal.eq(field.any()),
        empty.eq(~fraction.any()),
        top.eq(field.all()),
        exponent.eq(Cat(field[0] | ~normal, field[1:])),
        significand.eq(Cat(fraction, normal)),
    ]
    return Unpacked(
        sign=pattern[fraction_bits + exponent_bits],
        exponent=exponent,
        significand=significand,
        zero=~normal & empty,
        infinite=top & empty,
        nan=top & ~empty,
    )


def leading_zeros(value: Signal) -> Value:
    """Number of zeros above the highest one of `value` (its width if it is zero); `value` has two bits or more."""

    def count(bits: Value) -> Value:  # bits: a power of two of them, not all zero
        half = len(bits) // 2
        high_zero = ~bits[half:].any()
        if half == 1:
            return high_zero
        return Cat(Mux(high_zero, count(bits[:half]), count(bits[half:])), high_zero)

    width = len(value)
    padded = 1 << width.bit_length()
    return count(Cat(Const(-1, padded - width), value))


def normalise(
    m: Module, value: Value, *, keep: int, name: str, sign: Value | None = None, levels: range | None = None
) -> tuple[Signal, Value, Signal]:
    """`value` shifted left until its highest bit is one.

    With `sign` the value is the part below the sign bit of a number in two's complement, and the highest bit becomes
    the opposite of the sign. (For -1 it is the first zero that comes in.)

    With `levels` it is shifted only by multiples of 2^levels.start and by less than 2^levels.stop, such that the
    highest one is among the highest 2^levels.start bits: the first of two steps, of which the other has the levels
    below.

    Returns the highest `keep` bits (and those that the levels below can bring there), whether any one is below them,
    and by how many bits (or multiples) it was shifted. Of a zero the count is unspecified, the rest zero.
    """
    levels = range(len(value).bit_length()) if levels is None else levels
    count = Signal(len(levels), name=f"{name}_count")
    rest = Const(0, 1)
    for level in reversed(levels):
        top = value[-(1 << level) :]
        shifts = count[level - levels.start]
        m.d.comb += shifts.eq(~(top if sign is None else top ^ sign.replicate(len(top))).any())
        value, dropped = _shift_left(m, value, 1 << level, shifts, keep, name)
        rest = rest | dropped
    return value, rest, count


def shift_left(m: Module, value: Value, amount: Value, *, keep: int, name: str) -> tuple[Signal, Value]:
    """`value` << `amount`, in the width of `value`: the highest `keep` bits, and whether any one is below them."""
    rest = Const(0, 1)
    for level in reversed(range(len(amount))):
        value, dropped = _shift_left(m, value, 1 << level, amount[level], keep, name)
        rest = rest | dropped
    return value, rest


def _shift_left(m: Module, value: Value, step: int, shift: Value, keep: int, name: str) -> tuple[Signal, Value]:
    """A level of a shifter: `value`, or that shifted left by `step`, a power of two.

    The levels below shift by less than `step`. Bits that they cannot bring among the highest `keep` are dropped; also
    returns whether one of those was one.
    """
    dropped = max(0, len(value) - (keep + step - 1))
    assert dropped <= step  # so what is dropped is zero after a shift
    shifted = Signal(len(value) - dropped, name=f"{name}_{step}")
    m.d.comb += shifted.eq(Mux(shift, Cat(Const(0, step), value[:-step]), value)[dropped:])
    return shifted, ~shift & value[:dropped].any() if dropped else Const(0, 1)


def shift_right_sticky(m: Module, value: Value, amount: Value, *, name: str, fill: Value | None = None) -> Signal:
    """`value` >> `amount`, with the lowest bit ORed with all the bits that were shifted out; `fill` (0) comes in."""
    width = len(value)
    for level in range(len(amount)):
        step = 1 << level
        shifted = Signal(width, name=f"{name}_{step}")
        dropped = min(step + 1, width)  # those that end up in the lowest bit
        above = Const(0, 0) if fill is None else fill.replicate(dropped - 1)
        m.d.comb += shifted.eq(Mux(amount[level], Cat(value[:dropped].any(), value[dropped:], above), value))
        value = shifted
    return value


def round_packed(m: Module, packed: Value, guard: Value, sticky: Value, *, name: str) -> Signal:
    """`packed` (fraction, and the exponent field above it) plus one if rounding to nearest even goes up.

    A carry out of the fraction gives the next exponent with a zero fraction, which is the right result: the smallest
    normal number after the largest subnormal one, and infinity after the largest finite number.
    """
    rounded = Signal(len(packed), name=f"{name}_rounded")
    m.d.comb += rounded.eq(packed + (guard & (sticky | packed[0])))
    return rounded


def register(m: Module, enable: Value, value: Value, *, name: str) -> Signal:
    """A register without reset that takes `value` in cycles with `enable`."""
    value = Value.cast(value)
    held = Signal(value.shape(), name=name, reset_less=True)
    with m.If(enable):
        m.d.sync += held.eq(value)
    return held
