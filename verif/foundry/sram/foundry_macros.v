// Stand-ins for a foundry's two-port SRAM macros: active-low enables, a write mask by bit or by byte, pins for power-down
// and test, and no more promises than such macros make: random contents after power-up, wrong bits where a word is read
// and written in one cycle, and (unless HOLDS) no output that stays after the cycle behind a read.
`default_nettype none
module foundry_sram_1r1w #(
    parameter WORDS = 64,
    parameter BITS = 32,
    parameter ADDRESS = 6,
    parameter MASK = BITS,  // write enables: BITS, or BITS / 8
    parameter HOLDS = 1
) (
    input  wire               CLK,
    input  wire               PD,    // power-down
    input  wire               TEST,
    input  wire               WEB,
    input  wire [MASK-1:0]    BWEB,
    input  wire [ADDRESS-1:0] WA,
    input  wire [BITS-1:0]    D,
    input  wire               REB,
    input  wire [ADDRESS-1:0] RA,
    output reg  [BITS-1:0]    Q
);
    localparam EACH = BITS / MASK;
    reg [BITS-1:0] words [0:WORDS-1];

    integer w, b;
    initial
        for (w = 0; w < WORDS; w = w + 1)
            for (b = 0; b < BITS; b = b + 1)
                words[w][b] = $random;

    always @(posedge CLK) begin
        if (~WEB & ~PD & ~TEST)
            for (b = 0; b < BITS; b = b + 1)
                if (~BWEB[b/EACH])
                    words[WA][b] <= D[b];
        if (~REB & ~PD & ~TEST)
            Q <= words[RA] ^ {BITS{~WEB && WA == RA}};
        else if (HOLDS == 0)
            Q <= ~Q;
    end
endmodule
`default_nettype wire
