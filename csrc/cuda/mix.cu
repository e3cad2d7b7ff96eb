// SPDX-License-Identifier: Apache-2.0
// Mix, forward and backward: reduces the partial sums of shrink, then everything that is done token by token.
//
//     gates = softmax(logits);   h[t,r] = sum_e gates[t,e] u[t,e,r];   v[t,e,r] = gates[t,e] h[t,r]
//
//     factors: dh = sum_e gates dv;  dgates = <dv, h> + <dh, u>;  du = gates dh
//     outputs: dgates = <dv, u>;  du = gates dv
//     dlogits = softmax * (dgates - sum_e gates dgates) + dlogits_in          dgates of dropped experts: 0
//
// A warp computes one token, so that no thread waits for another warp. Its lanes first reduce the partial sums column by
// column. Then some lanes in sequence share the ranks of an expert, W of them each, and groups of such lanes share the
// experts.
#include "gates.cuh"

#include <type_traits>

#include "launch.cuh"

namespace lmoe {

constexpr int MIX_WARPS = 8;        // of a block, at most; fewer where tokens need much shared memory
constexpr int MIX_SMEM = 48 << 10;  // bytes of a block: what CUDA allows without an attribute
constexpr int MIX_RESIDENT = 4;     // blocks that share a processor: enough loads in flight to hide their latency
constexpr int TOGETHER = 4;         // partial sums of a column that a lane loads before it adds the first

// How a launch divides its work, in addition to the parameters of the call.
template <class Params>
struct Mix : Params {
    int columns;     // of the product whose partial sums are reduced
    int rank_lanes;  // lanes that share the ranks of an expert, a power of two
    int smem;        // bytes of a warp; 0 where a token's numbers are not kept
};

// W elements in sequence. Those of 16 bits and of 32 bits are loaded and stored in one instruction.
template <int W, class Element>
using Whole =
    std::conditional_t<W * sizeof(Element) == 16, uint4, std::conditional_t<W * sizeof(Element) == 8, uint2, Element>>;

template <int W, class Element>
__device__ __forceinline__ void load_elements(float (&out)[W], const Element* from) {
    const auto whole = *reinterpret_cast<const Whole<W, Element>*>(from);
    Element elements[W];
    memcpy(elements, &whole, sizeof whole);
#pragma unroll
    for (int i = 0; i < W; ++i) out[i] = to_float(elements[i]);
}

// Stores numbers rounded to the element's type.
template <int W, class Element>
__device__ __forceinline__ void store_elements(Element* to, const float (&numbers)[W]) {
    Element elements[W];
#pragma unroll
    for (int i = 0; i < W; ++i) elements[i] = from_float<Element>(numbers[i]);
    Whole<W, Element> whole;
    memcpy(&whole, elements, sizeof whole);
    *reinterpret_cast<Whole<W, Element>*>(to) = whole;
}

template <int W>
__device__ __forceinline__ void add_product(float (&sum)[W], float factor, const float (&numbers)[W]) {
#pragma unroll
    for (int i = 0; i < W; ++i) sum[i] += factor * numbers[i];
}
template <int W>
__device__ __forceinline__ void set_product(float (&product)[W], float factor, const float (&numbers)[W]) {
#pragma unroll
    for (int i = 0; i < W; ++i) product[i] = factor * numbers[i];
}
template <int W>
__device__ __forceinline__ float dot(const float (&left)[W], const float (&right)[W]) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < W; ++i) sum += left[i] * right[i];
    return sum;
}

// The partial sums of W columns. The first of them are on their way as soon as this exists.
template <int W>
class PartialSums {
    const float* from_;
    int64_t step_;  // from part to part
    int parts_;
    float numbers_[TOGETHER][W];

    __device__ __forceinline__ void load() {
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i) {
            if (i < parts_) load_elements(numbers_[i], from_ + i * step_);
        }
    }

public:
    __device__ __forceinline__ PartialSums(const float* from, int64_t step, int64_t parts)
        : from_(from), step_(step), parts_(static_cast<int>(parts)) {
        load();
    }
    // Adds them in their order.
    __device__ __forceinline__ void total(float (&sum)[W]) {
#pragma unroll
        for (int i = 0; i < W; ++i) sum[i] = 0.f;
        while (true) {
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i) {
                if (i < parts_) add_product(sum, 1.f, numbers_[i]);
            }
            parts_ -= TOGETHER;
            if (parts_ <= 0) return;
            from_ += TOGETHER * step_;
            load();
        }
    }
};

// A warp's token and its lane's share. KEPT says that u, in the backward dv, and the gates are kept in shared memory. Those
// of huge E R are not: then each use reads u again, reduces the partial sums of dv again, and computes a gate from its
// logit.
template <class S, int W, bool KEPT, class Params>
struct Token {
    const Mix<Params>& p;
    const int64_t t = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
    const int lane = static_cast<int>(threadIdx.x % 32), group = lane / p.rank_lanes, groups = 32 / p.rank_lanes;
    const int rank_lane = lane % p.rank_lanes;
    const int E = static_cast<int>(p.E), R = static_cast<int>(p.R), u_columns = static_cast<int>(p.experts_of_a) * R;
    float* const gates;   // (E)
    float* const dgates;  // (E), in the backward
    S* const kept_u;      // (u_columns)
    S* const kept_dv;     // (E R), in the backward
    Softmax softmax = {};

    static constexpr bool BACKWARD = std::is_same_v<Params, BackwardParams>;

    // Bytes of shared memory of a token that is kept.
    static int64_t bytes(const ForwardParams& p) {
        const int64_t vectors = BACKWARD ? p.experts_of_a * p.R + p.E * p.R : p.experts_of_a * p.R;
        return ((BACKWARD ? 2 : 1) * padded(p.E) * 4 + vectors * static_cast<int64_t>(sizeof(S)) + 15) / 16 * 16;
    }
    static __host__ __device__ int64_t padded(int64_t count) { return (count + 3) / 4 * 4; }

    __device__ __forceinline__ Token(const Mix<Params>& p, unsigned char* smem)
        : p(p),
          gates(reinterpret_cast<float*>(smem + threadIdx.x / 32 * p.smem)),
          dgates(gates + padded(p.E)),
          kept_u(reinterpret_cast<S*>(BACKWARD ? dgates + padded(p.E) : dgates)),
          kept_dv(kept_u + u_columns) {}

    __device__ __forceinline__ bool is_shared() const { return p.experts_of_a == 1; }
    __device__ __forceinline__ bool averages_factors() const { return p.mixing == Mixing::factors; }
    __device__ __forceinline__ const float* partial() const { return p.partial + t * p.columns; }
    __device__ __forceinline__ int64_t part() const { return p.T * p.columns; }
    __device__ __forceinline__ S* u() const { return static_cast<S*>(p.u) + t * u_columns; }
    __device__ __forceinline__ S* v() const { return static_cast<S*>(p.v.data) + t * p.v.stride; }
    __device__ __forceinline__ float logit(int e) const { return load<S>(p.logits, t * E + e); }

    __device__ __forceinline__ float gate(int e) const {
        if constexpr (KEPT) return gates[e];
        return softmax.gate(logit(e), e);
    }
    __device__ __forceinline__ void load_u(float (&out)[W], int e, int r) const {
        load_elements(out, (KEPT ? kept_u : u()) + (is_shared() ? r : e * R + r));
    }
    // dv from its partial sums, rounded as if it were saved.
    __device__ __forceinline__ void round_dv(float (&dv)[W]) const {
#pragma unroll
        for (int i = 0; i < W; ++i) dv[i] = to_float(from_float<S>(p.scaling * dv[i]));
    }
    __device__ __forceinline__ void load_dv(float (&out)[W], int e, int r) const {
        if constexpr (KEPT) return load_elements(out, kept_dv + e * R + r);
        PartialSums<W>(partial() + e * R + r, part(), p.shrink_parts).total(out);
        round_dv(out);
    }

    // Computes the softmax, and keeps the gates, from logits that lie in the place of the kept gates. It ends with a barrier
    // of the warp.
    __device__ __forceinline__ void compute_gates() {
        softmax = softmax_of(p, lane, 32, [&](int e) { return KEPT ? gates[e] : logit(e); });
        for (int e = lane; KEPT && e < E; e += 32) gates[e] = softmax.gate(gates[e], e);
        __syncwarp();  // all lanes see the gates, and u and dv
    }
    // The sums of all groups, in each of their lanes.
    template <int N>
    __device__ __forceinline__ void add_groups(float (&sum)[N]) const {
        for (int flip = 16; flip >= p.rank_lanes; flip /= 2) {
#pragma unroll
            for (int i = 0; i < N; ++i) sum[i] += __shfl_xor_sync(~0u, sum[i], flip);
        }
    }
    // The columns of a row up to its stride, where expand reads whole vectors.
    __device__ __forceinline__ void store_zeros(const Rows& rows, int columns) const {
        S* row = static_cast<S*>(rows.data) + t * rows.stride;
        for (int c = columns + lane; c < static_cast<int>(rows.stride); c += 32) row[c] = from_float<S>(0.f);
    }

    // v from u and the gates.
    __device__ __forceinline__ void mix() const {
        for (int first = 0; first < R; first += p.rank_lanes * W) {
            const int r = first + rank_lane * W, end = r < R ? E : 0;
            float h[W] = {};
            for (int e = group; averages_factors() && e < end; e += groups) {
                float numbers[W];
                load_u(numbers, e, r);
                add_product(h, gate(e), numbers);
            }
            if (averages_factors()) add_groups(h);
            for (int e = group; e < end; e += groups) {
                if (!averages_factors()) load_u(h, e, r);
                float product[W];
                set_product(product, gate(e), h);
                store_elements(v() + e * R + r, product);
            }
        }
        store_zeros(p.v, E * R);
    }

    __device__ __forceinline__ S* du_dlogits() const { return static_cast<S*>(p.du_dlogits.data) + t * p.du_dlogits.stride; }
    // Where the gradient of a gate lies: without a place in shared memory it replaces the partial sum of its expert's first
    // rank, which is read no more when the gradient of these ranks is known.
    __device__ __forceinline__ float& dgate(int e) const {
        return KEPT ? dgates[e] : p.partial[t * p.columns + static_cast<int64_t>(e) * R];
    }

    // v, du and the gradients of the gates, from u, dv and the gates.
    __device__ __forceinline__ void mix_bwd() const {
        const bool factors = averages_factors(), sums = factors || is_shared();
        for (int first = 0; first < R; first += p.rank_lanes * W) {
            const int r = first + rank_lane * W, end = r < R ? E : 0;
            float h[W] = {}, dh[W] = {}, gates_sum[1] = {};
            for (int e = group; sums && e < end; e += groups) {
                float u[W], dv[W];
                load_u(u, e, r), load_dv(dv, e, r);
                add_product(h, gate(e), u), add_product(dh, gate(e), dv);
                gates_sum[0] += gate(e);
            }
            if (sums) add_groups(h), add_groups(dh);
            for (int e = group; e - group < E; e += groups) {  // all lanes stay for the shuffles
                float own = 0.f;
                if (e < end) own = mix_bwd(e, r, h, dh);
                own = sum_of(own, p.rank_lanes);
                if (rank_lane == 0 && e < E) dgate(e) = first == 0 ? own : dgate(e) + own;
            }
            if (!is_shared()) continue;
            if (factors && !p.renormalize) {  // a shared A gathers from every expert: dh times each gate; their sum may be 1
                add_groups(gates_sum);
                set_product(dh, gates_sum[0], dh);
            }
            if (group == 0 && r < R) store_elements(du_dlogits() + r, dh);
        }
        store_zeros(p.v, E * R);
    }
    // The same for W ranks of one expert; returns their share of the gate's gradient: through B(t) and, under "factors",
    // also through A(t).
    __device__ __forceinline__ float mix_bwd(int e, int r, const float (&h)[W], const float (&dh)[W]) const {
        float u[W], dv[W], v_[W], du[W], share;
        load_u(u, e, r), load_dv(dv, e, r);
        if (averages_factors()) {
            set_product(v_, gate(e), h), set_product(du, gate(e), dh);
            share = dot(dv, h) + dot(dh, u);
        } else {
            set_product(v_, gate(e), u), set_product(du, gate(e), dv);
            share = dot(dv, u);
        }
        store_elements(v() + e * R + r, v_);
        if (!is_shared()) store_elements(du_dlogits() + e * R + r, du);
        return share;
    }

    // The backward of the softmax, to du_dlogits or to an outside router's gradient. A softmax over all experts gives
    // dropped experts a gradient too, although their gates are 0.
    __device__ __forceinline__ void softmax_bwd() const {
        float mean = 0.f;
        for (int e = lane; e < E; e += 32) mean += gate(e) * dgate(e);
        mean = sum_of(mean, 32);
        for (int e = lane; e < E; e += 32) {
            const float own = gate(e);
            float dlogit = own * (dgate(e) - mean);
            if (!p.renormalize && own == 0.f) dlogit = softmax.weight(logit(e)) * -mean;
            if (p.dlogits_in != nullptr) dlogit += p.dlogits_in[t * E + e];
            if (p.gate_weight.data != nullptr) du_dlogits()[u_columns + e] = from_float<S>(dlogit);
            if (p.dlogits != nullptr) store<S>(p.dlogits, t * E + e, p.logits.fp32, dlogit);
        }
        store_zeros(p.du_dlogits, u_columns + (p.gate_weight.data != nullptr ? E : 0));
    }
};

// A warp reduces the partial sums of a token to u and the logits, then computes v.
template <class S, int W, bool KEPT>
__global__ void __launch_bounds__(MIX_WARPS * 32, MIX_RESIDENT) mix_fwd_kernel(Mix<ForwardParams> p) {
    DYNAMIC_SMEM(smem);
    Token<S, W, KEPT, ForwardParams> token(p, smem);
    if (token.t >= p.T) return;
    const bool has_gate = p.gate_weight.data != nullptr;
    const int lane = token.lane, E = token.E;
    const float* logits = token.partial() + token.u_columns;
    float logit = !has_gate && lane < E ? token.logit(lane) : 0.f;  // before u, to be on its way at the same time
    PartialSums<1> of_logit(logits + lane, token.part(), has_gate && lane < E ? p.shrink_parts : 0);
    for (int c = lane * W; c < token.u_columns; c += 32 * W) {
        float sum[W];
        PartialSums<W>(token.partial() + c, token.part(), p.shrink_parts).total(sum);
        store_elements(token.u() + c, sum);
        if (KEPT) store_elements(token.kept_u + c, sum);
    }
    for (int e = lane; e < E; e += 32) {
        if (has_gate) {
            float sum[1];
            if (e >= 32) of_logit = PartialSums<1>(logits + e, token.part(), p.shrink_parts);
            of_logit.total(sum);
            logit = logit_of<S>(p, e, sum[0]);
            static_cast<float*>(p.logits.data)[token.t * E + e] = logit;
        } else if (e >= 32) {
            logit = token.logit(e);
        }
        if (KEPT) token.gates[e] = logit;
    }
    token.compute_gates();
    token.mix();
}

// A warp reduces the partial sums of a token to dv, then computes everything up to du and dlogits; without a place for these
// only v, which dlora_b needs.
template <class S, int W, bool KEPT>
__global__ void __launch_bounds__(MIX_WARPS * 32, MIX_RESIDENT) mix_bwd_kernel(Mix<BackwardParams> p) {
    DYNAMIC_SMEM(smem);
    Token<S, W, KEPT, BackwardParams> token(p, smem);
    if (token.t >= p.T) return;
    const bool wants_du = p.du_dlogits.data != nullptr;
    const int lane = token.lane, dv_columns = wants_du ? token.E * token.R : 0;
    const int columns = dv_columns > token.u_columns ? dv_columns : token.u_columns;
    if (KEPT) {
        const float logit = lane < token.E ? token.logit(lane) : 0.f;  // before dv, to be on its way at the same time
        for (int c = lane * W; c < columns; c += 32 * W) {
            float u[W], dv[W];
            PartialSums<W> of_dv(token.partial() + c, token.part(), c < dv_columns ? p.shrink_parts : 0);
            if (c < token.u_columns) {
                load_elements(u, token.u() + c);
                store_elements(token.kept_u + c, u);
            }
            if (c >= dv_columns) continue;
            of_dv.total(dv);
            token.round_dv(dv);
            store_elements(token.kept_dv + c, dv);
        }
        for (int e = lane; e < token.E; e += 32) token.gates[e] = e < 32 ? logit : token.logit(e);
    }
    token.compute_gates();
    if (!wants_du) return token.mix();
    token.mix_bwd();
    __syncwarp();  // all lanes see the gradients of the gates
    token.softmax_bwd();
}

// Whether a lane may load and store four elements together, wherever it does.
bool may_use_vectors(const ForwardParams& p, int64_t columns, const void* du_dlogits) {
    auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
    const bool all = aligned(p.partial) && aligned(p.u) && aligned(p.v.data) && aligned(du_dlogits);
    return all && p.R % 4 == 0 && columns % 4 == 0 && p.v.stride % 4 == 0;
}

// launch(m, W, KEPT, warps) with the parameters of a launch of blocks of so many warps; W and KEPT have the template
// arguments as their types.
template <class S, class Params, class Launch>
void divide_mix(const Params& params, int64_t columns, bool vectors, Launch launch) {
    auto with_width = [&](auto width) {
        constexpr int W = decltype(width)::value;
        Mix<Params> p = {params, static_cast<int>(columns), 1, 0};
        while (p.rank_lanes < 32 && p.rank_lanes * W < p.R) p.rank_lanes *= 2;
        const int64_t bytes = Token<S, W, true, Params>::bytes(params);
        int warps = MIX_WARPS;
        if (2 * bytes > MIX_SMEM) return launch(p, width, std::false_type{}, warps);
        while (warps * bytes > MIX_SMEM) warps /= 2;
        p.smem = static_cast<int>(bytes);
        launch(p, width, std::true_type{}, warps);
    };
    if (vectors) return with_width(std::integral_constant<int, 4>{});
    with_width(std::integral_constant<int, 1>{});
}

void mix_fwd(const ForwardParams& params, cudaStream_t stream) {
    const int64_t columns = params.experts_of_a * params.R + (params.gate_weight.data != nullptr ? params.E : 0);
    with_dtype(params.dtype, [&](auto scalar) {
        using S = decltype(scalar);
        const bool vectors = may_use_vectors(params, columns, nullptr);
        divide_mix<S>(params, columns, vectors, [&](const auto& p, auto width, auto kept, int warps) {
            constexpr int W = decltype(width)::value;
            LAUNCH((mix_fwd_kernel<S, W, decltype(kept)::value>), dim3(tiles(p.T, warps)), dim3(warps * 32), warps * p.smem,
                   stream, p);
        });
    });
    check_launch("mix_fwd_kernel");
}

void mix_bwd(const BackwardParams& params, cudaStream_t stream) {
    const int64_t columns = params.E * params.R;
    with_dtype(params.dtype, [&](auto scalar) {
        using S = decltype(scalar);
        const bool vectors = may_use_vectors(params, columns, params.du_dlogits.data) && params.du_dlogits.stride % 4 == 0;
        divide_mix<S>(params, columns, vectors, [&](const auto& p, auto width, auto kept, int warps) {
            constexpr int W = decltype(width)::value;
            LAUNCH((mix_bwd_kernel<S, W, decltype(kept)::value>), dim3(tiles(p.T, warps)), dim3(warps * 32), warps * p.smem,
                   stream, p);
        });
    });
    check_launch("mix_bwd_kernel");
}

}  // namespace lmoe
