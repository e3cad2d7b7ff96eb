// Lets the tests choose the emulator's schedule.
#include "machine.h"

extern "C" __attribute__((visibility("default"))) void emu_set_schedule(uint64_t seed, int early_copies) {
    emu::options.seed = seed;
    emu::options.early_copies = early_copies != 0;
}
