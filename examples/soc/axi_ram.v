// AXI4 slave: a RAM from address 0. INCR bursts of whole words, one burst at a time in each direction, a word a cycle.
// Addresses beyond it are answered with DECERR. A write is in the RAM when its response comes.
`default_nettype none
module axi_ram #(
    parameter ADDR_BITS = 40,
    parameter DATA_BITS = 64,
    parameter ID_BITS = 2,
    parameter LOG2_BYTES = 20
) (
    input  wire                   clk,
    input  wire                   rst,
    input  wire                   arvalid,
    output wire                   arready,
    input  wire [ADDR_BITS-1:0]   araddr,
    input  wire [7:0]             arlen,
    input  wire [ID_BITS-1:0]     arid,
    output reg                    rvalid,
    input  wire                   rready,
    output reg  [DATA_BITS-1:0]   rdata,
    output reg  [1:0]             rresp,
    output reg                    rlast,
    output reg  [ID_BITS-1:0]     rid,
    input  wire                   awvalid,
    output wire                   awready,
    input  wire [ADDR_BITS-1:0]   awaddr,
    input  wire [7:0]             awlen,
    input  wire [ID_BITS-1:0]     awid,
    input  wire                   wvalid,
    output wire                   wready,
    input  wire [DATA_BITS-1:0]   wdata,
    input  wire [DATA_BITS/8-1:0] wstrb,
    input  wire                   wlast,
    output reg                    bvalid,
    input  wire                   bready,
    output reg  [1:0]             bresp,
    output reg  [ID_BITS-1:0]     bid
);
    localparam LOG2_WORD = $clog2(DATA_BITS / 8);
    localparam INDEX_BITS = LOG2_BYTES - LOG2_WORD;
    localparam [1:0] OKAY = 2'd0, DECERR = 2'd3;

    reg [DATA_BITS-1:0] words [0:(1<<INDEX_BITS)-1];

    // Reads
    reg reading, read_outside;
    reg [INDEX_BITS-1:0] read_index;
    reg [7:0] read_left;
    reg [ID_BITS-1:0] read_id;
    assign arready = ~reading;
    wire read_step = reading & (~rvalid | rready);
    always @(posedge clk) begin
        if (rready)
            rvalid <= 1'b0;
        if (arvalid & arready) begin
            reading <= 1'b1;
            read_index <= araddr[LOG2_BYTES-1:LOG2_WORD];
            read_outside <= |araddr[ADDR_BITS-1:LOG2_BYTES];
            read_left <= arlen;
            read_id <= arid;
        end
        if (read_step) begin
            rvalid <= 1'b1;
            rdata <= words[read_index];
            rresp <= read_outside ? DECERR : OKAY;
            rlast <= read_left == 0;
            rid <= read_id;
            read_index <= read_index + 1'b1;
            read_left <= read_left - 1'b1;
            reading <= read_left != 0;
        end
        if (rst)
            {reading, rvalid} <= 2'b0;
    end

    // Writes
    reg writing, write_outside;
    reg [INDEX_BITS-1:0] write_index;
    reg [ID_BITS-1:0] write_id;
    assign awready = ~writing & ~bvalid;
    assign wready = writing;
    integer i;
    always @(posedge clk) begin
        if (bready)
            bvalid <= 1'b0;
        if (awvalid & awready) begin
            writing <= 1'b1;
            write_index <= awaddr[LOG2_BYTES-1:LOG2_WORD];
            write_outside <= |awaddr[ADDR_BITS-1:LOG2_BYTES];
            write_id <= awid;
        end
        if (wvalid & wready) begin
            for (i = 0; i < DATA_BITS / 8; i = i + 1)
                if (wstrb[i] & ~write_outside)
                    words[write_index][8*i +: 8] <= wdata[8*i +: 8];
            write_index <= write_index + 1'b1;
            if (wlast) begin
                writing <= 1'b0;
                bvalid <= 1'b1;
                bresp <= write_outside ? DECERR : OKAY;
                bid <= write_id;
            end
        end
        if (rst)
            {writing, bvalid} <= 2'b0;
    end

    // Bursts never cross 4 KiB, so their length is enough to find the end of a read, and WLAST that of a write.
    wire unused = &{1'b0, awlen, araddr[LOG2_WORD-1:0], awaddr[LOG2_WORD-1:0]};
endmodule
`default_nettype wire
