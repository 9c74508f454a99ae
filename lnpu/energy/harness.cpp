// Runs `bench` on a file of stimuli, a record of 32-bit words a cycle; writes responses likewise, and the toggles of
// the cycles from `first` on as SAIF: two units of time a cycle, without delays. A SAIF file counts the values that it
// starts from as changes from 0: a second one, with nothing else, tells which these are.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "Vbench.h"
#include "verilated_saif_c.h"

int main(int argc, char** argv) {
    if (argc != 7) return 2;
    VerilatedContext context;
    context.traceEverOn(true);
    Vbench top{&context};
    VerilatedSaifC initial, saif;
    top.trace(&initial, 99);
    top.trace(&saif, 99);
    std::FILE* input = std::fopen(argv[1], "rb");
    std::FILE* output = std::fopen(argv[2], "wb");
    const long first = std::atol(argv[5]), cycles = std::atol(argv[6]);
    if (!input || !output) return 3;
    std::vector<unsigned> record(sizeof(top.stimulus) / 4);
    for (long cycle = 0; cycle < cycles; ++cycle) {
        if (std::fread(record.data(), 4, record.size(), input) != record.size()) return 4;
        std::memcpy(&top.stimulus, record.data(), sizeof(top.stimulus));
        top.clk = 0;
        top.eval();
        if (cycle == first) {
            initial.open(argv[4]);
            initial.dump(static_cast<unsigned long>(0));
            initial.close();
            saif.open(argv[3]);
        }
        if (cycle >= first) saif.dump(static_cast<unsigned long>(2 * (cycle - first) + 1));
        std::fwrite(&top.response, 1, sizeof(top.response), output);
        top.clk = 1;
        top.eval();
        if (cycle >= first) saif.dump(static_cast<unsigned long>(2 * (cycle - first) + 2));
    }
    saif.close();
    top.final();
    return std::fclose(output) || std::fclose(input);
}
