// One-read one-write synchronous SRAM: the one memory primitive of the chip. Replace this file by a wrapper around
// foundry macros; the contract is below.
//
//   write: at a rising edge, each granule g with w_en[g] set is written to word w_addr
//   read:  at a rising edge with r_en set, r_data takes word r_addr and holds it until the next read
//   both at one address in one cycle: this model returns the old word; the chip never uses it, so a macro may return any
//   contents after power-up are undefined; nothing in the chip reads a word that it has not written
`default_nettype none
module lnpu_sram_1r1w #(
    parameter DEPTH = 64,
    parameter WIDTH = 32,
    parameter GRANULARITY = WIDTH,
    parameter ADDR_BITS = 6
) (
    input  wire                         clk,
    input  wire [WIDTH/GRANULARITY-1:0] w_en,
    input  wire [ADDR_BITS-1:0]         w_addr,
    input  wire [WIDTH-1:0]             w_data,
    input  wire                         r_en,
    input  wire [ADDR_BITS-1:0]         r_addr,
    output reg  [WIDTH-1:0]             r_data
);
    reg [WIDTH-1:0] words [0:DEPTH-1];

    integer g;
    always @(posedge clk) begin
        if (r_en)
            r_data <= words[r_addr];
        // Read first, and only here: a blocking write is the same, and spares simulators a copy of it.
        // verilator lint_off BLKSEQ
        if (|w_en)
            for (g = 0; g < WIDTH/GRANULARITY; g = g + 1)
                if (w_en[g])
                    words[w_addr][g*GRANULARITY +: GRANULARITY] = w_data[g*GRANULARITY +: GRANULARITY];
        // verilator lint_on BLKSEQ
    end
endmodule
`default_nettype wire
