// SPDX-License-Identifier: Apache-2.0
// What Python hands to the launchers: addresses, sizes and options of one call. No torch, no CUDA.
// Letters: T tokens, I in_features, O out_features, E experts, R rank.
#pragma once

#include <cstdint>

namespace lmoe {

enum class Dtype : int { fp32 = 0, bf16 = 1, fp16 = 2 };

// What the gates average: the factors A and B of the experts, or the experts' outputs.
enum class Mixing : int { factors, outputs };

// How a forward runs: stage by stage with workspaces in between, or all of a tile of tokens in one kernel.
enum class Path : int { stages, one_pass };

// A contiguous tensor of the call's dtype or of fp32. A null `data` means that it is not given.
struct Tensor {
    void* data;
    bool fp32;
};

// A matrix of the call's dtype with contiguous rows, `stride` elements apart. A null `data` means that it is not given.
struct Rows {
    void* data;
    int64_t stride;
};

struct ForwardParams {
    Dtype dtype;  // of x, dy, base, u and y
    int64_t T, I, O, E, R;
    int64_t experts_of_a;  // E, or 1 where all experts share one A
    float scaling;
    Mixing mixing;
    int64_t top_k;     // experts that each token keeps, 1 ... E
    bool renormalize;  // the softmax runs over the experts kept; otherwise over all, and the gates kept sum to less than one
    bool gates_given;  // `logits` holds the gates: there is no softmax, and their sum need not be one; renormalize is false

    Rows x;              // (T, I); null in a backward that computes neither dlora_a nor dgate_weight
    Tensor lora_a;       // (experts_of_a, R, I)
    Tensor lora_b;       // (E, R, O)
    Tensor gate_weight;  // (E, I); null where the logits come from an outside router
    Tensor gate_bias;    // (E), or null
    Rows base;           // (T, O), or (O) where its stride is 0, or null: what the delta is added to

    Tensor logits;  // (T, E): an outside router's, or given gates, are read; a gate's are written by forward, in fp32
    void* u;        // (T, experts_of_a, R); u and a gate's logits may be null in one pass and in decode: nothing is saved
    void* y;        // (T, O)

    Path path;
    int64_t smem;    // dynamic shared memory in bytes of the one-pass and decode kernels, to compare with their layout
    Rows v;          // (T, E * R), workspace, with zeros up to its stride; null in one pass and in decode
    float* partial;  // workspace for partial sums, used by one product after the other
    int64_t expand_groups;  // groups of tiles of features, for blocks of the same tokens
    int64_t shrink_parts;   // split-K factor of shrink; partial sums are reduced in a fixed order: results are deterministic
};

// Everything that the forward has, and the gradients. A null gradient is not computed.
struct BackwardParams : ForwardParams {
    Rows dy;                  // (T, O)
    const float* dlogits_in;  // (T, E), the gradient that arrives at the returned logits, or null

    Rows du_dlogits;  // workspace: experts_of_a * R columns of du, E of a gate's dlogits, zeros up to its stride; null where
                      // only dlora_b is computed
    int64_t x_splits, dy_splits;  // split-K factors of the weight gradients over x and over dy, which sum over the tokens

    void* dx;             // (T, I)
    Tensor dlora_a;       // shaped as lora_a; in fp32 if the parameter is, of which lora_a may be a rounded copy
    Tensor dlora_b;       // as lora_b, likewise
    Tensor dgate_weight;  // as gate_weight, likewise
    void* dlogits;        // (T, E), of an outside router, typed as its logits
};

// A matrix with contiguous rows in one or two buffers: the first `split` rows lie in `first`, the others in `second`.
struct Matrix {
    const void* first;
    const void* second;
    int64_t split;    // rows in `first`
    int64_t rows;     // in both
    int64_t columns;  // elements in a row
    int64_t stride;   // elements from row to row, in both
    bool first_fp32;  // fp32 elements, which are rounded to the kernel's dtype on load
    bool second_fp32;
    bool first_aligned;  // every row starts on a multiple of 16 bytes: 16-byte loads are allowed
    bool second_aligned;
};

struct ShrinkParams {
    Matrix tokens;   // (T, F)
    Matrix factors;  // (C, F)
    float* partial;  // (parts, T, C)
    int64_t parts;
    int64_t features_a_part;  // whole steps of the pipeline
};

// out = base + scaling * a product
struct Output {
    void* out;         // (T, F)
    const void* base;  // (T, F), (F) where base_stride is 0, or null
    int64_t base_stride;
    int64_t T, F;
    bool aligned;  // rows of out and base start on multiples of 16 bytes
    float scaling;
};

struct ExpandParams {
    Matrix coefficients;  // (T, C)
    Matrix factors;       // (C, F)
    Output output;
    int64_t groups;  // in which the tiles of features are divided among blocks
};

struct WgradParams {
    Matrix coefficients;  // (T, C), and columns without a meaning up to whole vectors
    Matrix tokens;        // (T, F)
    int64_t count;        // C
    void* first;          // (split, F): the gradient of the first `split` coefficients
    void* second;         // (C - split, F): that of the others
    int64_t split;
    bool first_fp32, second_fp32;
    float* partial;          // (splits, C, F), or null where splits is 1
    int64_t tokens_a_split;  // whole steps of the pipeline
    int64_t splits;
    float scaling;
};

// A forward of few tokens; `partial` is (T, C) for the totals of shrink, with C = experts_of_a * R and another E for a gate.
struct DecodeParams : ForwardParams {
    int64_t chunk;        // features of x that a warp sums over, a multiple of 256
    int64_t chunks;       // warps that share the features of a row: 1, 2, 4 or 8
    int64_t column_tile;  // columns of y that a block computes at a time, a multiple of 8
    int blocks;           // resident blocks: all of them run at the same time
};

// One of the mixtures that a stacked call adds: where it is in the stacked tensors, its columns of y, its sizes and options.
struct Mixture {
    int64_t group;  // of the tokens that get its delta
    int64_t b;      // its first element of lora_b
    int a, expert;  // its first row of lora_a, and of the gates
    int column, O;  // the first of its columns of y, and how many they are
    int E, R, experts_of_a;
    int top_k;
    float scaling;
    Mixing mixing;
    bool renormalize;
};

// Neighbouring columns of y that get the deltas of the same mixtures.
struct Columns {
    int first, count;
    int first_tile;     // of column_tile columns; the last tile may have fewer
    uint32_t mixtures;  // a bit for each
};

constexpr int MIXTURES = 32;  // of one launch, at most

// Several mixtures that read the same x are added to y in place. Their tensors are stacked: lora_a (rows_of_a, I), lora_b
// (sum of E R O), gate_weight (E, I), gate_bias (E), logits (T, E) of an outside router, with E of all mixtures. `partial`
// is (T, rows_of_a + E), without the E if there is no gate. O, R, experts_of_a and the options are those of no mixture here.
struct StackedParams : DecodeParams {
    int64_t rows_of_a, y_stride, logits_stride;
    const void* token_group;  // (T) int32 or int64, or null: all tokens get all deltas
    bool group_has_64_bits;
    const float* token_scale;  // (T), factors of the tokens' deltas, or null
    int tiles;                 // of y
    int mixture_count, columns_count;
    Mixture mixtures[MIXTURES];
    Columns columns[2 * MIXTURES - 1];
};
static_assert(sizeof(StackedParams) <= 4096, "the parameters of a kernel");

// Rows of which each element is multiplied by `factor`, or is zero where its hash is below `threshold`.
struct DropoutParams {
    Dtype dtype;
    int64_t T, F;
    Rows rows;            // (T, F)
    const int64_t* seed;  // of the hashes
    void* out;            // (T, F)
    float factor;         // 1 / (1 - probability)
    uint32_t threshold;   // probability * 2^32
};

}  // namespace lmoe
