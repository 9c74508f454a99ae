"""Formal proofs of the blocks: one file a property, all run by `python -m verif.formal`."""
