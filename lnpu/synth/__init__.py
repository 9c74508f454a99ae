"""Synthesis to a cell library: area by block, critical paths by static timing analysis, comparison with peers."""
