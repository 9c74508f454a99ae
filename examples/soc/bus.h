/* What a host needs of its system: a bus to memory and registers, and the interrupt. Any port of train_step.c has to
 * provide these; here they are clock cycles of the simulated system (bus.cpp). A bus error ends the program. */
#ifndef BUS_H
#define BUS_H

#include <stddef.h>
#include <stdint.h>

#define LNPU_BASE 0xF0000000u /* of the registers; memory begins at 0 */

#ifdef __cplusplus
extern "C" {
#endif

uint32_t lnpu_bus_read32(uint64_t address);
void lnpu_bus_write32(uint64_t address, uint32_t value);

/* Copies in bursts; any address and length in memory. */
void lnpu_bus_read(uint64_t address, void *data, size_t bytes);
void lnpu_bus_write(uint64_t address, const void *data, size_t bytes);

void lnpu_wait_interrupt(void);

#ifdef __cplusplus
}
#endif
#endif
