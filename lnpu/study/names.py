"""Names that training and reports share; needs no PyTorch."""

__all__ = ["COUNTS", "STUDY_NAMES"]

STUDY_NAMES = ("fp32", "fp16", "fp8", "fgmp", "dynamic")
"""Formats of the study: no quantisation, and those of `lnpu.compiler.policies`."""

COUNTS = ("zero", "underflow", "fp8", "fp16", "blocks", "masked", "mixed", "payload", "precision")
"""Counts that a result has of every tensor, in this order (see `lnpu.study.kernels.Stored`)."""
