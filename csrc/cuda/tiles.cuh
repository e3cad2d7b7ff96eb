// SPDX-License-Identifier: Apache-2.0
// The building block of all kernels: a pipelined tile product, out[i, j] = sum_k P(i, k) Q(j, k), fp32 in shared memory.
//
// Both operands are matrices of contiguous rows. K_ALONG_ROW says that the sum runs along the rows (an operand of `shrink`);
// otherwise it runs from row to row (`wgrad`, and the factors of `expand`), and ldmatrix transposes while it loads.
// fp32 uses FMA on the same accumulator layout, so the code around the product is the same.
#pragma once

#include "params.h"
#include "ptx.h"

namespace lmoe {

constexpr int THREADS = 128;  // four warps
constexpr int STAGES = 4;     // pipeline depth. 12 KB a stage: four blocks fit an SM with 228 KB; 14 KB for shrink: three

template <class S>
constexpr int VECTOR = 16 / sizeof(S);  // elements in 16 bytes

template <class S>
constexpr int BLOCK_K = 64 / sizeof(S);  // elements of the sum in one pipeline step: 64 bytes of a row

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

// A tile of ROWS x COLS elements in shared memory. The 16-byte chunks of a row are permuted (swizzled), so that the eight
// rows which ldmatrix reads together lie in different banks.
template <class S, int ROWS, int COLS>
struct Tile {
    static constexpr int CHUNKS = COLS / VECTOR<S>;
    static constexpr int ELEMENTS = ROWS * COLS;
    static constexpr int BYTES = ELEMENTS * static_cast<int>(sizeof(S));
    static constexpr int PERMUTED = CHUNKS >= 8 ? 8 : CHUNKS;  // chunks that are permuted among themselves

    static __device__ __forceinline__ int chunk_at(int row, int chunk) {
        return row * COLS + (chunk ^ (row / (8 / PERMUTED) % PERMUTED)) * VECTOR<S>;
    }
    static __device__ __forceinline__ int at(int row, int col) { return chunk_at(row, col / VECTOR<S>) + col % VECTOR<S>; }
};

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

// Copies rows [row, row + ROWS) and columns [col, col + COLS) of a matrix; rows from last_row on become zero.
template <class S, int ROWS, int COLS>
__device__ __forceinline__ void load_tile(S* shared, const Matrix& m, int64_t row, int64_t col, int64_t last_row) {
    using T = Tile<S, ROWS, COLS>;
    for (int i = threadIdx.x; i < ROWS * T::CHUNKS; i += THREADS) {
        const int r = i / T::CHUNKS, c = i % T::CHUNKS;
        load_chunk(shared + T::chunk_at(r, c), m, row + r, col + c * VECTOR<S>, last_row);
    }
}

// The steps of a sum, with DEPTH stages: load(step) starts the copies that use(step) reads, DEPTH - 1 steps ahead.
template <int DEPTH, class Load, class Use>
__device__ __forceinline__ void pipeline(int steps, Load load, Use use) {
#pragma unroll 1  // load is much code: do not repeat it
    for (int step = 1 - DEPTH; step < steps; ++step) {
        if (step >= 0) {
            copy_async_wait<DEPTH - 2>();
            __syncthreads();  // all threads see this step's tiles, and no thread still reads the last step's
        }
        if (step + DEPTH - 1 < steps) load(step + DEPTH - 1);
        copy_async_commit();  // also an empty group, so that the count in the wait is right until the last step
        if (step >= 0) use(step);
    }
    copy_async_wait<0>();
}

// An operand with EXTENT rows of the product: where its tile starts, how it is loaded, how its fragments are read.
template <class S, int EXTENT, bool K_ALONG_ROW>
struct Operand {
    using T = Tile<S, K_ALONG_ROW ? EXTENT : BLOCK_K<S>, K_ALONG_ROW ? BLOCK_K<S> : EXTENT>;

    static __device__ __forceinline__ void load(S* shared, const Matrix& m, int64_t start, int64_t k, int64_t last_k) {
        if constexpr (K_ALONG_ROW) {
            load_tile<S, EXTENT, BLOCK_K<S>>(shared, m, start, k, m.rows);
        } else {
            load_tile<S, BLOCK_K<S>, EXTENT>(shared, m, k, start, last_k);
        }
    }
    // The index of element (i, k) where shared memory holds a whole operand, tile after tile along k.
    static __device__ __forceinline__ int kept_at(int i, int k) {
        return k / BLOCK_K<S> * T::ELEMENTS + (K_ALONG_ROW ? T::at(i, k % BLOCK_K<S>) : T::at(k % BLOCK_K<S>, i));
    }
    // Two pairs of 8 x 8 matrices: outer pair along k for P (a 16 x 16 fragment), along the extent for Q (two 8 x 16 ones).
    template <bool IS_P>
    static __device__ __forceinline__ void fragment(uint32_t (&r)[4], const S* shared, int start, int k) {
        const int lane = threadIdx.x % 32, inner = lane / 8 % 2 * 8, outer = lane / 16 * 8;
        const int i = start + (IS_P ? inner : outer), kk = k + (IS_P ? outer : inner);
        if constexpr (K_ALONG_ROW) {
            load_matrices(r, shared + T::chunk_at(i + lane % 8, kk / VECTOR<S>));
        } else {
            load_matrices_transposed(r, shared + T::chunk_at(kk + lane % 8, i / VECTOR<S>));
        }
    }
    static __device__ __forceinline__ float element(const S* shared, int i, int k) {
        return to_float(shared[K_ALONG_ROW ? T::at(i, k) : T::at(k, i)]);
    }
};

// A product of ROWS x COLS, computed by four warps, ROWS_OF_WARPS of them along the rows.
template <class S, int ROWS, int COLS, int ROWS_OF_WARPS, bool P_K_ALONG_ROW, bool Q_K_ALONG_ROW>
struct Product {
    using P = Operand<S, ROWS, P_K_ALONG_ROW>;
    using Q = Operand<S, COLS, Q_K_ALONG_ROW>;
    static constexpr int WARP_ROWS = ROWS / ROWS_OF_WARPS, WARP_COLS = COLS / (THREADS / 32 / ROWS_OF_WARPS);
    static constexpr int COLUMNS = COLS, STAGE_BYTES = P::T::BYTES + Q::T::BYTES;
    static constexpr int OUT_STRIDE = COLS + 8;  // rows start eight banks apart: no bank conflicts among the lanes' float2
    static constexpr int OUT_BYTES = ROWS * OUT_STRIDE * 4;
    static constexpr int SMEM = STAGES * STAGE_BYTES > OUT_BYTES ? STAGES * STAGE_BYTES : OUT_BYTES;
    static constexpr int SWEEP_STAGES = 3;  // they hold one operand only, and the output needs memory of its own
    static constexpr int SWEEP_SMEM = OUT_BYTES + SWEEP_STAGES * Q::T::BYTES;
    using Accumulators = float[WARP_ROWS / 16][WARP_COLS / 8][4];

    // out[i, j] = sum over k in [first_k, last_k) of p(p_start + i, k) q(q_start + j, k); ends with a barrier.
    static __device__ __forceinline__ const float* run(unsigned char* smem, const Matrix& p, int64_t p_start,
                                                       const Matrix& q, int64_t q_start, int64_t first_k, int64_t last_k) {
        Accumulators acc = {};
        pipeline<STAGES>(
            last_k > first_k ? steps_over(last_k - first_k) : 0,
            [&](int step) {
                S* stage = reinterpret_cast<S*>(smem + step % STAGES * STAGE_BYTES);
                const int64_t k = first_k + static_cast<int64_t>(step) * BLOCK_K<S>;
                P::load(stage, p, p_start, k, last_k);
                Q::load(stage + P::T::ELEMENTS, q, q_start, k, last_k);
            },
            [&](int step) {
                const S* stage = reinterpret_cast<const S*>(smem + step % STAGES * STAGE_BYTES);
                multiply(acc, stage, stage + P::T::ELEMENTS);
            });
        __syncthreads();  // the output overwrites the stages
        float* out = reinterpret_cast<float*>(smem);
        put(acc, out);
        __syncthreads();
        return out;
    }

    // The same for all columns of q (K_ALONG_ROW false), with p in shared memory (see kept_at) and zero from q.rows on. All
    // threads call use(out, j0) for the columns from j0 on, while the copies for the next columns are in flight.
    template <class Use>
    static __device__ __forceinline__ void sweep(unsigned char* smem, const S* p, const Matrix& q, Use use) {
        float* out = reinterpret_cast<float*>(smem);
        S* stages = reinterpret_cast<S*>(smem + OUT_BYTES);
        const int steps = steps_over(q.rows), tiles = static_cast<int>((q.columns + COLS - 1) / COLS);
        Accumulators acc = {};
        pipeline<SWEEP_STAGES>(
            tiles * steps,
            [&](int i) {
                Q::load(stages + i % SWEEP_STAGES * Q::T::ELEMENTS, q, i / steps * COLS, i % steps * BLOCK_K<S>, q.rows);
            },
            [&](int i) {
                multiply(acc, p + i % steps * P::T::ELEMENTS, stages + i % SWEEP_STAGES * Q::T::ELEMENTS);
                if (i % steps + 1 < steps) return;
                put(acc, out);  // no thread still reads the last output: the pipeline had a barrier in between
                for_each_accumulator([&](int r, int n, int half, int, int) {
                    acc[r][n][half * 2] = acc[r][n][half * 2 + 1] = 0.f;
                });
                __syncthreads();  // all threads see the output
                use(static_cast<const float*>(out), static_cast<int64_t>(i / steps) * COLS);
            });
    }

    static __device__ __forceinline__ int steps_over(int64_t count) {
        return static_cast<int>((count + BLOCK_K<S> - 1) / BLOCK_K<S>);
    }
    static __device__ __forceinline__ void put(const Accumulators& acc, float* out) {
        for_each_accumulator([&](int i, int n, int half, int row, int col) {
            float2 pair = {acc[i][n][half * 2], acc[i][n][half * 2 + 1]};
            *reinterpret_cast<float2*>(out + row * OUT_STRIDE + col) = pair;
        });
    }

    // acc [WARP_ROWS, WARP_COLS] += [WARP_ROWS, BLOCK_K] @ [BLOCK_K, WARP_COLS]
    static __device__ __forceinline__ void multiply(Accumulators& acc, const S* p, const S* q) {
        if constexpr (sizeof(S) == 4) {
            Accumulators part = {};  // sums of this step only: a sum over thousands of products would lose more to rounding
#pragma unroll 1
            for (int k = 0; k < BLOCK_K<S>; ++k) {
                for_each_accumulator([&](int i, int n, int half, int row, int col) {
                    const float left = P::element(p, row, k);
                    part[i][n][half * 2] += left * Q::element(q, col, k);
                    part[i][n][half * 2 + 1] += left * Q::element(q, col + 1, k);
                });
            }
            for_each_accumulator([&](int i, int n, int half, int, int) {
                acc[i][n][half * 2] += part[i][n][half * 2];
                acc[i][n][half * 2 + 1] += part[i][n][half * 2 + 1];
            });
        } else {
            const int row = first_row(), col = first_col();
#pragma unroll
            for (int k = 0; k < BLOCK_K<S>; k += 16) {
                uint32_t a[WARP_ROWS / 16][4], b[WARP_COLS / 16][4];
#pragma unroll
                for (int i = 0; i < WARP_ROWS / 16; ++i) P::template fragment<true>(a[i], p, row + i * 16, k);
#pragma unroll
                for (int j = 0; j < WARP_COLS / 16; ++j) Q::template fragment<false>(b[j], q, col + j * 16, k);
#pragma unroll
                for (int i = 0; i < WARP_ROWS / 16; ++i) {
#pragma unroll
                    for (int n = 0; n < WARP_COLS / 8; ++n) {
                        mma(S{}, acc[i][n], a[i], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
                    }
                }
            }
        }
    }

    static __device__ __forceinline__ int first_row() {
        return static_cast<int>(threadIdx.x) / 32 % ROWS_OF_WARPS * WARP_ROWS;
    }
    static __device__ __forceinline__ int first_col() {
        return static_cast<int>(threadIdx.x) / 32 / ROWS_OF_WARPS * WARP_COLS;
    }
    // f(i, n, half, row, col): accumulators [i][n][2 half] and [2 half + 1] are the tile's (row, col) and (row, col + 1).
    template <class F>
    static __device__ __forceinline__ void for_each_accumulator(F f) {
        const int lane = threadIdx.x % 32, row = first_row() + lane / 4, col = first_col() + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < WARP_ROWS / 16; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
#pragma unroll
                for (int n = 0; n < WARP_COLS / 8; ++n) f(i, n, half, row + i * 16 + half * 8, col + n * 8);
            }
        }
    }
    // f(row, col, value) for the whole tile; consecutive threads take consecutive columns.
    template <class F>
    static __device__ __forceinline__ void for_each(const float* out, F f) {
        for (int i = threadIdx.x; i < ROWS * COLS; i += THREADS) {
            f(i / COLS, i % COLS, out[i / COLS * OUT_STRIDE + i % COLS]);
        }
    }
};

}  // namespace lmoe
