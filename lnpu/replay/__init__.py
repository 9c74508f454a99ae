"""A training step on the chip operation by operation, each in a simulation of its own, compared bit for bit."""
