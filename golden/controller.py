"""The dynamic FGMP ratio controller: from what a tensor became when it was stored to how it is stored next.

`adapt` is one decision, in integers, bit for bit that of the chip (`lnpu/fgmp/controller.py`). `Controller` is the
table of states with the statistics that add up while a tensor is stored.
"""

from dataclasses import dataclass, field, fields, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from golden.fgmp import CODE_FP8, CODE_FP16, CODE_ZERO

__all__ = [
    "COUNT_MAX",
    "RECORD_DTYPE",
    "Controller",
    "ControllerState",
    "Statistics",
    "Targets",
    "adapt",
    "statistics_of",
]

COUNT_MAX = (1 << 24) - 1
"""Where the counts of elements saturate."""

SCALE_MIN, SCALE_MAX = -64, 63
"""Scales that `adapt` gives; a state that was set may also have 64."""

_LO_STEP = 0x400  # a factor of two in an FP16 pattern
_HI_STEP = 0x100  # a quarter of that: a factor of 1.14 to 1.25

RECORD_DTYPE = np.dtype(
    [
        ("scale", "i1"),
        ("lo", "<u2"),
        ("hi", "<u2"),
        ("zero", "<u4"),
        ("underflow", "<u4"),
        ("fp8", "<u4"),
        ("fp16", "<u4"),
        ("top", "u1"),
        ("nonfinite", "u1"),
        ("tensor", "u1"),
        ("current_scale", "i1"),
        ("current_lo", "<u2"),
        ("current_hi", "<u2"),
        ("reserved", "V3"),
    ]
)
"""The 32 bytes that ADAPT leaves in memory: the new next state, the statistics, the tensor, its current state."""
assert RECORD_DTYPE.itemsize == 32


def _check(name: str, value: int, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, not {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be {low} to {high}, not {value!r}")
    return int(value)


def _flag(name: str, value: "bool | int") -> bool:
    if not isinstance(value, (bool, np.bool_)) and value not in (0, 1):
        raise ValueError(f"{name} must be a truth value, not {value!r}")
    return bool(value)


@dataclass(frozen=True)
class ControllerState:
    """How a tensor is stored.

    Parameters
    ----------
    scale : int
        Exponent of the tensor's scale, -64 to 64.
    lo, hi : int
        FP16 magnitude patterns, lo <= hi: see `golden.fgmp.Policy`.

    Raises
    ------
    TypeError, ValueError
        If a field is not an integer or out of its range.
    """

    scale: int = 0
    lo: int = 0
    hi: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", _check("scale", self.scale, -64, 64))
        for name in ("lo", "hi"):
            object.__setattr__(self, name, _check(name, getattr(self, name), 0, 0x7FFF))
        if self.lo > self.hi:
            raise ValueError(f"lo must be at most hi = {self.hi:#x}, not {self.lo!r}")


@dataclass(frozen=True)
class Statistics:
    """What the elements of a tensor were and became.

    Parameters
    ----------
    zero, underflow, fp8, fp16 : int
        Elements that were zero, became zero, or are kept in that precision; 0 to `COUNT_MAX`, where they saturate.
    top : int
        Largest FP16 exponent field of a finite element before FGMP (0 if there is none, or only zeros and subnormals).
    nonfinite : bool
        An element was infinite or NaN.

    Raises
    ------
    TypeError, ValueError
        If a field is not a number of its range.
    """

    zero: int = 0
    underflow: int = 0
    fp8: int = 0
    fp16: int = 0
    top: int = 0
    nonfinite: bool = False

    def __post_init__(self) -> None:
        for name in ("zero", "underflow", "fp8", "fp16"):
            object.__setattr__(self, name, _check(name, getattr(self, name), 0, COUNT_MAX))
        object.__setattr__(self, "top", _check("top", self.top, 0, 31))
        object.__setattr__(self, "nonfinite", _flag("nonfinite", self.nonfinite))

    def __add__(self, other: "Statistics") -> "Statistics":
        """Statistics of both together."""
        if not isinstance(other, Statistics):
            return NotImplemented
        counts = {
            name: min(getattr(self, name) + getattr(other, name), COUNT_MAX)
            for name in ("zero", "underflow", "fp8", "fp16")
        }
        return Statistics(**counts, top=max(self.top, other.top), nonfinite=self.nonfinite or other.nonfinite)


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What a tensor's statistics should be, and what may change for it.

    Parameters
    ----------
    adapt_scale, adapt_hi, adapt_lo : bool
        What may change.
    top : int
        Wanted exponent field of the largest element, 0 to 31 (15 is 1.0).
    slack : int
        It may be less by 0 to 7.
    hi_least, hi_most : int
        Wanted share of FP16 elements in the non-zeros, in units of 1/256: 0 to 255, hi_least <= hi_most.
    lo_least, lo_most : int
        Wanted share of underflows in the elements that were not zero, likewise.
    hi_min, hi_max, lo_min, lo_max : int
        Exponent fields between which `hi` and `lo` move: 0 to 31, the least first.

    Raises
    ------
    TypeError, ValueError
        If a field is not a number of its range.
    """

    adapt_scale: bool = False
    adapt_hi: bool = False
    adapt_lo: bool = False
    top: int = 0
    slack: int = 0
    hi_least: int = 0
    hi_most: int = 0
    lo_least: int = 0
    lo_most: int = 0
    hi_min: int = 0
    hi_max: int = 0
    lo_min: int = 0
    lo_max: int = 0

    def __post_init__(self) -> None:
        for name in ("adapt_scale", "adapt_hi", "adapt_lo"):
            object.__setattr__(self, name, _flag(name, getattr(self, name)))
        limits = {"top": 31, "slack": 7} | {
            f"{which}_{end}": 255 for which in ("hi", "lo") for end in ("least", "most")
        }
        limits |= {f"{which}_{end}": 31 for which in ("hi", "lo") for end in ("min", "max")}
        for name, high in limits.items():
            object.__setattr__(self, name, _check(name, getattr(self, name), 0, high))
        for which in ("hi", "lo"):
            for least, most in (("least", "most"), ("min", "max")):
                low, high = getattr(self, f"{which}_{least}"), getattr(self, f"{which}_{most}")
                if low > high:
                    raise ValueError(f"{which}_{least} must be at most {which}_{most} = {high}, not {low!r}")


def adapt(state: ControllerState, statistics: Statistics, targets: Targets) -> ControllerState:
    """The next state of a tensor that was stored with `state` and became `statistics`.

    `lo` moves by factors of two, `hi` by quarters of that in its pattern; neither moves past the other.
    """
    if statistics.nonfinite:
        return _after_overflow(state, targets)
    scale, lo, hi = state.scale, state.lo, state.hi
    nonzero = statistics.fp8 + statistics.fp16
    total = statistics.underflow + nonzero
    if total == 0:
        return state

    if targets.adapt_scale:
        if statistics.top > targets.top or statistics.top + targets.slack < targets.top:
            scale += statistics.top - targets.top
        scale = min(max(scale, SCALE_MIN), SCALE_MAX)

    if targets.adapt_hi:
        if statistics.fp16 * 256 > nonzero * targets.hi_most:
            if hi >> 10 < targets.hi_max:
                hi += _HI_STEP
        elif statistics.fp16 * 256 < nonzero * targets.hi_least and hi >> 10 > targets.hi_min and hi - _HI_STEP >= lo:
            hi -= _HI_STEP

    if targets.adapt_lo:
        if statistics.underflow * 256 > total * targets.lo_most:
            if lo >> 10 > targets.lo_min:
                lo -= _LO_STEP
        elif (
            statistics.underflow * 256 < total * targets.lo_least and lo >> 10 < targets.lo_max and lo + _LO_STEP <= hi
        ):
            lo += _LO_STEP
    return ControllerState(scale, lo, hi)


def _after_overflow(state: ControllerState, targets: Targets) -> ControllerState:
    scale, lo = state.scale, state.lo
    if targets.adapt_scale:
        scale = min(scale + 1, SCALE_MAX)
    if targets.adapt_lo:
        lo -= _LO_STEP * min(max((lo >> 10) - targets.lo_min, 0), 2)
    return replace(state, scale=scale, lo=lo)


def statistics_of(v_bits: ArrayLike, codes: ArrayLike, underflow: ArrayLike) -> Statistics:
    """Statistics of a stored tensor.

    Parameters
    ----------
    v_bits : uint16 array
        FP16 patterns before FGMP (`golden.fgmp.to_fp16`). What fills up the tensor's blocks is stored too: such zeros
        count on the chip.
    codes, underflow : uint8 array, bool array
        What `golden.fgmp.quantize` made of them.

    Raises
    ------
    TypeError
        If `v_bits` is not of type uint16 or `underflow` not of type bool.
    ValueError
        If shapes differ, or a code is none of those that are stored, or an underflow is not a zero.
    """
    v_bits, codes, underflow = np.asarray(v_bits), np.asarray(codes), np.asarray(underflow)
    if v_bits.dtype != np.uint16:
        raise TypeError(f"v_bits must be uint16, not {v_bits.dtype!r}")
    if underflow.dtype != np.bool_:
        raise TypeError(f"underflow must be bool, not {underflow.dtype!r}")
    if not v_bits.shape == codes.shape == underflow.shape:
        raise ValueError(f"shapes must be the same, not {v_bits.shape}, {codes.shape}, {underflow.shape}")
    fp8, fp16, zero = (np.count_nonzero(codes == code) for code in (CODE_FP8, CODE_FP16, CODE_ZERO))
    if fp8 + fp16 + zero != codes.size:
        raise ValueError("codes must be CODE_ZERO, CODE_FP8 or CODE_FP16")
    if (underflow & (codes != CODE_ZERO)).any():
        raise ValueError("underflow must be set for zeros only")
    under = np.count_nonzero(underflow)
    exponents: NDArray[np.uint16] = (v_bits >> np.uint16(10)) & np.uint16(0x1F)
    finite = exponents != 0x1F
    top = int(exponents[finite].max(initial=0))
    n0, nu, n8, n16 = (min(int(count), COUNT_MAX) for count in (zero - under, under, fp8, fp16))
    return Statistics(n0, nu, n8, n16, top, not finite.all())


@dataclass
class Controller:
    """The table of states and the running statistics: what the chip's block does, command by command.

    Parameters
    ----------
    tensor_states : int
        Entries of the table, 2 to 256. Tensors are 1 to tensor_states - 1. Every state is at first {0, 0, 0}.
    """

    tensor_states: int = 128
    statistics: Statistics = field(default_factory=Statistics, init=False)
    current: list[ControllerState] = field(init=False, repr=False)
    next: list[ControllerState] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check("tensor_states", self.tensor_states, 2, 256)
        self.current = [ControllerState()] * self.tensor_states
        self.next = [ControllerState()] * self.tensor_states

    def lookup(self, tensor: int) -> ControllerState:
        """The current state; {0, 0, 0} for 0 and for a number that is not in the table."""
        return self.current[tensor] if tensor < self.tensor_states else ControllerState()

    def store(self, statistics: Statistics) -> None:
        """Add to the running statistics."""
        self.statistics += statistics

    def state(self, tensor: int, state: ControllerState) -> None:
        """STATE: set the current and the next state."""
        self._entry(tensor)
        self.current[tensor] = self.next[tensor] = state

    def commit(self, tensor: int, frozen: bool = False) -> None:
        """COMMIT: the next state becomes the current one; if `frozen`, the current one becomes the next."""
        self._entry(tensor)
        if frozen:
            self.next[tensor] = self.current[tensor]
        else:
            self.current[tensor] = self.next[tensor]

    def adapt(self, tensor: int, targets: Targets) -> bytes:
        """ADAPT: the next state from the running statistics, which start anew; the record for the host."""
        self._entry(tensor)
        statistics, self.statistics = self.statistics, Statistics()
        state = self.next[tensor] = adapt(self.next[tensor], statistics, targets)
        current = self.current[tensor]
        record = np.zeros((), RECORD_DTYPE)
        for part in (state, statistics):
            for one in fields(part):
                record[one.name] = getattr(part, one.name)
        record["tensor"] = tensor
        record["current_scale"], record["current_lo"], record["current_hi"] = current.scale, current.lo, current.hi
        return record.tobytes()

    def _entry(self, tensor: int) -> None:
        _check("tensor", tensor, 1, self.tensor_states - 1)
