"""What the floating-point units share: fields of a number, leading zeros, shifts that keep what they drop, registers.

All functions build combinational logic in `m` (`register` excepted); `name` is a prefix for the signals that they make.
"""

from dataclasses import dataclass

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value

__all__ = ["Unpacked", "leading_zeros", "normalise", "register", "round_packed", "shift_right_sticky", "unpack"]


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
    m: Module, value: Value, *, keep: int, name: str, sign: Value | None = None
) -> tuple[Signal, Value, Signal]:
    """`value` shifted left, zeros following, until its highest bit is one.

    With `sign` the value is the part below the sign bit of a number in two's complement, and the highest bit becomes
    the opposite of the sign. (For -1 it is the first zero that follows.)

    Returns the highest `keep` bits, whether any one is below them, and by how many bits it was shifted. (Bits that can
    only end up below those kept are not shifted on.) Of a zero, count is unspecified, the rest zero.
    """
    width = len(value)
    levels = width.bit_length()
    count = Signal(levels, name=f"{name}_count")
    rest = Const(0, 1)
    for level in reversed(range(levels)):
        step = 1 << level
        top = value[width - step :]
        stays = Signal(name=f"{name}_stays_{step}")
        dropped = max(0, width - (keep + step - 1))  # at most `step`, so they are zero after a shift
        shifted = Signal(width - dropped, name=f"{name}_{step}")
        m.d.comb += [
            stays.eq((top if sign is None else top ^ sign.replicate(step)).any()),
            count[level].eq(~stays),
            shifted.eq(Mux(stays, value, Cat(Const(0, step), value[: width - step]))[dropped:]),
        ]
        if dropped:
            rest = rest | (stays & value[:dropped].any())
        value, width = shifted, width - dropped
    return value, rest, count


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
