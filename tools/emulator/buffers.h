// What the programs share: random tensors, and the loop over problems. Every buffer has an allocation of its
// own and exact size, so that AddressSanitizer sees each access outside, and is full of NaN until it is written.
#pragma once

#include <cstdio>
#include <random>

#include "cuda_emu.h"
#include "launchers.h"

namespace driver {

using namespace lmoe;

inline std::mt19937_64 generator;
inline int64_t draw(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(generator() % static_cast<uint64_t>(high - low + 1));
}
inline bool coin() { return generator() & 1; }
inline int64_t up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// A tensor of fp32 or the problem's dtype that owns its memory.
struct Buffer {
    std::vector<std::unique_ptr<unsigned char[]>> memory;  // one allocation; empty if the tensor is not given
    int64_t count = 0;
    Dtype dtype = Dtype::fp32;

    int size() const { return dtype == Dtype::fp32 ? 4 : 2; }
    void* data() const { return memory.empty() ? nullptr : memory[0].get(); }
    Tensor tensor() const { return {data(), dtype == Dtype::fp32}; }
    unsigned char* at(int64_t i) const { return memory[0].get() + i * size(); }
    double get(int64_t i) const {
        if (dtype == Dtype::fp32) return read<float>(i);
        return dtype == Dtype::bf16 ? to_float(read<__nv_bfloat16>(i)) : to_float(read<__half>(i));
    }
    template <class S>
    S read(int64_t i) const {
        S value;
        memcpy(&value, at(i), sizeof(S));
        return value;
    }
    void set(int64_t i, float value) {
        const auto bf16 = from_float<__nv_bfloat16>(value);
        const auto fp16 = from_float<__half>(value);
        memcpy(at(i),
               dtype == Dtype::fp32   ? static_cast<const void*>(&value)
               : dtype == Dtype::bf16 ? static_cast<const void*>(&bf16)
                                      : &fp16,
               size());
    }
};

inline Buffer make(int64_t count, Dtype dtype) {
    Buffer t;
    t.count = count;
    t.dtype = dtype;
    t.memory.emplace_back(new unsigned char[count * t.size()]);
    memset(t.data(), 0xff, count * t.size());
    return t;
}

inline Buffer random_tensor(int64_t count, Dtype dtype, double scale) {
    Buffer t = make(count, dtype);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < count; ++i) t.set(i, static_cast<float>(scale) * normal(generator));
    return t;
}

inline bool same(const char* name, const Buffer& first, const Buffer& second) {
    if (first.count == 0 || memcmp(first.data(), second.data(), first.count * first.size()) == 0) return true;
    printf("  %s depends on the schedule\n", name);
    return false;
}

// Runs the problems FIRST, FIRST + 1, ... of the arguments FIRST COUNT, and returns the program's exit status.
inline int run_problems(char** arguments, bool (*is_right)(uint64_t seed)) {
    const uint64_t first = std::strtoull(arguments[1], nullptr, 10), problems = std::strtoull(arguments[2], nullptr, 10);
    emu::options.stack_bytes = 256 << 10;  // sanitizers make stack frames larger
    uint64_t bad = 0;
    for (uint64_t seed = first; seed < first + problems; ++seed) {
        std::string error;
        bool good = false;
        try {
            good = is_right(seed);
        } catch (const std::exception& e) {
            error = e.what();
        }
        if (!good) {
            ++bad;
            printf("problem %llu fails %s\n", static_cast<unsigned long long>(seed), error.c_str());
        }
    }
    printf("%llu of %llu problems fail\n", static_cast<unsigned long long>(bad), static_cast<unsigned long long>(problems));
    return bad != 0;
}

}  // namespace driver
