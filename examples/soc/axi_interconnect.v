// AXI4 interconnect, two masters, one slave. Each direction grants address by address, in turn where both ask. Write
// data follow in the order of the granted addresses; responses find their way by the top bit of the slave's ID.
`default_nettype none
module axi_interconnect #(
    parameter ADDR_BITS = 40,
    parameter DATA_BITS = 64,
    parameter ID_BITS = 1,         // of a master; the slave has one more
    parameter LOG2_WRITES = 4      // granted writes whose data have not all come: up to 2 to this power
) (
    input  wire                     clk,
    input  wire                     rst,

    // Masters: bit or field m of each belongs to master m.
    input  wire [1:0]               m_arvalid,
    output wire [1:0]               m_arready,
    input  wire [2*ADDR_BITS-1:0]   m_araddr,
    input  wire [15:0]              m_arlen,
    input  wire [2*ID_BITS-1:0]     m_arid,
    output wire [1:0]               m_rvalid,
    input  wire [1:0]               m_rready,
    output wire [DATA_BITS-1:0]     m_rdata,
    output wire [1:0]               m_rresp,
    output wire                     m_rlast,
    output wire [ID_BITS-1:0]       m_rid,
    input  wire [1:0]               m_awvalid,
    output wire [1:0]               m_awready,
    input  wire [2*ADDR_BITS-1:0]   m_awaddr,
    input  wire [15:0]              m_awlen,
    input  wire [2*ID_BITS-1:0]     m_awid,
    input  wire [1:0]               m_wvalid,
    output wire [1:0]               m_wready,
    input  wire [2*DATA_BITS-1:0]   m_wdata,
    input  wire [2*DATA_BITS/8-1:0] m_wstrb,
    input  wire [1:0]               m_wlast,
    output wire [1:0]               m_bvalid,
    input  wire [1:0]               m_bready,
    output wire [1:0]               m_bresp,
    output wire [ID_BITS-1:0]       m_bid,

    output wire                     s_arvalid,
    input  wire                     s_arready,
    output wire [ADDR_BITS-1:0]     s_araddr,
    output wire [7:0]               s_arlen,
    output wire [ID_BITS:0]         s_arid,
    input  wire                     s_rvalid,
    output wire                     s_rready,
    input  wire [DATA_BITS-1:0]     s_rdata,
    input  wire [1:0]               s_rresp,
    input  wire                     s_rlast,
    input  wire [ID_BITS:0]         s_rid,
    output wire                     s_awvalid,
    input  wire                     s_awready,
    output wire [ADDR_BITS-1:0]     s_awaddr,
    output wire [7:0]               s_awlen,
    output wire [ID_BITS:0]         s_awid,
    output wire                     s_wvalid,
    input  wire                     s_wready,
    output wire [DATA_BITS-1:0]     s_wdata,
    output wire [DATA_BITS/8-1:0]   s_wstrb,
    output wire                     s_wlast,
    input  wire                     s_bvalid,
    output wire                     s_bready,
    input  wire [1:0]               s_bresp,
    input  wire [ID_BITS:0]         s_bid
);
    // Reads. A grant is held until the slave takes the address, so that the payload stays stable.
    reg  ar_owner, ar_held;
    wire ar_pick = m_arvalid[~ar_owner] ? ~ar_owner : ar_owner;
    wire ar = ar_held ? ar_owner : ar_pick;
    assign s_arvalid = m_arvalid[ar];
    assign s_araddr = ar ? m_araddr[ADDR_BITS +: ADDR_BITS] : m_araddr[0 +: ADDR_BITS];
    assign s_arlen = ar ? m_arlen[15:8] : m_arlen[7:0];
    assign s_arid = {ar, ar ? m_arid[ID_BITS +: ID_BITS] : m_arid[0 +: ID_BITS]};
    assign m_arready = {ar, ~ar} & {2{s_arready}};

    wire r = s_rid[ID_BITS];
    assign m_rvalid = {r, ~r} & {2{s_rvalid}};
    assign s_rready = m_rready[r];
    assign m_rdata = s_rdata;
    assign m_rresp = s_rresp;
    assign m_rlast = s_rlast;
    assign m_rid = s_rid[ID_BITS-1:0];

    // Writes, likewise; `owners` are the masters of the granted writes, in order.
    reg  aw_owner, aw_held;
    reg  [(1<<LOG2_WRITES)-1:0] owners;
    reg  [LOG2_WRITES:0] granted, done;
    wire [LOG2_WRITES:0] to_come = granted - done;
    wire full = to_come[LOG2_WRITES];
    wire empty = to_come == 0;
    wire aw_pick = m_awvalid[~aw_owner] ? ~aw_owner : aw_owner;
    wire aw = aw_held ? aw_owner : aw_pick;
    assign s_awvalid = m_awvalid[aw] & ~full;
    assign s_awaddr = aw ? m_awaddr[ADDR_BITS +: ADDR_BITS] : m_awaddr[0 +: ADDR_BITS];
    assign s_awlen = aw ? m_awlen[15:8] : m_awlen[7:0];
    assign s_awid = {aw, aw ? m_awid[ID_BITS +: ID_BITS] : m_awid[0 +: ID_BITS]};
    assign m_awready = {aw, ~aw} & {2{s_awready & ~full}};

    wire w = owners[done[LOG2_WRITES-1:0]];
    assign s_wvalid = m_wvalid[w] & ~empty;
    assign s_wdata = w ? m_wdata[DATA_BITS +: DATA_BITS] : m_wdata[0 +: DATA_BITS];
    assign s_wstrb = w ? m_wstrb[DATA_BITS/8 +: DATA_BITS/8] : m_wstrb[0 +: DATA_BITS/8];
    assign s_wlast = m_wlast[w];
    assign m_wready = {w, ~w} & {2{s_wready & ~empty}};

    wire b = s_bid[ID_BITS];
    assign m_bvalid = {b, ~b} & {2{s_bvalid}};
    assign s_bready = m_bready[b];
    assign m_bresp = s_bresp;
    assign m_bid = s_bid[ID_BITS-1:0];

    always @(posedge clk) begin
        if (s_arvalid) begin
            ar_owner <= ar;
            ar_held <= ~s_arready;
        end
        if (s_awvalid) begin
            aw_owner <= aw;
            aw_held <= ~s_awready;
            if (s_awready) begin
                owners[granted[LOG2_WRITES-1:0]] <= aw;
                granted <= granted + 1'b1;
            end
        end
        if (s_wvalid & s_wready & s_wlast)
            done <= done + 1'b1;
        if (rst) begin
            {ar_owner, ar_held, aw_owner, aw_held} <= 4'b0;
            granted <= 0;
            done <= 0;
        end
    end
endmodule
`default_nettype wire
