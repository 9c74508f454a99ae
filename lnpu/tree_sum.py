"""Sums of many small values."""

from amaranth.hdl import Value

__all__ = ["tree_sum"]


def tree_sum(values) -> Value:
    """Sum of one or more values, or number of ones of a single one (as a sum of its bits), by a balanced tree."""
    terms = [Value.cast(values[i]) for i in range(len(values))]
    while len(terms) > 1:
        terms = [sum(terms[i + 1 : i + 2], terms[i]) for i in range(0, len(terms), 2)]
    return terms[0]
