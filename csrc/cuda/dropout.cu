// SPDX-License-Identifier: Apache-2.0
// Dropout of rows: the mask of a token and a feature is a hash of both and a seed, so that no mask is stored.
//
//     out[t,f] = keep[t,f] rows[t,f] / (1 - probability);   keep[t,f] = hash(seed, t, f) >= probability * 2^32
//
// The constants are those of Wellons' hash triple32. All backends compute the mask of keep_mask in
// lmoe_kernels/reference.py.
#include "matrix.cuh"

#include "launch.cuh"

namespace lmoe {

constexpr int DROPOUT_WARPS = 8;      // of a block, each on one token
constexpr int DROPOUT_ELEMENTS = 16;  // of a lane

// The bits of a number mixed, so that close numbers get hashes that have nothing in common.
__device__ __forceinline__ uint32_t mixed(uint32_t h, uint32_t second_key = 0) {
    h = (h ^ h >> 17) * 0xed5ad4bb;
    h = (h ^ h >> 11 ^ second_key) * 0xac4c1b51;
    h = (h ^ h >> 15) * 0x31848bab;
    return h ^ h >> 14;
}

// The pair of keys of a token: the hash of a feature is mixed(feature ^ first, second).
struct Keys {
    uint32_t first, second;

    __device__ __forceinline__ Keys(int64_t seed, int64_t token) {
        const uint32_t t = static_cast<uint32_t>(token), high = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
        first = mixed(mixed(static_cast<uint32_t>(seed)) ^ t);
        second = mixed(mixed(high ^ 0x9e3779b9) + t);
    }
};

// Stores numbers rounded to the element's type, in one instruction.
template <class S, int W>
__device__ __forceinline__ void store_together(S* to, const float (&numbers)[W]) {
    S elements[W];
#pragma unroll
    for (int i = 0; i < W; ++i) elements[i] = from_float<S>(numbers[i]);
    if constexpr (W == 1) {
        *to = elements[0];
    } else {
        uint4 whole;
        memcpy(&whole, elements, sizeof whole);
        store_vector(to, whole);
    }
}

// A warp computes DROPOUT_ELEMENTS * 32 features of one token. A lane loads and stores 16 bytes together where all rows are
// ALIGNED, else one element.
template <class S, bool ALIGNED>
__global__ void __launch_bounds__(DROPOUT_WARPS * 32) dropout_kernel(DropoutParams p) {
    constexpr int W = ALIGNED ? VECTOR<S> : 1, COUNT = DROPOUT_ELEMENTS / W;
    const int64_t t = static_cast<int64_t>(blockIdx.x) * DROPOUT_WARPS + threadIdx.x / 32;
    const int64_t first = static_cast<int64_t>(blockIdx.y) * DROPOUT_ELEMENTS * 32 + threadIdx.x % 32 * W;
    if (t >= p.T) return;
    const S* rows = static_cast<const S*>(p.rows.data) + t * p.rows.stride + first;
    float values[COUNT][W];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        load_some(values[i], rows + i * 32 * W, first + i * 32 * W < p.F ? W : 0, ALIGNED);
    }
    const Keys keys(*p.seed, t);
    S* out = static_cast<S*>(p.out) + t * p.F + first;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        const uint32_t f = static_cast<uint32_t>(first) + i * 32 * W;
#pragma unroll
        for (int j = 0; j < W; ++j) {
            const bool keeps = mixed((f + j) ^ keys.first, keys.second) >= p.threshold;
            values[i][j] = keeps ? values[i][j] * p.factor : 0.f;
        }
        if (first + i * 32 * W < p.F) store_together(out + i * 32 * W, values[i]);
    }
}

void dropout(const DropoutParams& p, int device, void* queue) {
    if (p.T == 0 || p.F == 0) return;
    const DeviceGuard guard(device);
    const auto stream = static_cast<cudaStream_t>(queue);
    with_dtype(p.dtype, [&](auto scalar) {
        using S = decltype(scalar);
        const bool aligned = on_16_bytes(p.rows.data, p.rows.stride, sizeof(S)) && on_16_bytes(p.out, p.F, sizeof(S));
        const dim3 grid(tiles(p.T, DROPOUT_WARPS), tiles(p.F, DROPOUT_ELEMENTS * 32)), block(DROPOUT_WARPS * 32);
        aligned ? LAUNCH((dropout_kernel<S, true>), grid, block, 0, stream, p)
                : LAUNCH((dropout_kernel<S, false>), grid, block, 0, stream, p);
    });
    check_launch("dropout_kernel");
}

}  // namespace lmoe
