// Runs random dropouts through their launcher: rows of any length, at any address, seeds of which both halves count. Results
// are compared with the formula of lmoe_kernels/reference.py, and must be equal. The threshold is the hash of some element,
// which is just kept.
//
//     dropout FIRST_SEED PROBLEMS
#include <algorithm>

#include "buffers.h"

using namespace driver;

namespace {

uint64_t times(uint64_t h, uint64_t factor) { return h * factor & 0xffffffff; }

uint64_t mixed(uint64_t h) {
    h = times(h ^ h >> 17, 0xed5ad4bb);
    h = times(h ^ h >> 11, 0xac4c1b51);
    h = times(h ^ h >> 15, 0x31848bab);
    return h ^ h >> 14;
}

uint64_t hash_of(uint64_t seed, uint64_t t, uint64_t f) {
    const uint64_t low = seed & 0xffffffff, high = seed >> 32;
    uint64_t h = f ^ mixed(mixed(low) ^ t);
    h = times(h ^ h >> 17, 0xed5ad4bb);
    h = times(h ^ h >> 11 ^ mixed((mixed(high ^ 0x9e3779b9) + t) & 0xffffffff), 0xac4c1b51);
    h = times(h ^ h >> 15, 0x31848bab);
    return h ^ h >> 14;
}

// The rows lie `offset` elements behind a multiple of 16 bytes, `stride` apart; the last one ends with the buffer.
struct Problem {
    int64_t T, F, offset, stride;
    Dtype dtype;
    Buffer rows;
    std::unique_ptr<int64_t> seed;

    explicit Problem(uint64_t number) {
        generator.seed(number);
        dtype = static_cast<Dtype>(number % 3);
        T = draw(1, 18);
        F = std::max<int64_t>(1, draw(0, 2) * 512 + draw(-9, 9) * 8 + (coin() ? 0 : draw(-3, 3)));
        offset = coin() ? 0 : draw(1, 8);
        stride = coin() ? F : up(F, 8) + (coin() ? 0 : draw(1, 8));
        rows = random_tensor(offset + (T - 1) * stride + F, dtype, 1);
        if (coin()) rows.set(offset + draw(0, F - 1), INFINITY);  // zero, not NaN, where it is dropped
        seed = std::make_unique<int64_t>(static_cast<int64_t>(generator()));
    }
};

bool dropout_is_right(uint64_t number) {
    const Problem q(number);
    emu::options.seed = number;
    const Buffer out = make(q.T * q.F, q.dtype);
    const uint64_t seed = static_cast<uint64_t>(*q.seed);
    const uint64_t threshold = std::max<uint64_t>(1, hash_of(seed, draw(0, q.T - 1), draw(0, q.F - 1)));
    const float factor = static_cast<float>(1 / (1 - static_cast<double>(threshold) / 4294967296.0));
    const Rows rows = {q.rows.at(q.offset), q.stride};
    const auto below = static_cast<uint32_t>(threshold);
    dropout({q.dtype, q.T, q.F, rows, q.seed.get(), out.data(), factor, below}, 0, nullptr);
    int64_t wrong = 0;
    Buffer right = make(1, q.dtype);
    for (int64_t t = 0; t < q.T; ++t) {
        for (int64_t f = 0; f < q.F; ++f) {
            const float row = static_cast<float>(q.rows.get(q.offset + t * q.stride + f));
            right.set(0, hash_of(seed, t, f) >= threshold ? row * factor : 0.f);
            wrong += memcmp(out.at(t * q.F + f), right.data(), out.size()) != 0;
        }
    }
    if (wrong > 0) printf("  %ld of %ld numbers are wrong\n", static_cast<long>(wrong), static_cast<long>(q.T * q.F));
    return wrong == 0;
}

}  // namespace

int main(int, char** arguments) { return run_problems(arguments, dropout_is_right); }
