// Replaces csrc/ptx.h and the CUDA headers where g++ compiles kernels and launchers. Only for tests, not part of the
// package.
#pragma once

#include <cmath>
#include <type_traits>

#include "runtime.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define DYNAMIC_SMEM(name) unsigned char* name = emu::self->block->shared
#define threadIdx (emu::self->index)
#define blockIdx (emu::self->block->index)
#define blockDim (emu::grid->block)
#define gridDim (emu::grid->grid)

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct __nv_bfloat16 {
    uint16_t bits;
};
struct __half {
    uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(__nv_bfloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
inline float to_float(__half x) {
    _Float16 value;
    memcpy(&value, &x.bits, 2);
    return static_cast<float>(value);
}

template <class S>
S from_float(float x) {
    if constexpr (std::is_same_v<S, float>) {
        return x;
    } else if constexpr (std::is_same_v<S, __half>) {
        const auto half = static_cast<_Float16>(x);
        __half out;
        memcpy(&out.bits, &half, 2);
        return out;
    } else {
        uint32_t bits;
        memcpy(&bits, &x, 4);
        if (x != x) return {0x7fff};
        return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};  // to nearest, ties to even
    }
}

inline void __syncthreads() { emu::block_barrier(); }
inline void __syncwarp(unsigned mask = ~0u) {
    EMU_TSAN(__tsan_release(&emu::warp_of(*emu::self));)
    emu::collective("__syncwarp", mask, nullptr, [](emu::Warp&) {});
    EMU_TSAN(__tsan_acquire(&emu::warp_of(*emu::self));)
}

template <class T>
EMU_OUTLINE T __shfl_xor_sync(unsigned mask, T value, int flip) {
    struct Argument {
        T value, out;
    };
    emu::IgnoreAccesses guard;
    Argument argument{value, value};
    emu::collective("__shfl_xor_sync", mask, &argument, [flip](emu::Warp& warp) {
        for (int lane = 0; lane < 32; ++lane) {
            if (!(warp.mask >> lane & 1)) continue;
            auto* mine = static_cast<Argument*>(warp.arguments[lane]);
            mine->out = static_cast<Argument*>(warp.arguments[lane ^ flip])->value;
        }
    });
    return argument.out;
}

inline void store_vector(void* global, uint2 value) { *static_cast<uint2*>(global) = value; }
inline void store_vector(void* global, uint4 value) { *static_cast<uint4*>(global) = value; }

// An error in a launch that is not cooperative, as in CUDA.
inline void grid_barrier() {
    if (!emu::grid->together) return emu::fail("a grid-wide barrier in a launch that is not cooperative");
    __syncthreads();
    if (emu::self->id == 0) {
        const unsigned blocks = gridDim.x * gridDim.y * gridDim.z;
        const unsigned before = __atomic_fetch_add(&emu::grid->met, 1u, __ATOMIC_ACQ_REL);
        do emu::spin();
        while (__atomic_load_n(&emu::grid->met, __ATOMIC_ACQUIRE) < before - before % blocks + blocks);
    }
    __syncthreads();
}

inline void copy_async(void* shared, const void* global, int bytes) { emu::start_copy(shared, global, bytes); }
inline void copy_async_or_zeros(void* shared, const void* global, bool is_copied) {
    copy_async(shared, global, is_copied ? 16 : 0);
}
inline void copy_async_commit() {
    emu::IgnoreAccesses guard;
    ++emu::self->group;
}
template <int NEWEST>
void copy_async_wait() {
    emu::wait_for_copies(NEWEST);
}

// Lane 8 m + i gives the address of row i of matrix m. Lane l receives two elements, 2 (l % 4) and the next, of row l / 4;
// transposed, of column l / 4.
template <bool TRANSPOSED>
EMU_OUTLINE inline void emu_load_matrices(uint32_t* registers, const void* row) {
    struct Argument {
        const uint16_t* row;
        uint32_t* registers;
    };
    if (reinterpret_cast<uintptr_t>(row) % 16) return emu::fail("ldmatrix: a row does not lie on 16 bytes");
    emu::touch_read(row, 16);
    emu::IgnoreAccesses guard;
    Argument argument{static_cast<const uint16_t*>(row), registers};
    emu::collective(TRANSPOSED ? "ldmatrix.trans" : "ldmatrix", ~0u, &argument, [](emu::Warp& warp) {
        auto at = [&](int m, int i, int j) { return static_cast<Argument*>(warp.arguments[8 * m + i])->row[j]; };
        for (int lane = 0; lane < 32; ++lane) {
            const int i = lane / 4, j = lane % 4 * 2;
            for (int m = 0; m < 4; ++m) {
                const uint32_t low = TRANSPOSED ? at(m, j, i) : at(m, i, j);
                const uint32_t high = TRANSPOSED ? at(m, j + 1, i) : at(m, i, j + 1);
                static_cast<Argument*>(warp.arguments[lane])->registers[m] = low | high << 16;
            }
        }
    });
}
inline void load_matrices(uint32_t (&r)[4], const void* row) { emu_load_matrices<false>(r, row); }
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) { emu_load_matrices<true>(r, row); }

template <class S>
EMU_OUTLINE inline void mma(S, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct Argument {
        float* d;
        const uint32_t* a;
        uint32_t b[2];
    };
    emu::IgnoreAccesses guard;
    Argument argument{d, a, {b0, b1}};
    emu::collective("mma", ~0u, &argument, [](emu::Warp& warp) {
        float left[16][16], right[8][16];
        auto part = [](uint32_t pair, int j) {
            return to_float(S{static_cast<uint16_t>(j == 0 ? pair & 0xffff : pair >> 16)});
        };
        for (int lane = 0; lane < 32; ++lane) {
            const auto* x = static_cast<Argument*>(warp.arguments[lane]);
            const int i = lane / 4, k = lane % 4 * 2;
            for (int j = 0; j < 2; ++j) {
                for (int m = 0; m < 4; ++m) left[i + m % 2 * 8][k + m / 2 * 8 + j] = part(x->a[m], j);
                for (int m = 0; m < 2; ++m) right[i][k + m * 8 + j] = part(x->b[m], j);
            }
        }
        for (int lane = 0; lane < 32; ++lane) {
            auto* x = static_cast<Argument*>(warp.arguments[lane]);
            for (int m = 0; m < 4; ++m) {
                const int i = lane / 4 + m / 2 * 8, n = lane % 4 * 2 + m % 2;
                float sum = 0.f;
                for (int k = 0; k < 16; ++k) sum += left[i][k] * right[n][k];
                x->d[m] += sum;
            }
        }
    });
}
