"""Comparisons of FP32 patterns: -0 equals +0, and a NaN is neither equal to nor greater than anything."""

from amaranth.hdl import Module, Mux, Signal, Value

__all__ = ["equal", "greater", "is_nan", "positive"]


def is_nan(x: Value) -> Value:
    """Whether the FP32 pattern `x` is a NaN."""
    return x[23:31].all() & x[:23].any()


def positive(x: Value) -> Value:
    """Whether FP32 `x` is greater than 0."""
    return ~x[31] & x[:31].any() & ~is_nan(x)


def equal(a: Value, b: Value) -> Value:
    """Whether FP32 `a` equals FP32 `b`."""
    return ~is_nan(a) & ~is_nan(b) & ((a == b) | ~(a[:31] | b[:31]).any())


def greater(m: Module, a: Value, b: Value) -> Value:
    """Whether FP32 `a` is greater than FP32 `b`: a new signal of `m`."""
    result = Signal(name="greater")
    above, below = Signal(name="magnitude_above"), Signal(name="magnitude_below")
    some = (a[:31] | b[:31]).any()  # not two zeros
    m.d.comb += [
        above.eq(a[:31] > b[:31]),
        below.eq(a[:31] < b[:31]),
        result.eq(~is_nan(a) & ~is_nan(b) & Mux(a[31] == b[31], Mux(a[31], below, above), b[31] & some)),
    ]
    return result
