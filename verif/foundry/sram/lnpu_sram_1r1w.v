// The wrapper of docs/integration.md around the macros of foundry_macros.v, for the shapes of `tiny`. Each shape shows
// another way: a mask by bit, a macro a granule, words or bits that several macros make up, an output that the macro
// does not hold, and small shapes that become flip-flops.
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
    output wire [WIDTH-1:0]             r_data
);
    localparam GRANULES = WIDTH / GRANULARITY;
    wire [WIDTH-1:0] mask;  // an enable a bit
    genvar g;
    generate
        for (g = 0; g < GRANULES; g = g + 1) begin : granule
            assign mask[g*GRANULARITY +: GRANULARITY] = {GRANULARITY{w_en[g]}};
        end

        if ((DEPTH == 1024 && WIDTH == 128) || (DEPTH == 128 && WIDTH == 32)) begin : by_bit
            foundry_sram_1r1w #(.WORDS(DEPTH), .BITS(WIDTH), .ADDRESS(ADDR_BITS)) macro (
                .CLK(clk), .PD(1'b0), .TEST(1'b0), .WEB(~|w_en), .BWEB(~mask), .WA(w_addr), .D(w_data),
                .REB(~r_en), .RA(r_addr), .Q(r_data));
        end else if (DEPTH == 256 && WIDTH == 76) begin : by_granule
            for (g = 0; g < GRANULES; g = g + 1) begin : part
                foundry_sram_1r1w #(.WORDS(DEPTH), .BITS(GRANULARITY), .ADDRESS(ADDR_BITS), .MASK(1)) macro (
                    .CLK(clk), .PD(1'b0), .TEST(1'b0), .WEB(~w_en[g]), .BWEB(1'b0), .WA(w_addr),
                    .D(w_data[g*GRANULARITY +: GRANULARITY]), .REB(~r_en), .RA(r_addr),
                    .Q(r_data[g*GRANULARITY +: GRANULARITY]));
            end
        end else if (WIDTH == 102 || WIDTH == 408) begin : side_by_side
            for (g = 0; g < WIDTH / 51; g = g + 1) begin : part
                foundry_sram_1r1w #(.WORDS(DEPTH), .BITS(51), .ADDRESS(ADDR_BITS)) macro (
                    .CLK(clk), .PD(1'b0), .TEST(1'b0), .WEB(~|w_en), .BWEB(~mask[51*g +: 51]), .WA(w_addr),
                    .D(w_data[51*g +: 51]), .REB(~r_en), .RA(r_addr), .Q(r_data[51*g +: 51]));
            end
        end else if ((DEPTH == 2048 && WIDTH == 16) || DEPTH == 32) begin : words_of_two
            // Which macro was read last, and, as they do not hold it, what came.
            wire [WIDTH-1:0] q [0:1];
            reg last, fresh;
            reg [WIDTH-1:0] kept;
            for (g = 0; g < 2; g = g + 1) begin : half
                foundry_sram_1r1w #(.WORDS(DEPTH/2), .BITS(WIDTH), .ADDRESS(ADDR_BITS-1), .HOLDS(0)) macro (
                    .CLK(clk), .PD(1'b0), .TEST(1'b0), .WEB(~(|w_en & w_addr[ADDR_BITS-1] == g)), .BWEB(~mask),
                    .WA(w_addr[ADDR_BITS-2:0]), .D(w_data), .REB(~(r_en & r_addr[ADDR_BITS-1] == g)), .RA(r_addr[ADDR_BITS-2:0]), .Q(q[g]));
            end
            assign r_data = fresh ? q[last] : kept;
            always @(posedge clk) begin
                fresh <= r_en;
                kept <= r_data;
                if (r_en)
                    last <= r_addr[ADDR_BITS-1];
            end
        end else if (DEPTH * WIDTH <= 4096) begin : flip_flops
            reg [WIDTH-1:0] words [0:DEPTH-1];
            reg [WIDTH-1:0] read;
            integer n;
            assign r_data = read;
            always @(posedge clk) begin
                for (n = 0; n < WIDTH; n = n + 1)
                    if (mask[n])
                        words[w_addr][n] <= w_data[n];
                if (r_en)
                    read <= words[r_addr];
            end
        end else begin : unknown
            lnpu_sram_of_this_shape_is_missing stop ();  // elaboration must not go on silently
        end
    endgenerate
endmodule
`default_nettype wire
