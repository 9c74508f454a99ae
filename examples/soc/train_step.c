/* A training step through the C-visible interface only: generated headers, the bus and the interrupt.
 *
 * usage: train_step memory.bin after.bin
 *
 * Loads the image of the memory, runs feed-forward, computes the softmax cross-entropy gradient of the logits, runs
 * back-propagation and the update, prints the counters, and writes the memory to after.bin. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bus.h"
#include "lnpu_commands.h"
#include "lnpu_config.h"
#include "lnpu_registers.h"
#include "lnpu_step.h"

#define REGISTER(name) (LNPU_BASE + (uint64_t)offsetof(lnpu_t, name))
#define SLOT_BYTES 160
#define BLOCK 64

#if LNPU_STEP_CLASSES > BLOCK
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

/* IEEE binary16 of x, to nearest, ties to even. */
static uint16_t to_half(float x)
{
    uint32_t bits, magnitude, sign, half, rest, shift;
    memcpy(&bits, &x, 4);
    sign = bits >> 16 & 0x8000;
    magnitude = bits & 0x7FFFFFFF;
    if (magnitude > 0x7F800000) return 0x7E00;
    if (magnitude >= 0x47800000) return (uint16_t)(sign | 0x7C00);
    if (magnitude < 0x33000000) return (uint16_t)sign;
    if (magnitude >= 0x38800000) {
        half = (magnitude - 0x38000000) >> 13;
        rest = magnitude << 19;
    } else { /* subnormal */
        shift = 126 - (magnitude >> 23);
        magnitude = (magnitude & 0x7FFFFF) | 0x800000;
        half = magnitude >> shift;
        rest = magnitude << (32 - shift);
    }
    half += rest > 0x80000000u || (rest == 0x80000000u && (half & 1));
    return (uint16_t)(sign | half);
}

/* An encoded block of FP16 elements (docs/architecture.md); returns its bytes. */
static unsigned encode_block(uint8_t *out, const uint16_t *elements)
{
    enum { DENSE = 0, MASKED = 1, EMPTY = 2, FP16 = 1 << 2, MAGIC = 0xA0 };
    unsigned i, count = 0, length = 1;
    for (i = 0; i < BLOCK; ++i) count += (elements[i] & 0x7FFF) != 0;
    if (count == 0) {
        out[0] = MAGIC | EMPTY;
        return 1;
    }
    out[0] = (uint8_t)(MAGIC | FP16 | (count == BLOCK ? DENSE : MASKED));
    if (count < BLOCK) {
        memset(out + 1, 0, BLOCK / 8);
        for (i = 0; i < BLOCK; ++i)
            if (elements[i] & 0x7FFF) out[1 + i / 8] |= (uint8_t)(1u << i % 8);
        length += BLOCK / 8;
    }
    for (i = 0; i < BLOCK; ++i) {
        if (!(elements[i] & 0x7FFF)) continue;
        out[length++] = (uint8_t)elements[i];
        out[length++] = (uint8_t)(elements[i] >> 8);
    }
    return length;
}

/* Softmax cross-entropy: the gradient of the logits goes to memory, the loss is returned. */
static double loss_and_gradient(void)
{
    static const int labels[LNPU_STEP_BATCH] = LNPU_STEP_LABELS;
    const unsigned run_blocks = 1u << LNPU_STEP_ERROR_LOG2_RUN;
    float logits[LNPU_STEP_CLASSES];
    double loss = 0.0;
    uint64_t place = 0;
    unsigned n, c;
    for (n = 0; n < LNPU_STEP_BATCH; ++n) {
        const unsigned block = n * LNPU_STEP_ERROR_LINE_BLOCKS; /* an image is a line of one pixel */
        uint16_t elements[BLOCK] = {0};
        uint8_t code[SLOT_BYTES], length;
        double largest, sum = 0.0, gradient;
        lnpu_bus_read(LNPU_STEP_LOGITS_ADDRESS + (uint64_t)n * LNPU_STEP_LOGITS_PITCH, logits, sizeof logits);
        largest = logits[0];
        for (c = 1; c < LNPU_STEP_CLASSES; ++c) largest = fmax(largest, logits[c]);
        for (c = 0; c < LNPU_STEP_CLASSES; ++c) sum += exp(logits[c] - largest);
        loss += log(sum) - (logits[labels[n]] - largest);
        for (c = 0; c < LNPU_STEP_CLASSES; ++c) {
            gradient = exp(logits[c] - largest - log(sum)) - ((int)c == labels[n]);
            elements[c] = to_half((float)(gradient / LNPU_STEP_BATCH) * LNPU_STEP_LOSS_SCALE);
        }
        length = (uint8_t)encode_block(code, elements);
        if (block % run_blocks == 0) place = LNPU_STEP_ERROR_SLOTS + (uint64_t)SLOT_BYTES * block;
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
    run("feed-forward", LNPU_STEP_FORWARD_ADDRESS, LNPU_STEP_FORWARD_COMMANDS);
    printf("loss %.6f\n", loss_and_gradient());
    run("back-propagation and weight gradients", LNPU_STEP_BACKWARD_ADDRESS, LNPU_STEP_BACKWARD_COMMANDS);
    run("update", LNPU_STEP_UPDATE_ADDRESS, LNPU_STEP_UPDATE_COMMANDS);

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
