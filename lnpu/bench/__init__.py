"""The speed benchmark: single operations on the simulated chip, cycles against peak and bus, checked bit for bit."""
