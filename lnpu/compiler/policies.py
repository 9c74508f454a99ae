"""Named choices of formats for a training step, static and dynamic."""

from dataclasses import fields
from typing import Any

from golden.controller import Targets
from golden.fgmp import FP8_POLICY, FP16_POLICY, Policy
from lnpu.compiler.training import Formats

__all__ = ["FORMATS", "STUDY_TARGETS", "TARGETS", "get_formats"]

_FGMP = Formats(
    # Most values in FP8; the largest, which carry the sums, in FP16.
    activation=Policy.between(2.0**-6, 2.0, below="fp8"),
    preactivation=Policy.between(2.0**-6, 2.0, below="fp8"),
    error=Policy.between(2.0**-6, 16.0, below="fp8", scale=-2),
    weight=Policy.between(2.0**-6, 8.0, below="fp8", scale=-5),
    gradient=FP16_POLICY,
)

_RANGE: dict[str, Any] = {
    "adapt_scale": True,
    "top": 23,
    "slack": 2,
}  # the largest element from 64 to 511, at FP8's upper end
_SHARE: dict[str, Any] = {
    "adapt_hi": True,
    "hi_least": 2,
    "hi_most": 12,
    "hi_min": 8,
    "hi_max": 23,
}  # 0.8% to 4.7% of non-zeros in FP16
_ERROR_SHARE: dict[str, Any] = _SHARE | {"hi_least": 1, "hi_most": 6}  # 0.4% to 2.3%
_FLUSH: dict[str, Any] = {
    "adapt_lo": True,
    "lo_least": 51,
    "lo_most": 90,
    "lo_min": 1,
    "lo_max": 16,
}  # 20% to 35% of errors to zero

_START = Policy.between(2.0**-6, 64.0, below="fp8")

TARGETS: dict[str, dict[str, Targets]] = {
    "dynamic": {
        "activation": Targets(**_RANGE, **_SHARE),
        "preactivation": Targets(**_RANGE, **_SHARE),
        "weight": Targets(**_RANGE, **_SHARE),
        "error": Targets(**_RANGE, **_ERROR_SHARE, **_FLUSH),
        "gradient": Targets(**_RANGE, **_SHARE),
    }
}
"""For formats whose policies the chip adjusts: what it steers the kinds of tensors to."""

FORMATS: dict[str, Formats] = {
    "dynamic": Formats(
        activation=_START.with_scale(-5),
        preactivation=_START.with_scale(-5),
        error=Policy.between(2.0**-6, 64.0, below="zero", scale=-4),
        weight=_START.with_scale(-8),
        gradient=_START,
    ),
    "fgmp": _FGMP,
    "fp16": Formats(),
    "fp8": Formats(
        activation=FP8_POLICY,
        preactivation=FP8_POLICY,
        error=FP8_POLICY.with_scale(-2),
        weight=FP8_POLICY.with_scale(-5),
        gradient=FP8_POLICY,
    ),
}
"""FGMP with thresholds and scales that the chip adjusts, FGMP with fixed ones, plain FP16, and FP8 throughout."""

# With scales that follow the tensors, as FP8 is used elsewhere.
STUDY_TARGETS: dict[str, dict[str, Targets]] = TARGETS | {
    "fp8": {kind.name: Targets(**_RANGE) for kind in fields(Formats) if getattr(FORMATS["fp8"], kind.name) is not None},
}
"""What the formats of `lnpu fgmp-study` steer to, where they are dynamic: as `TARGETS`, and FP8 too."""


def get_formats(name: str) -> Formats:
    """Formats by name; `ValueError` lists the names if there are none."""
    if name not in FORMATS:
        raise ValueError(f"formats must be one of {', '.join(FORMATS)}, not {name!r}")
    return FORMATS[name]
