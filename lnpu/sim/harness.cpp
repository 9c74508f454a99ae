// Native simulation of the whole chip: clock, AXI4-Lite master, AXI4 memory and protocol checks around the Verilated
// model, behind a C interface for lnpu/sim/simulator.py.
//
// The memory accepts up to 64 bursts in each direction and serves them in order, one word a cycle. It is as strict as
// AXI allows: a read returns what memory held when its address was taken, and a write is visible from its response on,
// so a chip that does not wait for its acknowledgements reads stale data. With random stalls each burst chooses between
// this and the opposite extreme (reads sampled as late, writes visible as early as possible).

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "Vlnpu_chip.h"
#include "verilated.h"
#if VM_TRACE
#include "verilated_vcd_c.h"
#endif

// Ports of the model; Verilator writes a double underscore as `___05F`, and guards words that C++ libraries use.
#define INTERRUPT top_->__SYM__interrupt
#define CONTROL(name) top_->control___05F##name
#define READ(name) top_->memory_read___05F##name
#define WRITE(name) top_->memory_write___05F##name

namespace {

constexpr unsigned kWord = sizeof(std::declval<Vlnpu_chip>().memory_read___05Frdata);  // bytes in an AXI word
constexpr unsigned kBursts = 64;       // outstanding bursts in each direction
constexpr unsigned kBeats = 256;       // longest burst
constexpr unsigned kEarlyWords = 512;  // write data accepted ahead of its address
constexpr uint64_t kRegisterTimeout = 100000;
enum Response : unsigned { kOkay = 0, kSlaveError = 2, kDecodeError = 3 };

constexpr unsigned log2_of(unsigned n) { return n <= 1 ? 0 : 1 + log2_of(n / 2); }

// Payload of an address channel.
struct Address {
    uint64_t addr = 0;
    unsigned len = 0, size = 0, burst = 0, id = 0;
    bool operator==(const Address& o) const {
        return addr == o.addr && len == o.len && size == o.size && burst == o.burst && id == o.id;
    }
};

struct Word {
    uint8_t data[kWord];
    uint64_t strobe;
    bool last;
};

struct Response32 {
    uint32_t data = 0;
    unsigned resp = 0;
    bool operator==(const Response32& o) const { return data == o.data && resp == o.resp; }
};

struct ReadBurst {
    Address a;
    uint64_t ready_at;
    unsigned beat;
    bool sampled;  // `data` holds what memory held when the address was taken
    std::vector<uint8_t> data = std::vector<uint8_t>(kWord * kBeats);
};

struct WriteBurst {
    Address a;
    uint64_t ready_at;
    unsigned beat;
    bool complete, early;
    unsigned resp;
    std::vector<Word> words = std::vector<Word>(kBeats);
};

template <typename T, unsigned N>
class Ring {
public:
    Ring() : items_(N) {}
    bool empty() const { return count_ == 0; }
    bool full() const { return count_ == N; }
    unsigned size() const { return count_; }
    T& operator[](unsigned i) { return items_[(first_ + i) % N]; }
    T& front() { return items_[first_]; }
    T& push() { return items_[(first_ + count_++) % N]; }
    void pop() {
        first_ = (first_ + 1) % N;
        --count_;
    }
    void clear() { first_ = count_ = 0; }

private:
    std::vector<T> items_;
    unsigned first_ = 0, count_ = 0;
};

// Check of one channel driven by the chip: once valid, it stays valid and its payload stable until it is ready.
template <typename Payload>
struct Stability {
    bool waiting = false;
    Payload payload;
    const char* check(bool valid, bool ready, const Payload& now) {
        const char* fault = nullptr;
        if (waiting) {
            if (!valid) {
                fault = "valid dropped before ready";
            } else if (!(now == payload)) {
                fault = "payload changed while valid and not ready";
            }
        }
        waiting = valid && !ready;
        if (waiting) payload = now;
        return fault;
    }
};

struct WritePayload {
    uint8_t data[kWord] = {};
    uint64_t strobe = 0;
    bool last = false;
    bool operator==(const WritePayload& o) const {
        return !std::memcmp(data, o.data, kWord) && strobe == o.strobe && last == o.last;
    }
};

struct Empty {
    bool operator==(const Empty&) const { return true; }
};

class Machine {
public:
    Machine(uint8_t* memory, uint64_t size, uint64_t latency, double stall, uint64_t seed)
        : memory_(memory), size_(size), latency_(latency < 1 ? 1 : latency), random_(seed * 0x9E3779B97F4A7C15ull + 1) {
        threshold_ = stall <= 0 ? 0 : static_cast<uint64_t>(stall * 4294967296.0);
        const bool scramble = threshold_ != 0;  // registers and memories then power up with random contents
        context_.randReset(scramble ? 2 : 0);
        context_.randSeed(static_cast<int>(seed & 0x7fffffff) + 1);
        context_.quiet(true);
#if VM_TRACE
        context_.traceEverOn(true);
#endif
        top_ = std::make_unique<Vlnpu_chip>(&context_, "lnpu_chip");
    }

    ~Machine() {
#if VM_TRACE
        if (trace_) trace_->close();
        trace_.reset();
#endif
        top_->final();
        // Verilator's scopes are taken from the thread's context, whosever it is: first this one's, then one that stays.
        Verilated::threadContextp(&context_);
        top_.reset();
        Verilated::threadContextp(Verilated::defaultContextp());
    }

    bool trace(const char* path) {
#if VM_TRACE
        trace_ = std::make_unique<VerilatedVcdC>();
        top_->trace(trace_.get(), 99);
        trace_->open(path);
        return trace_->isOpen();
#else
        (void)path;
        return false;
#endif
    }

    void flush() {
#if VM_TRACE
        if (trace_) trace_->flush();
#endif
    }

    void reset(unsigned cycles) {
        reads_.clear();
        writes_.clear();
        early_.clear();
        filling_ = 0;
        read_offered_ = response_offered_ = false;
        ar_check_ = {};
        aw_check_ = {};
        w_check_ = {};
        control_b_check_ = {};
        control_r_check_ = {};
        CONTROL(awvalid) = CONTROL(wvalid) = CONTROL(bready) = CONTROL(arvalid) = CONTROL(rready) = 0;
        control_writes_ = control_reads_ = 0;
        in_reset_ = true;
        top_->rst = 1;
        for (unsigned i = 0; i < cycles; ++i) tick();
        top_->rst = 0;
        in_reset_ = false;
        if (cycles && (READ(arvalid) || WRITE(awvalid) || WRITE(wvalid) ||
                       CONTROL(bvalid) || CONTROL(rvalid))) {
            fail("control or memory", "valid in reset");
        }
    }

    int write_register(uint32_t offset, uint32_t value) {
        bool address = false, data = false, responded = false;
        unsigned resp = 0;
        CONTROL(awaddr) = offset;
        CONTROL(awprot) = 0;
        CONTROL(wdata) = value;
        CONTROL(wstrb) = 0xF;
        for (uint64_t i = 0; i < kRegisterTimeout && error_.empty(); ++i) {
            // A valid that is up stays up; a ready may come and go.
            if (!address && !CONTROL(awvalid)) CONTROL(awvalid) = !stalled();
            if (!data && !CONTROL(wvalid)) CONTROL(wvalid) = !stalled();
            CONTROL(bready) = !responded && !stalled();
            tick();
            if (lite_.aw) address = true, CONTROL(awvalid) = 0;
            if (lite_.w) data = true, CONTROL(wvalid) = 0;
            if (lite_.b) responded = true, resp = lite_.resp;
            if (responded) {
                CONTROL(bready) = 0;
                return static_cast<int>(resp);
            }
        }
        fail("control write", "no response");
        return -1;
    }

    int read_register(uint32_t offset, uint32_t* value) {
        bool address = false;
        CONTROL(araddr) = offset;
        CONTROL(arprot) = 0;
        for (uint64_t i = 0; i < kRegisterTimeout && error_.empty(); ++i) {
            if (!address && !CONTROL(arvalid)) CONTROL(arvalid) = !stalled();
            CONTROL(rready) = !stalled();
            tick();
            if (lite_.ar) address = true, CONTROL(arvalid) = 0;
            if (lite_.r) {
                CONTROL(rready) = 0;
                *value = lite_.data;
                return static_cast<int>(lite_.resp);
            }
        }
        fail("control read", "no response");
        return -1;
    }

    uint64_t run(uint64_t max_cycles) {
        uint64_t used = 0;
        while (used < max_cycles && !INTERRUPT && error_.empty()) {
            tick();
            ++used;
        }
        return used;
    }

    void fault(uint64_t low, uint64_t high, bool reads, bool writes) {
        fault_low_ = low;
        fault_high_ = high;
        fault_reads_ = reads;
        fault_writes_ = writes;
    }

    bool interrupt() const { return INTERRUPT; }
    uint64_t cycle() const { return cycle_; }
    uint64_t read_beats() const { return read_beats_; }
    uint64_t write_beats() const { return write_beats_; }
    const char* error() const { return error_.c_str(); }

private:
    void tick() {

        // What the memory drives in this cycle depends only on its state.
        if (!read_offered_ && !reads_.empty() && cycle_ >= reads_.front().ready_at && !stalled()) offer_word();
        if (!response_offered_ && !writes_.empty() && writes_.front().complete && cycle_ >= writes_.front().ready_at &&
            !stalled()) {
            offer_response();
        }
        READ(rvalid) = read_offered_;
        WRITE(bvalid) = response_offered_;
        READ(arready) = !reads_.full() && !in_reset_ && !stalled();
        WRITE(awready) = !writes_.full() && !in_reset_ && !stalled();
        WRITE(wready) = !early_.full() && !in_reset_ && !stalled();

        top_->clk = 0;
        top_->eval();
#if VM_TRACE
        if (trace_) trace_->dump(10 * cycle_);
#endif

        // The handshakes of this cycle, before the edge changes the outputs.
        const bool ar = READ(arvalid) && READ(arready);
        const bool r = read_offered_ && READ(rready);
        const bool aw = WRITE(awvalid) && WRITE(awready);
        const bool w = WRITE(wvalid) && WRITE(wready);
        const bool b = response_offered_ && WRITE(bready);
        lite_.aw = CONTROL(awvalid) && CONTROL(awready);
        lite_.w = CONTROL(wvalid) && CONTROL(wready);
        lite_.b = CONTROL(bvalid) && CONTROL(bready);
        lite_.ar = CONTROL(arvalid) && CONTROL(arready);
        lite_.r = CONTROL(rvalid) && CONTROL(rready);
        if (!in_reset_) {
            check_memory();
            check_control();
            if (ar) accept_read();
            if (aw) accept_write();
            if (w) accept_data();
        }

        top_->clk = 1;
        top_->eval();
#if VM_TRACE
        if (trace_) trace_->dump(10 * cycle_ + 5);
#endif
        ++cycle_;

        if (in_reset_) return;
        if (r) {
            ++read_beats_;
            read_offered_ = false;
            ReadBurst& burst = reads_.front();
            if (burst.beat++ == burst.a.len) reads_.pop();
        }
        if (b) {
            response_offered_ = false;
            writes_.pop();
            --filling_;
        }
        match_data();
    }

    uint64_t next_random() {  // xorshift64*
        random_ ^= random_ >> 12;
        random_ ^= random_ << 25;
        random_ ^= random_ >> 27;
        return random_ * 0x2545F4914F6CDD1Dull;
    }
    bool stalled() { return threshold_ && (next_random() >> 32) < threshold_; }
    bool coin() { return threshold_ && (next_random() >> 63); }

    void fail(const char* channel, const char* what) {
        if (!error_.empty()) return;
        error_ = std::string(channel) + ": " + what + " (cycle " + std::to_string(cycle_) + ")";
    }

    unsigned access(uint64_t address, bool write) const {
        if (address >= size_ || size_ - address < kWord) return kDecodeError;
        const bool faulty = write ? fault_writes_ : fault_reads_;
        return faulty && address < fault_high_ && address + kWord > fault_low_ ? kSlaveError : kOkay;
    }

    void accept_read() {
        ReadBurst& burst = reads_.push();
        burst.a = {READ(araddr), READ(arlen), READ(arsize), READ(arburst), READ(arid)};
        check_burst("memory_read AR", burst.a);
        burst.ready_at = cycle_ + latency_;
        burst.beat = 0;
        burst.sampled = !coin();
        if (burst.sampled) {
            for (unsigned i = 0; i <= burst.a.len; ++i) {
                const uint64_t address = burst.a.addr + i * kWord;
                if (access(address, false) == kOkay) std::memcpy(&burst.data[i * kWord], memory_ + address, kWord);
            }
        }
    }

    void offer_word() {
        ReadBurst& burst = reads_.front();
        const uint64_t address = burst.a.addr + burst.beat * kWord;
        const unsigned resp = access(address, false);
        if (resp != kOkay) {
            std::memset(&READ(rdata), 0xA5, kWord);
        } else {
            std::memcpy(&READ(rdata), burst.sampled ? &burst.data[burst.beat * kWord] : memory_ + address, kWord);
        }
        READ(rresp) = resp;
        READ(rid) = burst.a.id;
        READ(rlast) = burst.beat == burst.a.len;
        read_offered_ = true;
    }

    void accept_write() {
        WriteBurst& burst = writes_.push();
        burst.a = {WRITE(awaddr), WRITE(awlen), WRITE(awsize), WRITE(awburst), WRITE(awid)};
        check_burst("memory_write AW", burst.a);
        burst.beat = 0;
        burst.complete = false;
        burst.early = coin();
        burst.resp = kOkay;
    }

    void accept_data() {
        Word& word = early_.push();
        std::memcpy(word.data, &WRITE(wdata), kWord);
        word.strobe = WRITE(wstrb);
        word.last = WRITE(wlast);
        ++write_beats_;
    }

    // Gives accepted words to the bursts they belong to; `filling_` is the first burst that is not complete.
    void match_data() {
        while (!early_.empty() && filling_ < writes_.size()) {
            WriteBurst& burst = writes_[filling_];
            const Word& word = early_.front();
            const bool last = burst.beat == burst.a.len;
            if (word.last != last) fail("memory_write W", last ? "WLAST missing" : "WLAST before the last word");
            const unsigned resp = access(burst.a.addr + burst.beat * kWord, true);
            if (resp > burst.resp) burst.resp = resp;
            burst.words[burst.beat] = word;
            if (burst.early) commit(burst, burst.beat);
            early_.pop();
            if (last) {
                burst.complete = true;
                burst.ready_at = cycle_ - 1 + latency_;
                ++filling_;
            } else {
                ++burst.beat;
            }
        }
    }

    void commit(const WriteBurst& burst, unsigned beat) {
        const uint64_t address = burst.a.addr + beat * kWord;
        if (access(address, true) != kOkay) return;
        const Word& word = burst.words[beat];
        const uint64_t all = kWord == 64 ? ~0ull : (1ull << kWord) - 1;
        if (word.strobe == all) {
            std::memcpy(memory_ + address, word.data, kWord);
        } else {
            for (unsigned i = 0; i < kWord; ++i) {
                if (word.strobe >> i & 1) memory_[address + i] = word.data[i];
            }
        }
    }

    void offer_response() {
        WriteBurst& burst = writes_.front();
        if (!burst.early) {
            for (unsigned i = 0; i <= burst.a.len; ++i) commit(burst, i);
        }
        WRITE(bresp) = burst.resp;
        WRITE(bid) = burst.a.id;
        response_offered_ = true;
    }

    void check_burst(const char* channel, const Address& a) {
        if (a.burst != 1) fail(channel, "burst type is not INCR");
        if (a.size != log2_of(kWord)) fail(channel, "size is not the bus width");
        if (a.addr % kWord) fail(channel, "address is not a multiple of the bus width");
        if ((a.addr & 4095) + (a.len + 1) * kWord > 4096) fail(channel, "burst crosses a 4 KiB boundary");
    }

    void check_memory() {
        const auto check = [this](const char* channel, const char* fault) {
            if (fault) fail(channel, fault);
        };
        if (ar_check_.waiting || READ(arvalid)) {
            const Address now = {READ(araddr), READ(arlen), READ(arsize), READ(arburst), READ(arid)};
            check("memory_read AR", ar_check_.check(READ(arvalid), READ(arready), now));
        }
        if (aw_check_.waiting || WRITE(awvalid)) {
            const Address now = {WRITE(awaddr), WRITE(awlen), WRITE(awsize), WRITE(awburst), WRITE(awid)};
            check("memory_write AW", aw_check_.check(WRITE(awvalid), WRITE(awready), now));
        }
        if (w_check_.waiting || (WRITE(wvalid) && !WRITE(wready))) {
            WritePayload now;
            std::memcpy(now.data, &WRITE(wdata), kWord);
            now.strobe = WRITE(wstrb);
            now.last = WRITE(wlast);
            check("memory_write W", w_check_.check(WRITE(wvalid), WRITE(wready), now));
        }
    }

    void check_control() {
        if (!(CONTROL(bvalid) || CONTROL(rvalid) || lite_.aw || lite_.w || lite_.ar || control_b_check_.waiting ||
              control_r_check_.waiting)) {
            return;
        }
        lite_.resp = lite_.b ? CONTROL(bresp) : CONTROL(rresp);
        lite_.data = CONTROL(rdata);
        // A response must follow its request: count handshakes of earlier cycles.
        if (CONTROL(bvalid) && (control_writes_ & 3) != 3) fail("control B", "response before the request");
        if (CONTROL(rvalid) && !control_reads_) fail("control R", "response before the request");
        if (const char* fault = control_b_check_.check(CONTROL(bvalid), CONTROL(bready), {0, CONTROL(bresp)})) {
            fail("control B", fault);
        }
        if (const char* fault =
                control_r_check_.check(CONTROL(rvalid), CONTROL(rready), {CONTROL(rdata), CONTROL(rresp)})) {
            fail("control R", fault);
        }
        if (lite_.b) control_writes_ = 0;
        if (lite_.r) control_reads_ = 0;
        control_writes_ |= (lite_.aw ? 1 : 0) | (lite_.w ? 2 : 0);
        control_reads_ |= lite_.ar;
    }

    struct Lite {
        bool aw, w, b, ar, r;
        unsigned resp;
        uint32_t data;
    };

    VerilatedContext context_;
    std::unique_ptr<Vlnpu_chip> top_;
#if VM_TRACE
    std::unique_ptr<VerilatedVcdC> trace_;
#endif
    uint8_t* memory_;
    uint64_t size_, latency_, threshold_, random_;
    uint64_t fault_low_ = 0, fault_high_ = 0;
    bool fault_reads_ = false, fault_writes_ = false;
    uint64_t cycle_ = 0, read_beats_ = 0, write_beats_ = 0;
    bool in_reset_ = false;
    Ring<ReadBurst, kBursts> reads_;
    Ring<WriteBurst, kBursts> writes_;
    Ring<Word, kEarlyWords> early_;
    unsigned filling_ = 0;
    bool read_offered_ = false, response_offered_ = false;
    Lite lite_ = {};
    unsigned control_writes_ = 0, control_reads_ = 0;
    Stability<Address> ar_check_, aw_check_;
    Stability<WritePayload> w_check_;
    Stability<Response32> control_b_check_, control_r_check_;
    std::string error_;
};

}  // namespace

#define API extern "C" __attribute__((visibility("default")))

API void* lnpu_create(uint8_t* memory, uint64_t size, uint64_t latency, double stall, uint64_t seed) {
    return new Machine(memory, size, latency, stall, seed);
}
API void lnpu_destroy(void* m) { delete static_cast<Machine*>(m); }
API int lnpu_trace(void* m, const char* path) { return static_cast<Machine*>(m)->trace(path); }
API void lnpu_flush(void* m) { static_cast<Machine*>(m)->flush(); }
API void lnpu_reset(void* m, unsigned cycles) { static_cast<Machine*>(m)->reset(cycles); }
API int lnpu_write_register(void* m, uint32_t offset, uint32_t value) {
    return static_cast<Machine*>(m)->write_register(offset, value);
}
API int lnpu_read_register(void* m, uint32_t offset, uint32_t* value) {
    return static_cast<Machine*>(m)->read_register(offset, value);
}
API uint64_t lnpu_run(void* m, uint64_t max_cycles) { return static_cast<Machine*>(m)->run(max_cycles); }
API void lnpu_fault(void* m, uint64_t low, uint64_t high, int reads, int writes) {
    static_cast<Machine*>(m)->fault(low, high, reads, writes);
}
API int lnpu_interrupt(void* m) { return static_cast<Machine*>(m)->interrupt(); }
API uint64_t lnpu_cycle(void* m) { return static_cast<Machine*>(m)->cycle(); }
API uint64_t lnpu_read_beats(void* m) { return static_cast<Machine*>(m)->read_beats(); }
API uint64_t lnpu_write_beats(void* m) { return static_cast<Machine*>(m)->write_beats(); }
API const char* lnpu_error(void* m) { return static_cast<Machine*>(m)->error(); }
