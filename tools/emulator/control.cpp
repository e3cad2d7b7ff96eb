// Lets Python choose the emulator's schedule, its devices and whether launches run, and read what the launchers did.
#include "runtime.h"

extern "C" __attribute__((visibility("default"))) void emu_set_schedule(uint64_t seed, int early_copies) {
    emu::options.seed = seed;
    emu::options.early_copies = early_copies != 0;
}

extern "C" __attribute__((visibility("default"))) void emu_launch_nothing(int processors) {
    emu::options.running = false;
    emu::options.processors = processors;
}

extern "C" __attribute__((visibility("default"))) void emu_forget_calls() {
    emu::launches.clear();
    emu::attribute_calls = 0;
}

extern "C" __attribute__((visibility("default"))) size_t emu_launches(const emu::Launch** first) {
    *first = emu::launches.data();
    return emu::launches.size();
}

extern "C" __attribute__((visibility("default"))) int emu_current_device() { return emu::current_device; }

extern "C" __attribute__((visibility("default"))) int emu_attribute_calls() { return emu::attribute_calls; }

extern "C" __attribute__((visibility("default"))) void emu_set_device(int device, int shared_bytes, int cooperative,
                                                                      int sets_attributes) {
    emu::devices[device] = {shared_bytes, cooperative != 0, sets_attributes != 0};
}

extern "C" __attribute__((visibility("default"))) void emu_set_capturing(int capturing) { emu::capturing = capturing != 0; }

extern "C" __attribute__((visibility("default"))) int emu_capture_is_relaxed() { return emu::capture_is_relaxed; }
