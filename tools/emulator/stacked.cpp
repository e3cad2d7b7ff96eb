// Runs random additions of stacked mixtures through their launcher: blocks of any size and options, columns of y that they
// share or not, groups of tokens, and in some a mixture of numbers that are not finite. Results are compared with a plain
// computation in double precision, two schedules must give the same bits, and nothing else of y may change.
//
//     stacked FIRST_SEED PROBLEMS
#include <algorithm>

#include "buffers.h"

using namespace driver;

namespace {

struct Problem {
    int64_t T, I, N = 0, rows_of_a = 0, experts = 0, x_stride, y_stride, numbers_of_b = 0;
    Dtype dtype;
    std::vector<Mixture> mixtures;
    Buffer x, y, a, b, gate_weight, gate_bias, logits, scale;
    std::vector<int64_t> groups, groups_in_64_bits;  // the second holds what the kernel reads; both empty: no groups
    std::vector<int> groups_in_32_bits;

    explicit Problem(uint64_t seed) {
        generator.seed(seed);
        T = coin() ? draw(1, 4) : draw(1, 16), I = coin() ? draw(1, 12) * 8 : draw(1, 90);
        if (seed % 7 == 3) I = 256 + I * 8;  // several steps and several chunks in a row of x
        dtype = static_cast<Dtype>(draw(0, 2));
        const int64_t count = draw(1, 5);
        while (static_cast<int64_t>(mixtures.size()) < count) add_mixture();
        x_stride = coin() ? I : I + 8, y_stride = N + (coin() ? 0 : draw(1, 8));
        draw_tensors();
        if (seed % 3 != 0) draw_groups();
    }

    void add_mixture() {
        Mixture m = {};
        m.E = static_cast<int>(draw(1, 5)), m.R = coin() ? 8 : static_cast<int>(draw(1, 6));
        m.O = static_cast<int>(coin() ? draw(1, 6) * 8 : draw(1, 40));
        m.column = coin() ? 0 : static_cast<int>(coin() ? N : draw(0, N));
        m.experts_of_a = draw(0, 3) == 0 ? 1 : m.E;
        m.top_k = coin() ? m.E : static_cast<int>(draw(1, m.E));
        m.renormalize = coin() || m.top_k == m.E, m.mixing = coin() ? Mixing::factors : Mixing::outputs;
        m.scaling = 0.5f + static_cast<float>(draw(0, 2)), m.group = draw(0, 2) * (int64_t{1} << 20);
        m.a = static_cast<int>(rows_of_a), m.expert = static_cast<int>(experts), m.b = numbers_of_b;
        rows_of_a += m.experts_of_a * m.R, experts += m.E, numbers_of_b += int64_t{m.E} * m.R * m.O;
        N = std::max<int64_t>(N, m.column + m.O);
        mixtures.push_back(m);
    }

    void draw_tensors() {
        x = random_tensor((T - 1) * x_stride + I, dtype, 1);
        y = random_tensor((T - 1) * y_stride + N, dtype, 1);
        a = random_tensor(rows_of_a * I, dtype, 1 / std::sqrt(I));
        b = random_tensor(numbers_of_b, dtype, 0.5);
        if (draw(0, 3) == 0) {
            logits = random_tensor(T * experts, Dtype::fp32, 1);
        } else {
            gate_weight = random_tensor(experts * I, coin() ? dtype : Dtype::fp32, 1 / std::sqrt(I));
        }
        if (coin()) gate_bias = random_tensor(experts, Dtype::fp32, 1);
    }

    void draw_groups() {
        for (int64_t t = 0; t < T; ++t)
            groups.push_back(coin() ? mixtures[draw(0, mixtures.size() - 1)].group : draw(-1, 1));
        if (coin()) {
            groups_in_64_bits = groups;
        } else {
            groups_in_32_bits.assign(groups.begin(), groups.end());
        }
        if (coin()) scale = random_tensor(T, Dtype::fp32, 1);
        if (coin()) return;
        const Mixture& m = mixtures[draw(0, mixtures.size() - 1)];  // its tokens become NaN, and no others
        for (int64_t i = 0; i < int64_t{m.E} * m.R * m.O; ++i) b.set(m.b + i, NAN);
        for (int64_t i = 0; i < m.E * I && gate_weight.count > 0 && coin(); ++i) gate_weight.set(m.expert * I + i, INFINITY);
    }

    bool adds(const Mixture& m, int64_t t) const { return groups.empty() || groups[t] == m.group; }

    void fill(StackedParams& p) const {
        p.dtype = dtype, p.T = T, p.I = I, p.E = experts, p.rows_of_a = rows_of_a;
        p.x = {x.data(), x_stride}, p.lora_a = a.tensor(), p.lora_b = b.tensor();
        p.gate_weight = gate_weight.tensor(), p.gate_bias = gate_bias.tensor();
        p.logits = logits.tensor(), p.logits_stride = experts;
        p.token_scale = static_cast<const float*>(scale.data());
        p.group_has_64_bits = !groups_in_64_bits.empty();
        if (!groups.empty()) {
            p.token_group = p.group_has_64_bits ? static_cast<const void*>(groups_in_64_bits.data())
                                                : static_cast<const void*>(groups_in_32_bits.data());
        }
        p.mixture_count = static_cast<int>(mixtures.size());
        std::copy(mixtures.begin(), mixtures.end(), p.mixtures);
        p.chunks = int64_t{1} << T % 4, p.chunk = up(up(I, p.chunks) / p.chunks, 256);
    }

    // The columns of y cut where a mixture begins or ends, and a plan of which the tiles are drawn anew for each schedule.
    void plan(StackedParams& p) const {
        p.column_tile = draw(1, 4) * 8, p.blocks = static_cast<int>(draw(1, 3));
        std::vector<int> cuts;
        for (const Mixture& m : mixtures) cuts.push_back(m.column), cuts.push_back(m.column + m.O);
        std::sort(cuts.begin(), cuts.end());
        for (size_t i = 0; i + 1 < cuts.size(); ++i) {
            uint32_t bits = 0;
            for (size_t j = 0; j < mixtures.size(); ++j) {
                const Mixture& m = mixtures[j];
                if (m.column <= cuts[i] && cuts[i] < m.column + m.O) bits |= 1u << j;
            }
            if (cuts[i] == cuts[i + 1] || bits == 0) continue;
            p.columns[p.columns_count++] = {cuts[i], cuts[i + 1] - cuts[i], p.tiles, bits};
            p.tiles += static_cast<int>(up(cuts[i + 1] - cuts[i], p.column_tile) / p.column_tile);
        }
        const int64_t size = dtype == Dtype::fp32 ? 4 : 2, together = T == 1 ? 1 : T <= 4 ? 4 : 8;
        for (const Mixture& m : mixtures) {
            const int64_t bytes = (m.E * m.R + T) * p.column_tile * size + up(T * m.experts_of_a * m.R * size, 16) +
                                  up(T * m.E * m.R * size, 16) + 2 * up(T * m.E * 4, 16) + 32 * p.column_tile * together;
            p.smem = std::max(p.smem, bytes);
        }
    }
};

Buffer run(const Problem& q) {
    StackedParams p = {};
    q.fill(p), q.plan(p);
    const Buffer y = make(q.y.count, q.dtype), totals = make(q.T * (q.rows_of_a + q.experts), Dtype::fp32);
    memcpy(y.data(), q.y.data(), y.count * y.size());
    p.y = y.data(), p.y_stride = q.y_stride, p.partial = static_cast<float*>(totals.data());
    add_stacked(p, 0, nullptr);
    Buffer out = make(y.count, q.dtype);
    memcpy(out.data(), y.data(), y.count * y.size());
    return out;
}

// The gates of a mixture for one token.
std::vector<double> gates_of(const Problem& q, const Mixture& m, int64_t t) {
    std::vector<double> logit(m.E), gate(m.E);
    double sum = 0;
    for (int64_t e = 0; e < m.E; ++e) {
        const int64_t row = m.expert + e;
        if (q.logits.count > 0) logit[e] = q.logits.get(t * q.experts + row);
        for (int64_t i = 0; i < q.I && q.logits.count == 0; ++i)
            logit[e] += q.x.get(t * q.x_stride + i) * q.gate_weight.get(row * q.I + i);
        if (q.gate_bias.count > 0) logit[e] += q.gate_bias.get(row);
    }
    for (int64_t e = 0; e < m.E; ++e) {
        int64_t before = 0;
        for (int64_t f = 0; f < m.E; ++f) before += logit[f] > logit[e] || (logit[f] == logit[e] && f < e);
        gate[e] = before < m.top_k ? std::exp(logit[e]) : 0;
        sum += before < m.top_k || !m.renormalize ? std::exp(logit[e]) : 0;
    }
    for (double& one : gate) one /= sum;
    return gate;
}

// Adds one mixture to one token.
void add(const Problem& q, const Mixture& m, int64_t t, std::vector<double>& y) {
    const std::vector<double> gate = gates_of(q, m, t);
    std::vector<double> u(m.E * m.R), h(m.R);
    for (int64_t e = 0; e < m.E; ++e) {
        for (int64_t r = 0; r < m.R; ++r) {
            const int64_t row = m.a + (m.experts_of_a == 1 ? 0 : e) * m.R + r;
            for (int64_t i = 0; i < q.I; ++i) u[e * m.R + r] += q.a.get(row * q.I + i) * q.x.get(t * q.x_stride + i);
            h[r] += gate[e] * u[e * m.R + r];
        }
    }
    const double scale = m.scaling * (q.scale.count > 0 ? q.scale.get(t) : 1);
    for (int64_t er = 0; er < m.E * m.R; ++er) {
        const double v = gate[er / m.R] * (m.mixing == Mixing::factors ? h[er % m.R] : u[er]);
        for (int64_t o = 0; o < m.O; ++o) y[t * q.y_stride + m.column + o] += scale * v * q.b.get(m.b + er * m.O + o);
    }
}

bool call_is_right(uint64_t seed) {
    const Problem q(seed);
    emu::options.seed = 2 * seed;
    emu::options.early_copies = false;
    const Buffer first = run(q);
    emu::options.seed = 2 * seed + 1;
    emu::options.early_copies = true;
    const Buffer second = run(q);
    std::vector<double> truth(q.y.count);
    for (int64_t i = 0; i < q.y.count; ++i) truth[i] = q.y.get(i);
    for (int64_t t = 0; t < q.T; ++t)
        for (const Mixture& m : q.mixtures)
            if (q.adds(m, t)) add(q, m, t, truth);
    const double share = q.dtype == Dtype::fp32 ? 1e-4 : q.dtype == Dtype::fp16 ? 2e-2 : 1e-1;
    double largest = 1, worst = 0;
    for (double value : truth) largest = std::isfinite(value) ? std::max(largest, std::fabs(value)) : largest;
    for (int64_t i = 0; i < q.y.count; ++i) {
        const double ours = first.get(i);
        const bool is_padding = i % q.y_stride >= q.N, both = !std::isfinite(truth[i]) && !std::isfinite(ours);
        const double error = is_padding ? (ours == truth[i] ? 0 : INFINITY) : both ? 0 : std::fabs(ours - truth[i]);
        worst = std::max(worst, std::isnan(error) ? INFINITY : error);
    }
    if (worst > share * largest) printf("  y is off by %g, its largest value is %g\n", worst, largest);
    return (worst <= share * largest) & same("y", first, second);
}

}  // namespace

int main(int, char** arguments) { return run_problems(arguments, call_is_right); }
