// SPDX-License-Identifier: Apache-2.0
// What a team of lanes does with one token in mix: it reduces partial sums, and computes v, du and dlogits.
#pragma once

#include "gates.cuh"

#include <type_traits>

namespace lmoe {

// How a launch divides its work, in addition to the parameters of the call.
template <class Params>
struct Mix : Params {
    int columns;    // of the product whose partial sums are reduced
    int64_t part;   // elements from one part of them to the next
    int lane_bits;  // a team has 2^lane_bits lanes
    int rank_bits;  // 2^rank_bits of them share the ranks of an expert
    int smem;       // bytes of a token in shared memory; 0 where its numbers are not kept
    int gates;      // bytes of them that E numbers take
};

// W elements in sequence as one number, which the compiler loads and stores in one instruction.
template <int W, class Element>
using Whole =
    std::conditional_t<W * sizeof(Element) == 16, uint4, std::conditional_t<W * sizeof(Element) == 8, uint64_t, Element>>;

template <int W, class Element>
__device__ __forceinline__ Whole<W, Element> load_whole(const Element* from) {
    return *reinterpret_cast<const Whole<W, Element>*>(from);
}
template <int W, class Element>
__device__ __forceinline__ void store_whole(Element* to, Whole<W, Element> whole) {
    *reinterpret_cast<Whole<W, Element>*>(to) = whole;
}

template <int W, class Element>
__device__ __forceinline__ void load_elements(float (&out)[W], const Element* from) {
    const auto whole = load_whole<W>(from);
    Element elements[W];
    memcpy(elements, &whole, sizeof whole);
#pragma unroll
    for (int i = 0; i < W; ++i) out[i] = to_float(elements[i]);
}

// Stores numbers rounded to the element's type. Two numbers of 16 bits are rounded in one instruction, if they are a pair.
template <int W, class Element>
__device__ __forceinline__ void store_elements(Element* to, const float (&numbers)[W]) {
    if constexpr (W * sizeof(Element) == 8) {
        uint32_t pairs[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const Pair<Element> pair = {from_float<Element>(numbers[2 * i]), from_float<Element>(numbers[2 * i + 1])};
            memcpy(&pairs[i], &pair, sizeof pair);
        }
        store_whole<W>(to, static_cast<uint64_t>(pairs[1]) << 32 | pairs[0]);
    } else {
        Element elements[W];
#pragma unroll
        for (int i = 0; i < W; ++i) elements[i] = from_float<Element>(numbers[i]);
        Whole<W, Element> whole;
        memcpy(&whole, elements, sizeof whole);
        store_whole<W>(to, whole);
    }
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

// The partial sums of W columns. TOGETHER of them are loaded before the first is added; the first TOGETHER are on their way
// as soon as this exists.
template <int W, int TOGETHER = 4>
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

// A team's token and a lane's share of it. KEPT says that the gates, u, and in the backward dv and the gates' gradients, are
// kept in shared memory. If they are too large, each use reads u again, reduces the partial sums of dv again, and computes a
// gate from its logit.
template <class S, int W, bool KEPT, class Params>
struct Token {
    static constexpr bool BACKWARD = std::is_same_v<Params, BackwardParams>;

    const Mix<Params>& p;
    const int lanes = 1 << p.lane_bits, lane = static_cast<int>(threadIdx.x) & (lanes - 1);  // of the team
    const int groups = lanes >> p.rank_bits, group = lane >> p.rank_bits, rank_lane = lane - (group << p.rank_bits);
    const uint32_t wanted = blockIdx.x * (blockDim.x >> p.lane_bits) + (threadIdx.x >> p.lane_bits);
    const bool inside = wanted < p.T;  // the other lanes of the last warp stay for the shuffles, without a token
    const uint32_t t = inside ? wanted : static_cast<uint32_t>(p.T - 1);
    const int E = static_cast<int>(p.E), R = static_cast<int>(p.R), experts = inside ? E : 0;
    const int u_columns = static_cast<int>(p.experts_of_a) * R, u_step = is_shared() ? 0 : R;
    float* const gates;   // (E)
    float* const dgates;  // (E), in the backward
    S* const kept_u;      // (u_columns)
    S* const kept_dv;     // (E R), in the backward
    Softmax softmax = {};

    // Bytes of shared memory of a token that is kept.
    static int64_t bytes(const ForwardParams& p) {
        const int64_t elements = (p.experts_of_a + (BACKWARD ? p.E : 0)) * p.R;
        return (BACKWARD ? 2 : 1) * up(p.E * 4) + up(elements * static_cast<int64_t>(sizeof(S)));
    }
    static int64_t up(int64_t bytes) { return (bytes + 15) / 16 * 16; }  // to whole vectors

    __device__ __forceinline__ Token(const Mix<Params>& p, unsigned char* smem)
        : p(p),
          gates(reinterpret_cast<float*>(smem + (threadIdx.x >> p.lane_bits) * p.smem)),
          dgates(gates + p.gates / 4),
          kept_u(reinterpret_cast<S*>(gates + (BACKWARD ? 2 : 1) * (p.gates / 4))),
          kept_dv(kept_u + u_columns) {}

    __device__ __forceinline__ bool is_shared() const { return static_cast<int>(p.experts_of_a) == 1; }
    __device__ __forceinline__ bool averages_factors() const { return p.mixing == Mixing::factors; }
    // The token's row of a matrix; with 32 bits of each factor the product takes one instruction.
    template <class Element>
    __device__ __forceinline__ Element* row(Element* first, int64_t stride) const {
        return first + static_cast<uint64_t>(t) * static_cast<uint32_t>(stride);
    }
    __device__ __forceinline__ const float* partial() const { return row(p.partial, p.columns); }
    __device__ __forceinline__ S* u() const { return row(static_cast<S*>(p.u), u_columns); }
    __device__ __forceinline__ S* v() const { return row(static_cast<S*>(p.v.data), p.v.stride); }
    __device__ __forceinline__ int64_t of_expert(int e) const { return static_cast<int64_t>(t) * E + e; }  // of (T, E)
    __device__ __forceinline__ float logit(int e) const { return load<S>(p.logits, of_expert(e)); }

    __device__ __forceinline__ float gate(int e) const {
        if constexpr (KEPT) return gates[e];
        return p.gates_given ? logit(e) : softmax.gate(logit(e), e);
    }
    __device__ __forceinline__ void load_u(float (&out)[W], int e, int r) const {
        load_elements(out, (KEPT ? kept_u : u()) + e * u_step + r);
    }
    __device__ __forceinline__ void load_dv(float (&out)[W], int e, int r) const {
        if constexpr (KEPT) return load_elements(out, kept_dv + e * R + r);
        PartialSums<W, 2>(partial() + e * R + r, p.part, p.shrink_parts).total(out);
#pragma unroll
        for (int i = 0; i < W; ++i) out[i] = to_float(from_float<S>(p.scaling * out[i]));  // rounded as if it were kept
    }

    // Computes the softmax, and keeps the gates, from logits that lie in the place of the kept gates. Given gates lie there.
    __device__ __forceinline__ void compute_gates() {
        if (!p.gates_given) {
            softmax = softmax_of(p, lane, lanes, [&](int e) { return KEPT ? gates[e] : logit(e); });
#pragma unroll 1
            for (int e = lane; KEPT && e < E; e += lanes) gates[e] = softmax.gate(gates[e], e);
        }
        __syncwarp();  // all lanes see the gates, u and dv
    }
    // The sums of all groups, in each of their lanes.
    template <int N>
    __device__ __forceinline__ void add_groups(float (&sum)[N]) const {
#pragma unroll 1
        for (int flip = lanes / 2; flip >> p.rank_bits > 0; flip >>= 1) {
#pragma unroll
            for (int i = 0; i < N; ++i) sum[i] += __shfl_xor_sync(~0u, sum[i], flip);
        }
    }
    // The columns of a row up to its stride, where expand reads whole vectors.
    __device__ __forceinline__ void store_zeros(const Rows& rows, int columns) const {
        const int end = inside ? static_cast<int>(rows.stride) : 0;
#pragma unroll 1
        for (int c = columns + lane; c < end; c += lanes) {
            row(static_cast<S*>(rows.data), rows.stride)[c] = from_float<S>(0.f);
        }
    }

    // v from u and the gates.
    __device__ __forceinline__ void mix() const {
#pragma unroll 1
        for (int first = 0; first < R; first += W << p.rank_bits) {
            const int r = first + rank_lane * W, end = r < R ? experts : 0;
            float h[W] = {};
#pragma unroll 1
            for (int e = group; averages_factors() && e < end; e += groups) {
                float numbers[W];
                load_u(numbers, e, r);
                add_product(h, gate(e), numbers);
            }
            if (averages_factors()) add_groups(h);
            S* to = v() + group * R + r;
#pragma unroll 1
            for (int e = group; e < end; e += groups, to += groups * R) {
                if (!averages_factors()) load_u(h, e, r);
                float product[W];
                set_product(product, gate(e), h);
                store_elements(to, product);
            }
        }
        store_zeros(p.v, E * R);
    }

    __device__ __forceinline__ S* du_dlogits() const { return row(static_cast<S*>(p.du_dlogits.data), p.du_dlogits.stride); }
    // Where the gradient of a gate lies: without a place in shared memory it replaces the partial sum of its expert's first
    // rank, which is read no more when the gradient of these ranks is known.
    __device__ __forceinline__ float& dgate(int e) const { return KEPT ? dgates[e] : row(p.partial, p.columns)[e * R]; }

    // v, du and the gradients of the gates, from u, dv and the gates.
    __device__ __forceinline__ void mix_bwd() const {
        const bool factors = averages_factors(), sums = factors || is_shared();
#pragma unroll 1
        for (int first = 0; first < R; first += W << p.rank_bits) {
            const int r = first + rank_lane * W, end = r < R ? experts : 0;
            float h[W] = {}, dh[W] = {}, gates_sum[1] = {};
#pragma unroll 1
            for (int e = group; sums && e < end; e += groups) {
                float u[W], dv[W];
                load_u(u, e, r), load_dv(dv, e, r);
                add_product(h, gate(e), u), add_product(dh, gate(e), dv);
                gates_sum[0] += gate(e);
            }
            if (sums) add_groups(h), add_groups(dh);
            S *to_v = v() + group * R + r, *to_du = du_dlogits() + group * R + r;
#pragma unroll 1
            for (int e = group, i = 0; i < E; e += groups, i += groups) {  // all lanes stay for the shuffles
                float own = 0.f;
                if (e < end) own = mix_bwd(e, r, h, dh, to_v, to_du);
                own = sum_of(own, 1 << p.rank_bits);
                if (rank_lane == 0 && e < experts) dgate(e) = first == 0 ? own : dgate(e) + own;
                to_v += groups * R, to_du += groups * R;
            }
            if (!is_shared()) continue;
            if (factors && !p.renormalize) {  // a shared A gathers from every expert: dh times each gate; their sum may be 1
                add_groups(gates_sum);
                set_product(dh, gates_sum[0], dh);
            }
            if (group == 0 && end > 0) store_elements(du_dlogits() + r, dh);
        }
        store_zeros(p.v, E * R);
    }
    // The same for W ranks of one expert; returns their share of the gate's gradient: through B(t) and, under "factors",
    // also through A(t). Otherwise h and dh are those of the expert alone.
    __device__ __forceinline__ float mix_bwd(int e, int r, float (&h)[W], float (&dh)[W], S* to_v, S* to_du) const {
        float u[W], dv[W], product[W];
        load_u(u, e, r), load_dv(dv, e, r);
        if (!averages_factors()) {
            set_product(h, 1.f, u);
            if (!is_shared()) set_product(dh, 1.f, dv);
        }
        set_product(product, gate(e), h);
        store_elements(to_v, product);
        set_product(product, gate(e), dh);
        if (!is_shared()) store_elements(to_du, product);
        return averages_factors() ? dot(dv, h) + dot(dh, u) : dot(dv, h);
    }

    // The backward of the softmax, to du_dlogits or to an outside router's gradient. A softmax over all experts gives
    // dropped experts a gradient too, although their gates are 0. Given gates have no softmax: their gradient is dgate.
    __device__ __forceinline__ void softmax_bwd() const {
        float mean = 0.f;
#pragma unroll 1
        for (int e = lane; e < experts; e += lanes) mean += gate(e) * dgate(e);
        mean = sum_of(mean, lanes);
#pragma unroll 1
        for (int e = lane; e < experts; e += lanes) {
            const float own = gate(e);
            float dlogit = own * (dgate(e) - mean);
            if (!p.renormalize && own == 0.f) dlogit = softmax.weight(logit(e)) * -mean;
            if (p.gates_given) dlogit = dgate(e);
            if (p.dlogits_in != nullptr) dlogit += p.dlogits_in[of_expert(e)];
            if (p.gate_weight.data != nullptr) du_dlogits()[u_columns + e] = from_float<S>(dlogit);
            if (p.dlogits != nullptr) store<S>(p.dlogits, of_expert(e), p.logits.fp32, dlogit);
        }
        store_zeros(p.du_dlogits, u_columns + (p.gate_weight.data != nullptr ? E : 0));
    }
};

}  // namespace lmoe
