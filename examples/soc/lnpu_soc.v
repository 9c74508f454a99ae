// A small system: the chip and a host on one AXI4 interconnect with one RAM. The host has the AXI4-Lite port of the chip's
// registers, a bus master of its own for the memory, and the interrupt.
`default_nettype none
module lnpu_soc #(
    parameter ADDR_BITS = 40,    // as in the chip's configuration: `address_bits`
    parameter DATA_BITS = 64,    // `axi_bits`
    parameter LOG2_RAM_BYTES = 20
) (
    input  wire clk,
    input  wire rst,
    output wire irq,

    // Host's AXI4 master, one ID, bursts of whole words
    input  wire host__arvalid,
    output wire host__arready,
    input  wire [ADDR_BITS-1:0] host__araddr,
    input  wire [7:0] host__arlen,
    output wire host__rvalid,
    input  wire host__rready,
    output wire [DATA_BITS-1:0] host__rdata,
    output wire [1:0] host__rresp,
    output wire host__rlast,
    input  wire host__awvalid,
    output wire host__awready,
    input  wire [ADDR_BITS-1:0] host__awaddr,
    input  wire [7:0] host__awlen,
    input  wire host__wvalid,
    output wire host__wready,
    input  wire [DATA_BITS-1:0] host__wdata,
    input  wire [DATA_BITS/8-1:0] host__wstrb,
    input  wire host__wlast,
    output wire host__bvalid,
    input  wire host__bready,
    output wire [1:0] host__bresp,

    // Host's AXI4-Lite master of the registers
    input  wire control__awvalid,
    output wire control__awready,
    input  wire [11:0] control__awaddr,
    input  wire control__wvalid,
    output wire control__wready,
    input  wire [31:0] control__wdata,
    input  wire [3:0] control__wstrb,
    output wire control__bvalid,
    input  wire control__bready,
    output wire [1:0] control__bresp,
    input  wire control__arvalid,
    output wire control__arready,
    input  wire [11:0] control__araddr,
    output wire control__rvalid,
    input  wire control__rready,
    output wire [31:0] control__rdata,
    output wire [1:0] control__rresp
);
    // From the chip; bursts are always INCR, of whole words
    wire [2:0] unused_arsize;
    wire [1:0] unused_arburst;
    wire [3:0] unused_arcache;
    wire [2:0] unused_arprot;
    wire [2:0] unused_awsize;
    wire [1:0] unused_awburst;
    wire [3:0] unused_awcache;
    wire [2:0] unused_awprot;
    wire chip_arvalid;
    wire [ADDR_BITS-1:0] chip_araddr;
    wire [7:0] chip_arlen;
    wire chip_arid;
    wire chip_rready;
    wire chip_awvalid;
    wire [ADDR_BITS-1:0] chip_awaddr;
    wire [7:0] chip_awlen;
    wire chip_awid;
    wire chip_wvalid;
    wire [DATA_BITS-1:0] chip_wdata;
    wire [DATA_BITS/8-1:0] chip_wstrb;
    wire chip_wlast;
    wire chip_bready;

    // Between the interconnect and its masters, its slave
    wire [1:0] m_arready;
    wire [1:0] m_rvalid;
    wire [DATA_BITS-1:0] m_rdata;
    wire [1:0] m_rresp;
    wire m_rlast;
    wire m_rid;
    wire [1:0] m_awready;
    wire [1:0] m_wready;
    wire [1:0] m_bvalid;
    wire [1:0] m_bresp;
    wire m_bid;
    wire s_arvalid;
    wire s_arready;
    wire [ADDR_BITS-1:0] s_araddr;
    wire [7:0] s_arlen;
    wire [1:0] s_arid;
    wire s_rvalid;
    wire s_rready;
    wire [DATA_BITS-1:0] s_rdata;
    wire [1:0] s_rresp;
    wire s_rlast;
    wire [1:0] s_rid;
    wire s_awvalid;
    wire s_awready;
    wire [ADDR_BITS-1:0] s_awaddr;
    wire [7:0] s_awlen;
    wire [1:0] s_awid;
    wire s_wvalid;
    wire s_wready;
    wire [DATA_BITS-1:0] s_wdata;
    wire [DATA_BITS/8-1:0] s_wstrb;
    wire s_wlast;
    wire s_bvalid;
    wire s_bready;
    wire [1:0] s_bresp;
    wire [1:0] s_bid;

    lnpu_chip chip (
        .clk(clk),
        .rst(rst),
        .interrupt(irq),
        .control__awvalid(control__awvalid),
        .control__awready(control__awready),
        .control__awaddr(control__awaddr),
        .control__wvalid(control__wvalid),
        .control__wready(control__wready),
        .control__wdata(control__wdata),
        .control__wstrb(control__wstrb),
        .control__bvalid(control__bvalid),
        .control__bready(control__bready),
        .control__bresp(control__bresp),
        .control__arvalid(control__arvalid),
        .control__arready(control__arready),
        .control__araddr(control__araddr),
        .control__rvalid(control__rvalid),
        .control__rready(control__rready),
        .control__rdata(control__rdata),
        .control__rresp(control__rresp),
        .control__awprot(3'b000),
        .control__arprot(3'b000),
        .memory_read__arvalid(chip_arvalid),
        .memory_read__arready(m_arready[0]),
        .memory_read__araddr(chip_araddr),
        .memory_read__arlen(chip_arlen),
        .memory_read__arid(chip_arid),
        .memory_read__rvalid(m_rvalid[0]),
        .memory_read__rready(chip_rready),
        .memory_read__rdata(m_rdata),
        .memory_read__rresp(m_rresp),
        .memory_read__rlast(m_rlast),
        .memory_read__rid(m_rid),
        .memory_write__awvalid(chip_awvalid),
        .memory_write__awready(m_awready[0]),
        .memory_write__awaddr(chip_awaddr),
        .memory_write__awlen(chip_awlen),
        .memory_write__awid(chip_awid),
        .memory_write__wvalid(chip_wvalid),
        .memory_write__wready(m_wready[0]),
        .memory_write__wdata(chip_wdata),
        .memory_write__wstrb(chip_wstrb),
        .memory_write__wlast(chip_wlast),
        .memory_write__bvalid(m_bvalid[0]),
        .memory_write__bready(chip_bready),
        .memory_write__bresp(m_bresp),
        .memory_write__bid(m_bid),
        .memory_read__arsize(unused_arsize),
        .memory_read__arburst(unused_arburst),
        .memory_read__arcache(unused_arcache),
        .memory_read__arprot(unused_arprot),
        .memory_write__awsize(unused_awsize),
        .memory_write__awburst(unused_awburst),
        .memory_write__awcache(unused_awcache),
        .memory_write__awprot(unused_awprot)
    );

    assign host__rdata = m_rdata;
    assign host__rresp = m_rresp;
    assign host__rlast = m_rlast;
    assign host__bresp = m_bresp;
    assign host__arready = m_arready[1];
    assign host__rvalid = m_rvalid[1];
    assign host__awready = m_awready[1];
    assign host__wready = m_wready[1];
    assign host__bvalid = m_bvalid[1];

    axi_interconnect #(.ADDR_BITS(ADDR_BITS), .DATA_BITS(DATA_BITS), .ID_BITS(1)) fabric (
        .clk(clk),
        .rst(rst),
        .m_arvalid({host__arvalid, chip_arvalid}),
        .m_arready(m_arready),
        .m_araddr({host__araddr, chip_araddr}),
        .m_arlen({host__arlen, chip_arlen}),
        .m_arid({1'b0, chip_arid}),
        .m_rvalid(m_rvalid),
        .m_rready({host__rready, chip_rready}),
        .m_rdata(m_rdata),
        .m_rresp(m_rresp),
        .m_rlast(m_rlast),
        .m_rid(m_rid),
        .m_awvalid({host__awvalid, chip_awvalid}),
        .m_awready(m_awready),
        .m_awaddr({host__awaddr, chip_awaddr}),
        .m_awlen({host__awlen, chip_awlen}),
        .m_awid({1'b0, chip_awid}),
        .m_wvalid({host__wvalid, chip_wvalid}),
        .m_wready(m_wready),
        .m_wdata({host__wdata, chip_wdata}),
        .m_wstrb({host__wstrb, chip_wstrb}),
        .m_wlast({host__wlast, chip_wlast}),
        .m_bvalid(m_bvalid),
        .m_bready({host__bready, chip_bready}),
        .m_bresp(m_bresp),
        .m_bid(m_bid),
        .s_arvalid(s_arvalid),
        .s_arready(s_arready),
        .s_araddr(s_araddr),
        .s_arlen(s_arlen),
        .s_arid(s_arid),
        .s_rvalid(s_rvalid),
        .s_rready(s_rready),
        .s_rdata(s_rdata),
        .s_rresp(s_rresp),
        .s_rlast(s_rlast),
        .s_rid(s_rid),
        .s_awvalid(s_awvalid),
        .s_awready(s_awready),
        .s_awaddr(s_awaddr),
        .s_awlen(s_awlen),
        .s_awid(s_awid),
        .s_wvalid(s_wvalid),
        .s_wready(s_wready),
        .s_wdata(s_wdata),
        .s_wstrb(s_wstrb),
        .s_wlast(s_wlast),
        .s_bvalid(s_bvalid),
        .s_bready(s_bready),
        .s_bresp(s_bresp),
        .s_bid(s_bid)
    );

    axi_ram #(.ADDR_BITS(ADDR_BITS), .DATA_BITS(DATA_BITS), .ID_BITS(2), .LOG2_BYTES(LOG2_RAM_BYTES)) ram (
        .clk(clk),
        .rst(rst),
        .arvalid(s_arvalid),
        .arready(s_arready),
        .araddr(s_araddr),
        .arlen(s_arlen),
        .arid(s_arid),
        .rvalid(s_rvalid),
        .rready(s_rready),
        .rdata(s_rdata),
        .rresp(s_rresp),
        .rlast(s_rlast),
        .rid(s_rid),
        .awvalid(s_awvalid),
        .awready(s_awready),
        .awaddr(s_awaddr),
        .awlen(s_awlen),
        .awid(s_awid),
        .wvalid(s_wvalid),
        .wready(s_wready),
        .wdata(s_wdata),
        .wstrb(s_wstrb),
        .wlast(s_wlast),
        .bvalid(s_bvalid),
        .bready(s_bready),
        .bresp(s_bresp),
        .bid(s_bid)
    );
endmodule
`default_nettype wire
