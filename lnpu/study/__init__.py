"""The training study: what FGMP does to accuracy, with an emulation of the chip's numbers in PyTorch."""
