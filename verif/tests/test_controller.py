"""The FGMP controller and its twin, see `verif/plans/controller.md`."""

from dataclasses import asdict, replace
from itertools import pairwise
from random import Random

import numpy as np
import pytest

from golden.controller import (
    COUNT_MAX,
    RECORD_DTYPE,
    Controller,
    ControllerState,
    Statistics,
    Targets,
    adapt,
    statistics_of,
)
from golden.fgmp import Policy, quantize, quantize_scalar
from lnpu.config import TINY
from lnpu.fgmp.controller import FgmpController
from verif.controller_model import (
    LOOP_TARGETS,
    closed_loop,
    random_state,
    random_statistics,
    random_targets,
    reference,
)
from verif.runner import run

ALL = Targets(
    adapt_scale=True, adapt_hi=True, adapt_lo=True, top=20, slack=2, hi_least=64, hi_most=128, lo_least=16, lo_most=32,
    hi_min=10, hi_max=20, lo_min=5, lo_max=15,
)  # fmt: skip
STATE = ControllerState(3, 0x2855, 0x3CAA)  # exponents 10 and 15


@pytest.mark.parametrize(
    ("entries", "address_bits"), [(128, 40), (2, 32), (5, 36), (256, 40)], ids=lambda value: str(value)
)
def test_controller(entries: int, address_bits: int) -> None:
    config = TINY.replace(tensor_states=entries, address_bits=address_bits)
    full = entries == TINY.tensor_states
    run(
        FgmpController(config=config),
        "verif.controller_tb",
        config=asdict(config),
        adapts=1000 if full else 300,
        large=30 if full else 0,
    )


@pytest.mark.parametrize(
    ("statistics", "scale", "lo", "hi"),
    [
        (Statistics(1000, 0, 0, 0, 31), 0, 0, 0),  # nothing but zeros
        (Statistics(0, 12, 68, 34, 20), 0, 0, 0),  # in both bands
        (Statistics(0, 0, 128, 128, 20), 0, 1, 0),  # exactly hi_most; too few underflows
        (Statistics(0, 32, 112, 112, 20), 0, 0, 0),  # exactly both upper thresholds
        (Statistics(0, 32, 111, 113, 20), 0, 0, 1),
        (Statistics(0, 33, 112, 111, 20), 0, -1, 0),
        (Statistics(0, 16, 180, 60, 20), 0, 0, 0),  # exactly both lower thresholds
        (Statistics(0, 16, 181, 59, 20), 0, 0, -1),
        (Statistics(0, 15, 180, 61, 20), 0, 1, 0),
        (Statistics(0, 100, 0, 0, 20), 0, -1, 0),  # no non-zero is left
        (Statistics(0, 12, 68, 34, 21), 1, 0, 0),
        (Statistics(0, 12, 68, 34, 30), 10, 0, 0),
        (Statistics(0, 12, 68, 34, 18), 0, 0, 0),  # within the slack
        (Statistics(0, 12, 68, 34, 17), -3, 0, 0),
        (Statistics(0, 0, 1, 99, 17, True), 1, -2, 0),
        (Statistics(9, 0, 0, 0, 0, True), 1, -2, 0),
    ],
)
def test_adapt_by_hand(statistics: Statistics, scale: int, lo: int, hi: int) -> None:
    """One decision at a time; lo and hi in factors of two."""
    wanted = ControllerState(STATE.scale + scale, STATE.lo + 0x400 * lo, STATE.hi + 0x100 * hi)
    assert adapt(STATE, statistics, ALL) == wanted
    for name, kept in (("adapt_scale", "scale"), ("adapt_lo", "lo"), ("adapt_hi", "hi")):
        assert adapt(STATE, statistics, replace(ALL, **{name: False})) == replace(
            wanted, **{kept: getattr(STATE, kept)}
        )


def test_adapt_limits() -> None:
    up, down = Statistics(0, 0, 0, 1, 30), Statistics(0, 3, 4, 0, 0)
    assert adapt(replace(STATE, scale=62), up, ALL).scale == 63
    assert adapt(replace(STATE, scale=-60), down, ALL).scale == -64
    assert adapt(replace(STATE, scale=63), Statistics(nonfinite=True), ALL).scale == 63
    assert adapt(replace(STATE, scale=64), Statistics(fp8=1, top=20), ALL).scale == 63
    assert adapt(replace(STATE, hi=0x53FF), up, ALL).hi == 0x53FF  # hi_max
    assert adapt(replace(STATE, hi=0x2BFF), down, ALL).hi == 0x2BFF  # hi_min
    assert adapt(replace(STATE, lo=0x17FF), down, ALL).lo == 0x17FF  # lo_min
    assert adapt(replace(STATE, lo=0x3C00), up, ALL).lo == 0x3C00  # lo_max
    for exponent, wanted in ((8, 6), (7, 5), (6, 5), (5, 5), (4, 4), (0, 0)):  # lo_min is 5
        overflow = adapt(ControllerState(0, exponent << 10 | 9, 0x7000), Statistics(nonfinite=True), ALL)
        assert overflow.lo == wanted << 10 | 9
    # lo and hi do not pass each other
    few = Statistics(0, 24, 100, 0, 20)
    assert adapt(ControllerState(0, 0x3301, 0x3400), few, ALL).hi == 0x3400
    assert adapt(ControllerState(0, 0x3300, 0x3400), few, ALL).hi == 0x3300
    none = Statistics(0, 0, 70, 30, 20)
    assert adapt(ControllerState(0, 0x3001, 0x3400), none, ALL).lo == 0x3001
    assert adapt(ControllerState(0, 0x3000, 0x3400), none, ALL).lo == 0x3400


def test_adapt_against_reference() -> None:
    random = Random(1)
    moves = set()
    for _ in range(40_000):
        targets = random_targets(random)
        state = random_state(random, targets)
        statistics = random_statistics(random, targets, random.choice((300, 4000, COUNT_MAX)))
        got = adapt(state, statistics, targets)
        assert got == reference(state, statistics, targets), (state, statistics, targets)
        assert -64 <= got.scale <= 64 and got.lo <= got.hi
        moves.add((got.lo - state.lo, got.hi - state.hi))
    assert {lo for lo, _ in moves} == {-0x800, -0x400, 0, 0x400}
    assert {hi for _, hi in moves} == {-0x100, 0, 0x100}


def test_statistics_of() -> None:
    rng = np.random.default_rng(2)
    for below, above in (("zero", "fp16"), ("fp8", "fp8"), ("fp16", "fp16")):
        v_bits = rng.integers(0, 1 << 16, (7, 60)).astype(np.uint16)
        policy = Policy(0, 0x2000, 0x5000, below, above)
        for part in (v_bits, v_bits & np.uint16(0x9FFF), v_bits[:0], v_bits & np.uint16(0x83FF)):
            _, codes, underflow = quantize(part, policy)
            scalars = [quantize_scalar(int(v), policy) for v in part.ravel()]
            exponents = [int(v) >> 10 & 31 for v in part.ravel()]
            assert statistics_of(part, codes, underflow) == Statistics(
                sum(code == 0 and not under for _, code, under in scalars),
                sum(under for *_, under in scalars),
                sum(code == 2 for _, code, _ in scalars),
                sum(code == 3 for _, code, _ in scalars),
                max((e for e in exponents if e != 31), default=0),
                31 in exponents,
            )
            halves = [
                statistics_of(*(a[rows] for a in (part, codes, underflow))) for rows in (slice(3), slice(3, None))
            ]
            assert halves[0] + halves[1] == statistics_of(part, codes, underflow)


def test_statistics_saturate() -> None:
    most = Statistics(COUNT_MAX, COUNT_MAX - 1, 5, COUNT_MAX, 3)
    assert most + Statistics(1, 1, 1, 0, 2, True) == Statistics(COUNT_MAX, COUNT_MAX, 6, COUNT_MAX, 3, True)
    shape = (COUNT_MAX + 5,)
    zeros = (np.broadcast_to(np.zeros((), dtype), shape) for dtype in (np.uint16, np.uint8, bool))
    assert statistics_of(*zeros) == Statistics(COUNT_MAX)


def test_validation() -> None:
    bits, codes, under = np.zeros(4, np.uint16), np.zeros(4, np.uint8), np.zeros(4, bool)
    for wrong in (
        lambda: ControllerState(scale=65),
        lambda: ControllerState(scale=-65),
        lambda: ControllerState(hi=0x8000),
        lambda: ControllerState(lo=2, hi=1),
        lambda: Statistics(zero=-1),
        lambda: Statistics(fp16=COUNT_MAX + 1),
        lambda: Statistics(top=32),
        lambda: Statistics(nonfinite=2),
        lambda: Targets(top=32),
        lambda: Targets(slack=8),
        lambda: Targets(adapt_hi=3),
        lambda: Targets(hi_most=256),
        lambda: Targets(hi_least=2, hi_most=1),
        lambda: Targets(lo_least=2, lo_most=1),
        lambda: Targets(hi_min=2, hi_max=1),
        lambda: Targets(lo_min=2, lo_max=1),
        lambda: Controller(1),
        lambda: Controller(257),
        lambda: Controller(8).commit(8),
        lambda: Controller(8).adapt(0, ALL),
        lambda: Controller(8).state(-1, STATE),
        lambda: statistics_of(bits, codes + 1, under),
        lambda: statistics_of(bits, codes[:2], under),
        lambda: statistics_of(bits, codes + 2, ~under),
        lambda: TINY.replace(tensor_states=1),
        lambda: TINY.replace(tensor_states=257),
    ):
        with pytest.raises(ValueError, match=r"must be"):
            wrong()
    for wrong_type in (
        lambda: ControllerState(scale=1.0),
        lambda: Statistics(fp8=True),
        lambda: Targets(top="5"),
        lambda: statistics_of(bits.astype(int), codes, under),
        lambda: statistics_of(bits, codes, codes),
    ):
        with pytest.raises(TypeError, match=r"must be"):
            wrong_type()


def test_controller_model() -> None:
    """The table: states by tensor, what COMMIT does, statistics and the record of ADAPT."""
    table = Controller(8)
    assert table.lookup(0) == table.lookup(7) == table.lookup(200) == ControllerState()
    table.state(7, STATE)
    table.store(Statistics(1, 12, 68, 30, 25))
    table.store(Statistics(0, 0, 0, 4, 3))
    record = np.frombuffer(table.adapt(7, ALL), RECORD_DTYPE)[0]
    assert table.statistics == Statistics()
    changed = replace(STATE, scale=8)
    assert (table.lookup(7), table.next[7]) == (STATE, changed)
    assert {name: int(record[name]) for name in RECORD_DTYPE.names if name != "reserved"} == {
        "scale": 8, "lo": STATE.lo, "hi": STATE.hi, "zero": 1, "underflow": 12, "fp8": 68, "fp16": 34, "top": 25,
        "nonfinite": 0, "tensor": 7, "current_scale": 3, "current_lo": STATE.lo, "current_hi": STATE.hi,
    }  # fmt: skip
    table.commit(7)
    assert table.lookup(7) == changed and table.lookup(6) == ControllerState()
    table.store(Statistics(0, 12, 68, 34, 25))
    table.adapt(7, ALL)
    table.commit(7, frozen=True)
    assert table.lookup(7) == table.next[7] == changed


def _in_band(statistics: Statistics, targets: Targets) -> bool:
    nonzero = statistics.fp8 + statistics.fp16
    total = nonzero + statistics.underflow
    return (
        targets.top - targets.slack <= statistics.top <= targets.top
        and targets.hi_least * nonzero <= 256 * statistics.fp16 <= targets.hi_most * nonzero
        and targets.lo_least * total <= 256 * statistics.underflow <= targets.lo_most * total
    )


@pytest.mark.parametrize("seed", range(10))
def test_convergence(seed: int) -> None:
    """After each change of the distribution the loop is in the band within thirty tensors, then nothing swings back."""
    phases: dict[str, list] = {}
    for phase, _, state, _, statistics in closed_loop(seed, steps=40, beat=4096):
        phases.setdefault(phase, []).append((state, statistics))
    zeros = [state for state, _ in phases.pop("only zeros")]
    assert len(set(zeros)) == 1
    for phase, steps in phases.items():
        good = [_in_band(statistics, LOOP_TARGETS) for _, statistics in steps]
        first = good.index(True)
        assert first < 30, phase
        for name in ("scale", "lo", "hi"):
            values = [getattr(state, name) for state, _ in steps[first:]]
            changes = [b - a for a, b in pairwise(values) if a != b]
            assert len(changes) <= (8 if name == "hi" else 2), (phase, name)
            assert all(change > 0 for change in changes) or all(change < 0 for change in changes), (phase, name)


def test_narrow_band_oscillates() -> None:
    """Why docs/fgmp.md asks for bands that a step cannot jump over."""
    narrow = replace(LOOP_TARGETS, adapt_scale=False, adapt_lo=False, hi_least=60, hi_most=61, hi_max=28)
    loop = closed_loop(0, steps=40, beat=4096, targets=narrow)
    his = [state.hi for phase, _, state, _, _ in loop if phase == "Gaussian"]
    moves = [b - a for a, b in pairwise(his)][-6:]
    assert all(a == -b != 0 for a, b in pairwise(moves))
