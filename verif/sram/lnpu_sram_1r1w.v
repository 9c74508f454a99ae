// The SRAM of rtl/sram, but a read of a word that is written in the same cycle returns wrong bits: the complement of the
// old word in each granule that is written. A chip that works with it never uses such a read.
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
        for (g = 0; g < WIDTH/GRANULARITY; g = g + 1) begin
            if (w_en[g])
                words[w_addr][g*GRANULARITY +: GRANULARITY] <= w_data[g*GRANULARITY +: GRANULARITY];
            if (r_en)
                r_data[g*GRANULARITY +: GRANULARITY] <=
                    words[r_addr][g*GRANULARITY +: GRANULARITY] ^ {GRANULARITY{w_en[g] && w_addr == r_addr}};
        end
    end
endmodule
`default_nettype wire
