"""Named choices of formats for a training step."""

from golden.fgmp import FP8_POLICY, FP16_POLICY, Policy
from lnpu.compiler.training import Formats

__all__ = ["FORMATS", "get_formats"]

_FGMP = Formats(
    # Most values in FP8; the largest, which carry the sums, in FP16.
    activation=Policy.between(2.0**-6, 2.0, below="fp8"),
    preactivation=Policy.between(2.0**-6, 2.0, below="fp8"),
    error=Policy.between(2.0**-6, 16.0, below="fp8", scale=-2),
    weight=Policy.between(2.0**-6, 8.0, below="fp8", scale=-5),
    gradient=FP16_POLICY,
)

FORMATS: dict[str, Formats] = {
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
"""FGMP with fixed thresholds, plain FP16, and FP8 for everything that crosses the bus but FP32 state."""


def get_formats(name: str) -> Formats:
    """Formats by name; `ValueError` lists the names if there are none."""
    if name not in FORMATS:
        raise ValueError(f"formats must be one of {', '.join(FORMATS)}, not {name!r}")
    return FORMATS[name]
