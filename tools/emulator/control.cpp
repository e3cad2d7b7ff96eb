// Lets Python choose the emulator's schedule and whether launches run, and read which launches have run.
#include "runtime.h"

extern "C" __attribute__((visibility("default"))) void emu_set_schedule(uint64_t seed, int early_copies) {
    emu::options.seed = seed;
    emu::options.early_copies = early_copies != 0;
}

extern "C" __attribute__((visibility("default"))) void emu_launch_nothing(int processors) {
    emu::options.running = false;
    emu::options.processors = processors;
}

extern "C" __attribute__((visibility("default"))) void emu_forget_launches() { emu::launches.clear(); }

extern "C" __attribute__((visibility("default"))) size_t emu_launches(const emu::Launch** first) {
    *first = emu::launches.data();
    return emu::launches.size();
}

extern "C" __attribute__((visibility("default"))) int emu_current_device() { return emu::current_device; }
