"""What the controller's tests share: the rule written down anew, statistics at its corners, a closed loop."""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from fractions import Fraction
from random import Random

import numpy as np

from golden.controller import COUNT_MAX, Controller, ControllerState, Statistics, Targets, statistics_of
from golden.fgmp import Policy, quantize, to_fp16

__all__ = [
    "LOOP_PHASES",
    "LOOP_START",
    "LOOP_TARGETS",
    "closed_loop",
    "random_state",
    "random_statistics",
    "random_targets",
    "reference",
]


def reference(state: ControllerState, statistics: Statistics, targets: Targets) -> ControllerState:
    """`golden.controller.adapt`, in rational shares and numbered as in docs/fgmp.md."""
    s, t = asdict(state), targets

    def exponent(name):
        return s[name] // 0x400

    def saturate(scale):
        return sorted((-64, scale, 63))[1]

    if statistics.nonfinite:  # 1
        if t.adapt_scale:
            s["scale"] = saturate(s["scale"] + 1)
        for _ in range(2):
            if t.adapt_lo and exponent("lo") > t.lo_min:
                s["lo"] -= 0x400
        return ControllerState(**s)
    nonzero, total = statistics.fp8 + statistics.fp16, statistics.underflow + statistics.fp8 + statistics.fp16
    if not total:  # 2
        return state
    if t.adapt_scale:  # 3
        over, under = max(statistics.top - t.top, 0), max(t.top - statistics.top, 0)
        s["scale"] = saturate(s["scale"] + over - (under if under > t.slack else 0))
    if t.adapt_hi and nonzero:  # 4
        share = Fraction(statistics.fp16, nonzero)
        if share > Fraction(t.hi_most, 256) and exponent("hi") < t.hi_max:
            s["hi"] += 0x100
        if share < Fraction(t.hi_least, 256) and exponent("hi") > t.hi_min and s["hi"] - s["lo"] >= 0x100:
            s["hi"] -= 0x100
    if t.adapt_lo:  # 5
        share = Fraction(statistics.underflow, total)
        if share > Fraction(t.lo_most, 256) and exponent("lo") > t.lo_min:
            s["lo"] -= 0x400
        if share < Fraction(t.lo_least, 256) and exponent("lo") < t.lo_max and s["hi"] - s["lo"] >= 0x400:
            s["lo"] += 0x400
    return ControllerState(**s)


def _pair(random: Random, bits: int) -> list[int]:
    """Two numbers of that many bits in order, often equal or at an end."""
    most = (1 << bits) - 1
    draw = [random.choice((0, 1, most, random.randint(0, most), random.randint(0, most))) for _ in range(2)]
    return sorted(draw if random.random() < 0.8 else draw[:1] * 2)


def random_targets(random: Random) -> Targets:
    """Any valid targets; most adapt everything."""
    (hi_least, hi_most), (lo_least, lo_most) = _pair(random, 8), _pair(random, 8)
    (hi_min, hi_max), (lo_min, lo_max) = _pair(random, 5), _pair(random, 5)
    scale, hi, lo = (random.random() < 0.85 for _ in range(3))
    return Targets(
        adapt_scale=scale,
        adapt_hi=hi,
        adapt_lo=lo,
        top=random.randint(0, 31),
        slack=random.randint(0, 7),
        hi_least=hi_least,
        hi_most=hi_most,
        lo_least=lo_least,
        lo_most=lo_most,
        hi_min=hi_min,
        hi_max=hi_max,
        lo_min=lo_min,
        lo_max=lo_max,
    )


def random_state(random: Random, targets: Targets | None = None) -> ControllerState:
    """Any valid state; with `targets`, often one with lo or hi at a limit, or lo one step below hi."""
    scale = random.choice((-64, -63, 62, 63, 64, random.randint(-64, 64), random.randint(-64, 64)))
    lo, hi = sorted(random.getrandbits(15) for _ in range(2))
    near = [lo - 1, lo, lo + 1]
    if targets:
        near += [(getattr(targets, name) + d) * 0x400 | lo & 0x3FF for name in ("lo_min", "lo_max") for d in (0, 1, 2)]
    if random.random() < 0.6:
        lo = min(max(random.choice(near), 0), 0x7FFF)
        hi = random.choice((hi, lo, lo + 0xFF, lo + 0x100, lo + 0x101, lo + 0x3FF, lo + 0x400, lo + 0x401, lo + 0x800))
        if targets and random.random() < 0.5:
            hi = (getattr(targets, random.choice(("hi_min", "hi_max"))) << 10) | hi & 0x3FF
    hi = min(max(hi, 0), 0x7FFF)
    return ControllerState(scale, min(lo, hi), hi)


def random_statistics(random: Random, targets: Targets, most: int = COUNT_MAX) -> Statistics:
    """Statistics with counts up to `most`, often at or beside one of the thresholds."""

    def count() -> int:
        return random.choice((0, 0, 1, most, most - 1, random.randint(0, most), int(most ** random.random())))

    zero, under, fp8, fp16 = count(), count(), count(), count()
    style = random.random()
    if style < 0.35:  # FP16 in the non-zeros
        share = random.choice((targets.hi_least, targets.hi_most))
        nonzero = random.randint(1, most) if random.random() < 0.3 else 256 * random.randint(1, max(most // 256, 1))
        fp16 = min(max(nonzero * share // 256 + random.randint(-1, 1), 0), nonzero)
        fp8 = nonzero - fp16
    elif style < 0.7:  # underflows in what was not zero
        share = random.choice((targets.lo_least, targets.lo_most))
        total = random.randint(1, most) if random.random() < 0.3 else 256 * random.randint(1, max(most // 256, 1))
        under = min(max(total * share // 256 + random.randint(-1, 1), 0), total)
        fp16 = random.randint(0, total - under)
        fp8 = total - under - fp16
    elif style < 0.8:
        under = fp8 = fp16 = 0
    near = targets.top + random.choice((0, 1, -1, -targets.slack, -targets.slack - 1, -targets.slack + 1))
    top = random.choice((near, near, random.randint(0, 30)))
    return Statistics(zero, under, fp8, fp16, min(max(top, 0), 30), random.random() < 0.1)


def _gauss(scale: float) -> Callable[[np.random.Generator, int], np.ndarray]:
    return lambda rng, n: rng.normal(0, scale, n)


LOOP_PHASES = {
    "Gaussian": _gauss(1.0),
    "much smaller": _gauss(2.0**-13),
    "Laplacian": lambda rng, n: rng.laplace(0, 37.0, n),
    "after a ReLU": lambda rng, n: np.maximum(rng.normal(-0.3, 0.01, n) + rng.normal(0, 0.4, n), 0),
    "log-normal": lambda rng, n: rng.lognormal(3, 1, n) * rng.choice((-1, 1), n),
    "only zeros": lambda rng, n: np.zeros(n),
    "Gaussian again": _gauss(1.0),
}
"""Distributions that follow one another."""

LOOP_TARGETS = Targets(
    adapt_scale=True,
    adapt_hi=True,
    adapt_lo=True,
    top=24,
    slack=3,
    hi_least=8,
    hi_most=32,
    lo_least=4,
    lo_most=24,
    hi_min=8,
    hi_max=23,
    lo_min=4,
    lo_max=20,
)
"""3 to 37 % of the non-zeros in FP16, 1.6 to 9 % underflows, the largest element from 64 to 1023."""

LOOP_START = ControllerState(-8, 0x4400, 0x5800)


def closed_loop(
    seed: int, *, steps: int = 14, elements: int = 4096, beat: int = 16, targets: Targets = LOOP_TARGETS
) -> Iterator[tuple[str, int, ControllerState, list[Statistics], Statistics]]:
    """Store random tensors with the state that the statistics of the one before led to.

    Yields phase, step in the phase, state in use, statistics of each beat and of the whole tensor.
    """
    rng = np.random.default_rng(seed)
    controller = Controller(2)
    controller.state(1, LOOP_START)
    for phase, draw in LOOP_PHASES.items():
        for step in range(steps):
            controller.commit(1)
            state = controller.lookup(1)
            v_bits = to_fp16(draw(rng, elements).astype(np.float32), state.scale, saturate=True)
            _, codes, under = quantize(v_bits, Policy(state.scale, state.lo, state.hi, "zero", "fp16"))
            beats = [
                statistics_of(*(part[at : at + beat] for part in (v_bits, codes, under)))
                for at in range(0, elements, beat)
            ]
            whole = statistics_of(v_bits, codes, under)
            controller.store(whole)
            controller.adapt(1, targets)
            yield phase, step, state, beats, whole
