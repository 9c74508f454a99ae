"""Verification: cocotb testbenches (`*_tb.py`, run inside the simulator) and the pytest entry points (`tests/`)."""
