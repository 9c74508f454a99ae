// The host's side of the simulated system: bus.h as clock cycles of lnpu_soc. Registers are behind its AXI4-Lite port,
// memory behind its AXI4 port, one transaction at a time.

#include "bus.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "Vlnpu_soc.h"
#include "verilated.h"

extern "C" int train_step(int argc, char** argv);

#define CONTROL(name) top->control___05F##name
#define HOST(name) top->host___05F##name

namespace {

constexpr unsigned kWord = 8;             // bytes in a word of the AXI4 port
constexpr unsigned kBeats = 16;           // longest burst
constexpr uint64_t kTimeout = 1000000;    // cycles of one transaction
constexpr uint64_t kProgramTimeout = 100000000;
Vlnpu_soc* top;
uint64_t cycles;

[[noreturn]] void fail(const char* what, uint64_t address) {
    std::fprintf(stderr, "bus: %s at %#llx, cycle %llu\n", what, static_cast<unsigned long long>(address),
                 static_cast<unsigned long long>(cycles));
    std::exit(1);
}

// One cycle in two halves: outputs settle, `sample` looks at the handshakes, then the edge.
template <typename Sample>
void tick(Sample sample) {
    top->clk = 0;
    top->eval();
    sample();
    top->clk = 1;
    top->eval();
    ++cycles;
}

void read_words(uint64_t address, uint64_t* words, unsigned count) {
    bool taken = false, done = false;
    unsigned beat = 0;
    HOST(araddr) = address, HOST(arlen) = count - 1, HOST(rready) = 1;
    for (uint64_t i = 0; !done; ++i) {
        if (i == kTimeout) fail("no response to a read", address);
        HOST(arvalid) = !taken;
        tick([&] {
            if (HOST(arvalid) && HOST(arready)) taken = true;
            if (HOST(rvalid)) {
                if (HOST(rresp)) fail("read answered with an error", address);
                if (HOST(rlast) != (beat + 1 == count)) fail("RLAST at the wrong word", address);
                words[beat++] = HOST(rdata);
                done = beat == count;
            }
        });
    }
    HOST(arvalid) = HOST(rready) = 0;
}

void write_words(uint64_t address, const uint64_t* words, const uint8_t* strobes, unsigned count) {
    bool taken = false, done = false;
    unsigned beat = 0;
    HOST(awaddr) = address, HOST(awlen) = count - 1, HOST(bready) = 1;
    for (uint64_t i = 0; !done; ++i) {
        if (i == kTimeout) fail("no response to a write", address);
        HOST(awvalid) = !taken;
        HOST(wvalid) = beat < count;
        if (beat < count) HOST(wdata) = words[beat], HOST(wstrb) = strobes[beat], HOST(wlast) = beat + 1 == count;
        tick([&] {
            if (HOST(awvalid) && HOST(awready)) taken = true;
            if (HOST(wvalid) && HOST(wready)) ++beat;
            if (HOST(bvalid)) {
                if (HOST(bresp)) fail("write answered with an error", address);
                done = true;
            }
        });
    }
    HOST(awvalid) = HOST(wvalid) = HOST(bready) = 0;
}

}  // namespace

uint32_t lnpu_bus_read32(uint64_t address) {
    uint32_t value = 0;
    if (address < LNPU_BASE) {
        lnpu_bus_read(address, &value, 4);
        return value;
    }
    bool taken = false, done = false;
    CONTROL(araddr) = address & 0xFFF, CONTROL(rready) = 1;
    for (uint64_t i = 0; !done; ++i) {
        if (i == kTimeout) fail("no response to a register read", address);
        CONTROL(arvalid) = !taken;
        tick([&] {
            if (CONTROL(arvalid) && CONTROL(arready)) taken = true;
            if (CONTROL(rvalid)) {
                if (CONTROL(rresp)) fail("register read answered with an error", address);
                value = CONTROL(rdata);
                done = true;
            }
        });
    }
    CONTROL(rready) = 0;
    return value;
}

void lnpu_bus_write32(uint64_t address, uint32_t value) {
    if (address < LNPU_BASE) {
        lnpu_bus_write(address, &value, 4);
        return;
    }
    bool address_taken = false, data_taken = false, done = false;
    CONTROL(awaddr) = address & 0xFFF, CONTROL(wdata) = value, CONTROL(wstrb) = 0xF, CONTROL(bready) = 1;
    for (uint64_t i = 0; !done; ++i) {
        if (i == kTimeout) fail("no response to a register write", address);
        CONTROL(awvalid) = !address_taken;
        CONTROL(wvalid) = !data_taken;
        tick([&] {
            if (CONTROL(awvalid) && CONTROL(awready)) address_taken = true;
            if (CONTROL(wvalid) && CONTROL(wready)) data_taken = true;
            if (CONTROL(bvalid)) {
                if (CONTROL(bresp)) fail("register write answered with an error", address);
                done = true;
            }
        });
    }
    CONTROL(awvalid) = CONTROL(wvalid) = CONTROL(bready) = 0;
}

// Bursts are aligned to their greatest length, so none crosses 4 KiB.
void lnpu_bus_read(uint64_t address, void* data, size_t bytes) {
    auto* out = static_cast<uint8_t*>(data);
    while (bytes) {
        const uint64_t first = address / kWord * kWord;
        const uint64_t end = std::min<uint64_t>(address + bytes, (address / (kWord * kBeats) + 1) * kWord * kBeats);
        uint64_t words[kBeats];
        read_words(first, words, (end - first + kWord - 1) / kWord);
        std::memcpy(out, reinterpret_cast<uint8_t*>(words) + (address - first), end - address);
        out += end - address, bytes -= end - address, address = end;
    }
}

void lnpu_bus_write(uint64_t address, const void* data, size_t bytes) {
    auto* in = static_cast<const uint8_t*>(data);
    while (bytes) {
        const uint64_t first = address / kWord * kWord;
        const uint64_t end = std::min<uint64_t>(address + bytes, (address / (kWord * kBeats) + 1) * kWord * kBeats);
        uint64_t words[kBeats] = {};
        uint8_t strobes[kBeats] = {};
        std::memcpy(reinterpret_cast<uint8_t*>(words) + (address - first), in, end - address);
        for (uint64_t i = address - first; i < end - first; ++i) strobes[i / kWord] |= 1u << i % kWord;
        write_words(first, words, strobes, (end - first + kWord - 1) / kWord);
        in += end - address, bytes -= end - address, address = end;
    }
}

void lnpu_wait_interrupt() {
    for (uint64_t i = 0; !top->irq; ++i) {
        if (i == kProgramTimeout) fail("no interrupt", 0);
        tick([] {});
    }
}

int main(int argc, char** argv) {
    VerilatedContext context;
    Vlnpu_soc soc(&context);
    top = &soc;
    top->rst = 1;
    for (int i = 0; i < 4; ++i) tick([] {});
    top->rst = 0;
    const int status = train_step(argc, argv);
    std::printf("system: %llu cycles\n", static_cast<unsigned long long>(cycles));
    top->final();
    return status;
}
