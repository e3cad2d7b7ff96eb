// Lets Python choose the emulator's schedule, and whether a launch runs at all.
#include "machine.h"

extern "C" __attribute__((visibility("default"))) void emu_set_schedule(uint64_t seed, int early_copies) {
    emu::options.seed = seed;
    emu::options.early_copies = early_copies != 0;
}

extern "C" __attribute__((visibility("default"))) void emu_launch_nothing(int processors) {
    emu::options.running = false;
    emu::options.processors = processors;
}
