// Clock gate: what stops the clock of an idle core. Replace this file by a wrapper around a foundry's integrated clock
// gating cell (latch and AND, enable sampled while the clock is low); the contract is below.
//
//   gated_clk has a pulse for each pulse of clk before whose rising edge enable or test_enable was set
//   enable is from registers of the same clock, and is stable in time for the rising edge, as the data of a flip-flop
//   test_enable is for scan: the chip ties it to 0
//
// The gate changes nothing but power: with LNPU_NO_CLOCK_GATING defined it is a wire, for FPGAs and whoever wants none.
`default_nettype none
module lnpu_clock_gate (
    input  wire clk,
    input  wire enable,
    input  wire test_enable,
    output wire gated_clk
);
`ifdef LNPU_NO_CLOCK_GATING
    // verilator lint_off UNUSEDSIGNAL
    wire unused = enable | test_enable;
    // verilator lint_on UNUSEDSIGNAL
    assign gated_clk = clk;
`else
    reg open;

    // verilator lint_off LATCH
    always @*
        if (!clk)
            open = enable | test_enable;
    // verilator lint_on LATCH

    assign gated_clk = clk & open;
`endif
endmodule
`default_nettype wire
