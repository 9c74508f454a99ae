/* Training steps through the C-visible interface only: generated headers, the bus and the interrupt.
 *
 * usage: train_step memory.bin after.bin
 *
 * Loads the image of the memory. In each step runs feed-forward, computes the softmax cross-entropy gradient of the
 * logits, runs back-propagation and the update. Prints the counters, and writes the memory to after.bin. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bus.h"
#include "fgmp.h"
#include "lnpu_commands.h"
#include "lnpu_config.h"
#include "lnpu_registers.h"
#include "lnpu_step.h"

#define REGISTER(name) (LNPU_BASE + (uint64_t)offsetof(lnpu_t, name))

#if LNPU_STEP_CLASSES > FGMP_BLOCK
#error "the logits must fit one block of 64 elements"
#endif

static void fail(const char *what, unsigned value)
{
    fprintf(stderr, "train_step: %s (%u)\n", what, value);
    exit(1);
}

static void run(const char *name, uint64_t address, uint32_t commands)
{
    uint32_t status;
    lnpu_bus_write32(REGISTER(PROGRAM), (uint32_t)address);
    lnpu_bus_write32(REGISTER(PROGRAM_HIGH), (uint32_t)(address >> 32));
    lnpu_bus_write32(REGISTER(PROGRAM_LENGTH), commands);
    lnpu_bus_write32(REGISTER(INTERRUPT), LNPU__INTERRUPT__ENABLE_bm);
    lnpu_bus_write32(REGISTER(CONTROL), LNPU__CONTROL__START_bm);
    lnpu_wait_interrupt();
    status = lnpu_bus_read32(REGISTER(STATUS));
    lnpu_bus_write32(REGISTER(STATUS), status); /* lowers the interrupt */
    if (status & LNPU__STATUS__ERROR_bm) {
        fprintf(stderr, "%s: error %u at command %u, detail %#x\n", name, lnpu_bus_read32(REGISTER(ERROR)),
                lnpu_bus_read32(REGISTER(ERROR_COMMAND)), lnpu_bus_read32(REGISTER(ERROR_DETAIL)));
        exit(1);
    }
    printf("%s: %u commands\n", name, commands);
}

/* Softmax cross-entropy: the gradient of the logits goes to memory, the loss is returned. */
static double loss_and_gradient(void)
{
    static const int labels[LNPU_STEP_BATCH] = LNPU_STEP_LABELS;
    static const fgmp_policy_t policy = {LNPU_STEP_ERROR_SCALE, LNPU_STEP_ERROR_LO, LNPU_STEP_ERROR_HI,
                                         LNPU_STEP_ERROR_BELOW, LNPU_STEP_ERROR_ABOVE};
    const unsigned run_blocks = 1u << LNPU_STEP_ERROR_LOG2_RUN;
    float logits[LNPU_STEP_CLASSES];
    double loss = 0.0;
    uint64_t place = 0;
    unsigned n, c;
    for (n = 0; n < LNPU_STEP_BATCH; ++n) {
        const unsigned block = n * LNPU_STEP_ERROR_LINE_BLOCKS; /* an image is a line of one pixel */
        float error[FGMP_BLOCK] = {0};
        uint8_t code[FGMP_SLOT_BYTES], length;
        double largest, sum = 0.0, gradient;
        lnpu_bus_read(LNPU_STEP_LOGITS_ADDRESS + (uint64_t)n * LNPU_STEP_LOGITS_PITCH, logits, sizeof logits);
        largest = logits[0];
        for (c = 1; c < LNPU_STEP_CLASSES; ++c) largest = fmax(largest, logits[c]);
        for (c = 0; c < LNPU_STEP_CLASSES; ++c) sum += exp(logits[c] - largest);
        loss += log(sum) - (logits[labels[n]] - largest);
        for (c = 0; c < LNPU_STEP_CLASSES; ++c) {
            gradient = exp(logits[c] - largest - log(sum)) - ((int)c == labels[n]);
            error[c] = (float)(gradient / LNPU_STEP_BATCH) * LNPU_STEP_LOSS_SCALE;
        }
        length = (uint8_t)fgmp_encode_block(code, error, &policy);
        if (block % run_blocks == 0) place = LNPU_STEP_ERROR_SLOTS + (uint64_t)FGMP_SLOT_BYTES * block;
        lnpu_bus_write(place, code, length);
        lnpu_bus_write(LNPU_STEP_ERROR_TABLE + block, &length, 1);
        place += length;
    }
    return loss / LNPU_STEP_BATCH;
}

/* A program made here, with lnpu_commands.h: waits for LOAD and STORE, then ends. */
static void run_own_program(void)
{
    lnpu_command_t commands[2] = {lnpu_command(LNPU_OPCODE_NOP), lnpu_command(LNPU_OPCODE_END)};
    if (!LNPU_SET(&commands[0], NOP, WAIT_UNITS, 1 << LNPU_UNIT_LOAD | 1 << LNPU_UNIT_STORE)) fail("wait_units", 0);
    lnpu_bus_write(LNPU_STEP_SCRATCH, commands, sizeof commands);
    run("own program", LNPU_STEP_SCRATCH, 2);
}

static void print_counter(const char *name, uint64_t low_address)
{
    const uint32_t low = lnpu_bus_read32(low_address), high = lnpu_bus_read32(low_address + 4);
    printf("%s %llu\n", name, (unsigned long long)high << 32 | low);
}

static void copy_file(const char *path, const char *mode, uint8_t *buffer)
{
    FILE *file = fopen(path, mode);
    size_t done = 0;
    if (file) {
        done = mode[0] == 'r' ? fread(buffer, 1, LNPU_STEP_MEMORY_BYTES, file)
                              : fwrite(buffer, 1, LNPU_STEP_MEMORY_BYTES, file);
        if (fclose(file)) done = 0;
    }
    if (done != LNPU_STEP_MEMORY_BYTES) {
        fprintf(stderr, "train_step: %s must have %u bytes\n", path, LNPU_STEP_MEMORY_BYTES);
        exit(1);
    }
}

int train_step(int argc, char **argv)
{
    uint8_t *buffer;
    unsigned step;
    if (argc != 3) {
        fprintf(stderr, "usage: %s memory.bin after.bin\n", argv[0]);
        return 2;
    }
    if (lnpu_bus_read32(REGISTER(ID)) != LNPU__ID__ID_reset) fail("this is no LNPU", lnpu_bus_read32(REGISTER(ID)));
    if ((lnpu_bus_read32(REGISTER(SHAPE0)) & LNPU__SHAPE0__CORES_bm) != LNPU_CONFIG_CORES)
        fail("the chip is not of configuration " LNPU_CONFIG_NAME, lnpu_bus_read32(REGISTER(SHAPE0)));

    buffer = malloc(LNPU_STEP_MEMORY_BYTES);
    if (!buffer) fail("out of memory", LNPU_STEP_MEMORY_BYTES);
    copy_file(argv[1], "rb", buffer);
    lnpu_bus_write(0, buffer, LNPU_STEP_MEMORY_BYTES);

    run_own_program();
    run("initial states", LNPU_STEP_INITIAL_ADDRESS, LNPU_STEP_INITIAL_COMMANDS);
    lnpu_bus_write32(REGISTER(CONTROL), LNPU__CONTROL__CLEAR_bm);
    for (step = 0; step < LNPU_STEP_STEPS; ++step) {
        run("feed-forward", LNPU_STEP_FORWARD_ADDRESS, LNPU_STEP_FORWARD_COMMANDS);
        printf("loss %.6f\n", loss_and_gradient());
        run("back-propagation and weight gradients", LNPU_STEP_BACKWARD_ADDRESS, LNPU_STEP_BACKWARD_COMMANDS);
        run("update", LNPU_STEP_UPDATE_ADDRESS, LNPU_STEP_UPDATE_COMMANDS);
    }

#define COUNTER(name) print_counter(#name, REGISTER(COUNTER_##name##_LOW))
    COUNTER(CYCLES);
    COUNTER(COMMANDS);
    COUNTER(MAC16);
    COUNTER(MAC8);
    COUNTER(SKIPPED_ZERO);
    COUNTER(SKIPPED_PADDING);
    COUNTER(READ_BEATS);
    COUNTER(WRITE_BEATS);

    lnpu_bus_read(0, buffer, LNPU_STEP_MEMORY_BYTES);
    copy_file(argv[2], "wb", buffer);
    free(buffer);
    return 0;
}
