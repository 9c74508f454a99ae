"""What a system around the chip needs besides the Verilog, all from the tables of `lnpu.ctrl` and the configuration."""
