// SPDX-License-Identifier: Apache-2.0
// Matrices in global memory: loads of any dtype, alignment and bounds.
#pragma once

#include "params.h"
#include "ptx.h"

namespace lmoe {

template <class S>
constexpr int VECTOR = 16 / sizeof(S);  // elements in 16 bytes

__device__ inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// One element of a tensor that is fp32 or of the kernel's dtype.
template <class S>
__device__ inline float load(const Tensor& tensor, int64_t index) {
    return tensor.fp32 ? static_cast<const float*>(tensor.data)[index] : to_float(static_cast<const S*>(tensor.data)[index]);
}

template <class S>
__device__ inline void store(void* data, int64_t index, bool fp32, float value) {
    if (fp32) {
        static_cast<float*>(data)[index] = value;
    } else {
        static_cast<S*>(data)[index] = from_float<S>(value);
    }
}

// Two elements in sequence, as one lane of a product has them.
template <class S>
struct alignas(2 * sizeof(S)) Pair {
    S first, second;
};

template <class S>
__device__ __forceinline__ Pair<S> load_pair(const S* from) {
    return *reinterpret_cast<const Pair<S>*>(from);
}
template <class S>
__device__ __forceinline__ void store_pair(S* to, Pair<S> pair) {
    *reinterpret_cast<Pair<S>*>(to) = pair;
}

inline __host__ __device__ bool on_16_bytes(const void* data, int64_t stride, int size) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * size % 16 == 0;
}

// A matrix in one buffer.
template <class S>
__host__ __device__ inline Matrix matrix(const void* data, bool fp32, int64_t rows, int64_t columns, int64_t stride) {
    const bool aligned = on_16_bytes(data, stride, fp32 ? 4 : sizeof(S));
    return {data, nullptr, INT64_MAX, rows, columns, stride, fp32, false, aligned, false};
}

// A matrix in two buffers; the rows of the second follow those of the first. Without a second it is the first alone.
template <class S>
__host__ __device__ inline Matrix stacked(const Tensor& first, int64_t split, const Tensor& second, int64_t rows_of_second,
                                          int64_t columns) {
    Matrix m = matrix<S>(first.data, first.fp32, split, columns, columns);
    if (second.data == nullptr) return m;
    const Matrix rest = matrix<S>(second.data, second.fp32, rows_of_second, columns, columns);
    m.second = second.data;
    m.split = split;
    m.rows += rows_of_second;
    m.second_fp32 = second.fp32;
    m.second_aligned = rest.first_aligned;
    return m;
}

// x as a matrix, and the factors that shrink multiplies it with: the rows of all A, then the gate's.
template <class S>
__host__ __device__ inline Matrix tokens_of(const ForwardParams& p) {
    return matrix<S>(p.x.data, false, p.T, p.I, p.x.stride);
}
template <class S>
__host__ __device__ inline Matrix a_and_gate(const ForwardParams& p) {
    return stacked<S>(p.lora_a, p.experts_of_a * p.R, p.gate_weight, p.E, p.I);
}
template <class S>
__host__ __device__ inline Matrix b_of(const ForwardParams& p) {
    return matrix<S>(p.lora_b.data, p.lora_b.fp32, p.E * p.R, p.O, p.O);
}

// The first `count` of N elements of a row, the others zero; `aligned` says that they start on a multiple of 16 bytes.
template <int N, class Element>
__device__ __forceinline__ void load_some(float (&out)[N], const Element* from, int count, bool aligned) {
    if (aligned && count == N) {
        alignas(16) Element whole[N];
#pragma unroll
        for (int i = 0; i < N * static_cast<int>(sizeof(Element)) / 16; ++i) {
            reinterpret_cast<uint4*>(whole)[i] = reinterpret_cast<const uint4*>(from)[i];
        }
#pragma unroll
        for (int i = 0; i < N; ++i) out[i] = to_float(whole[i]);
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i) out[i] = i < count ? to_float(from[i]) : 0.f;
    }
}

// Some elements of one row of a matrix: their address, and how many of them are inside the matrix.
struct Span {
    const void* data;
    int64_t index;
    int count;
    bool fp32, aligned;

    template <int N>
    static __device__ __forceinline__ Span of(const Matrix& m, int64_t row, int64_t col, int64_t last_row) {
        const bool second = row >= m.split;
        const int64_t index = (second ? row - m.split : row) * m.stride + col;
        const int64_t inside = row < last_row ? m.columns - col : 0;
        const int count = inside <= 0 ? 0 : inside < N ? static_cast<int>(inside) : N;
        return second ? Span{m.second, index, count, m.second_fp32, m.second_aligned}
                      : Span{m.first, index, count, m.first_fp32, m.first_aligned};
    }
    template <class S, int N>
    __device__ __forceinline__ void load(float (&out)[N]) const {
        if (fp32) {
            load_some(out, static_cast<const float*>(data) + index, count, aligned);
        } else {
            load_some(out, static_cast<const S*>(data) + index, count, aligned);
        }
    }
};

// Copies 16 bytes of a matrix to shared memory, in the kernel's dtype; elements outside the matrix become zero.
template <class S>
__device__ __forceinline__ void load_chunk(S* shared, const Matrix& m, int64_t row, int64_t col, int64_t last_row) {
    const Span span = Span::of<VECTOR<S>>(m, row, col, last_row);
    if (span.aligned && (!span.fp32 || sizeof(S) == 4)) {
        const S* source = static_cast<const S*>(span.data) + (span.count > 0 ? span.index : 0);
        copy_async(shared, source, span.count * static_cast<int>(sizeof(S)));
        return;
    }
    float values[VECTOR<S>];
    span.load<S>(values);
    alignas(16) S chunk[VECTOR<S>];
#pragma unroll
    for (int i = 0; i < VECTOR<S>; ++i) chunk[i] = from_float<S>(values[i]);
    *reinterpret_cast<uint4*>(shared) = *reinterpret_cast<const uint4*>(chunk);
}

}  // namespace lmoe
