// Runs random single products through the launchers of the stages: sizes and splits at the edges of tiles and steps,
// operands at any address, in one or two buffers. All numbers are so coarse that fp32 holds every sum exactly, so results
// must be equal.
//
//     products FIRST_SEED PROBLEMS
#include <algorithm>
#include <initializer_list>
#include <utility>

#include "buffers.h"
#include "cuda/launch.cuh"
#include "cuda/matrix.cuh"

using namespace driver;

namespace {

// Whether the tensors of a product may start anywhere, have rows of any length, and differ in dtype. In other products all
// copies are those of 16 bytes.
bool anywhere;

// One of some numbers, or one that is 1 or 8 above or below it; at least 1.
int64_t near(std::initializer_list<int64_t> edges) {
    const int64_t edge = edges.begin()[draw(0, static_cast<int64_t>(edges.size()) - 1)];
    return std::max<int64_t>(1, edge + draw(-1, 1) * (coin() ? 1 : 8));
}
// Of a product: rows, columns, and elements of a sum whose steps have `step`.
int64_t some_rows() { return near({1, 8, 64, 112, 128, 128, 144, 256}); }
int64_t some_columns() { return near({1, 8, 64, 64, 128, 128, 136, 144, 144, 152, 256, 272, 288}); }
int64_t whole(int64_t count) { return anywhere ? count : up(count, 8); }
int64_t some_terms(int64_t step) { return whole(near({1, step / 2, step, step, 2 * step, 3 * step, 5 * step})); }

// Random numbers in rows of a buffer: the first one lies `offset` elements behind a multiple of 16 bytes, the last one at
// the buffer's end. All between the rows and before the first is NaN.
struct Table {
    int64_t rows, columns, stride, offset;
    Buffer buffer;

    Table(int64_t rows, int64_t columns, int64_t stride, Dtype dtype)
        : rows(rows),
          columns(columns),
          stride(stride),
          offset(anywhere && draw(0, 2) == 0 ? draw(1, 7) : 0),
          buffer(make(offset + (rows - 1) * stride + columns, dtype)) {
        for (int64_t i = 0; i < rows * columns; ++i)
            buffer.set(at(i / columns, i % columns), static_cast<float>(draw(-64, 64)) / 32);
    }
    Table(int64_t rows, int64_t columns, Dtype dtype) : Table(rows, columns, columns, dtype) {}

    int64_t at(int64_t row, int64_t column) const { return offset + row * stride + column; }
    Tensor tensor() const { return {buffer.at(offset), buffer.dtype == Dtype::fp32}; }
    // The numbers, row after row without gaps.
    std::vector<double> numbers() const {
        std::vector<double> result(rows * columns);
        for (int64_t i = 0; i < rows * columns; ++i) result[i] = buffer.get(at(i / columns, i % columns));
        return result;
    }
    // Forgets all numbers.
    void clear() { memset(buffer.data(), 0xff, buffer.count * buffer.size()); }
};

// Rows of partial sums. As every workspace they begin on a multiple of 16 bytes.
Table workspace(int64_t rows, int64_t columns) {
    const bool others = std::exchange(anywhere, false);
    Table table(rows, columns, Dtype::fp32);
    anywhere = others;
    return table;
}

// Random numbers in one or two buffers, each of fp32 or the product's dtype.
struct Stack {
    int64_t split;
    Table first, second;  // without a second buffer `second` is not used

    Stack(int64_t rows, int64_t columns, Dtype dtype)
        : split(rows == 1 || draw(0, 3) == 0 ? rows : split_of(rows)),
          first(split, columns, mostly(dtype)),
          second(std::max<int64_t>(rows - split, 1), columns, mostly(dtype)) {}

    template <class S>
    Matrix matrix(int64_t rows) const {
        return stacked<S>(first.tensor(), split, rows == split ? Tensor{} : second.tensor(), rows - split, first.columns);
    }
    std::vector<double> numbers() const {
        std::vector<double> all = first.numbers(), others = second.numbers();
        all.insert(all.end(), others.begin(), others.end());
        return all;
    }

private:
    static Dtype mostly(Dtype dtype) { return anywhere && draw(0, 3) == 0 ? Dtype::fp32 : dtype; }
    static int64_t split_of(int64_t rows) {
        return std::clamp<int64_t>(up(draw(1, rows), coin() ? 64 : 16) + draw(-1, 1), 1, rows - 1);
    }
};

// numbers[i, j] = sum over k of left(i, k) right(j, k)
template <class Left, class Right>
std::vector<double> product(int64_t rows, int64_t columns, int64_t terms, Left left, Right right) {
    std::vector<double> result(rows * columns);
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j)
            for (int64_t k = 0; k < terms; ++k) result[i * columns + j] += left(i, k) * right(j, k);
    return result;
}

// Whether an output has the true numbers in its own dtype, and nothing is written around them.
bool is_right(const char* name, const Table& output, const std::vector<double>& truth, size_t first = 0) {
    const std::vector<double> ours = output.numbers();
    int64_t wrong = 0, outside = 0;
    Buffer rounded = make(1, output.buffer.dtype);
    for (size_t i = 0; i < ours.size(); ++i) {
        rounded.set(0, static_cast<float>(truth[first + i]));
        wrong += ours[i] != rounded.get(0);
    }
    for (int64_t i = 0; i < output.offset; ++i) outside += !std::isnan(output.buffer.get(i));
    if (wrong > 0) printf("  %s: %ld of %zu numbers are wrong\n", name, static_cast<long>(wrong), ours.size());
    if (outside > 0) printf("  %s writes before its first number\n", name);
    return wrong + outside == 0;
}

// launch() on two schedules, each time into empty outputs; both must give the same bits.
template <class Launch>
bool is_same_twice(uint64_t seed, const char* name, const std::vector<Table*>& outputs, Launch launch) {
    std::vector<Buffer> before(outputs.size());
    bool good = true;
    for (int run = 0; run < 2; ++run) {
        emu::options.seed = 2 * seed + run;
        emu::options.early_copies = run == 1;
        for (Table* output : outputs) output->clear();
        launch();
        for (size_t i = 0; i < outputs.size(); ++i) {
            Buffer& now = outputs[i]->buffer;
            if (run == 1) good &= same(name, before[i], now);
            before[i] = make(now.count, now.dtype);
            memcpy(before[i].data(), now.data(), now.count * now.size());
        }
    }
    return good;
}

template <class S>
bool shrink_is_right(uint64_t seed, Dtype dtype) {
    const int64_t T = some_rows(), C = some_columns(), F = some_terms(128 / sizeof(S)), parts = draw(1, 4);
    const Table tokens(T, F, coin() ? F : up(F, 8) + draw(0, 1) * 8, dtype);
    const Stack factors(C, F, dtype);
    Table sums(1, T * C, Dtype::fp32), partial = workspace(parts, T * C);
    const bool good = is_same_twice(seed, "shrink", {&partial}, [&] {
        const Matrix x = matrix<S>(tokens.tensor().data, false, T, F, tokens.stride);
        shrink(dtype, {x, factors.matrix<S>(C), static_cast<float*>(partial.tensor().data), parts, 0}, nullptr);
    });
    const std::vector<double> x = tokens.numbers(), a = factors.numbers(), all = partial.numbers();
    for (int64_t i = 0; i < T * C; ++i) {
        float sum = 0;
        for (int64_t part = 0; part < parts; ++part) sum += static_cast<float>(all[part * T * C + i]);
        sums.buffer.set(sums.offset + i, sum);
    }
    return good & is_right("shrink", sums,
                           product(
                               T, C, F, [&](int64_t t, int64_t f) { return x[t * F + f]; },
                               [&](int64_t c, int64_t f) { return a[c * F + f]; }));
}

template <class S>
bool expand_is_right(uint64_t seed, Dtype dtype) {
    // one to four tiles of features, in fewer groups than tiles, as many, or more
    const int64_t T = some_rows(), C = some_terms(128 / sizeof(S)), groups = draw(1, 3);
    const int64_t F = whole(near({1, 112, 128, 144, 256, 256, 384, 392}));
    Table coefficients(T, up(C, 8), dtype);
    for (int64_t t = 0; t < T; ++t)
        for (int64_t c = C; c < coefficients.columns; ++c) coefficients.buffer.set(coefficients.at(t, c), 0);
    const Stack factors(C, F, dtype);
    const bool has_base = coin(), one_row = coin();
    const Table base(one_row ? 1 : T, F, coin() ? F : up(F, 8) + draw(0, 1) * 8, dtype);
    Table out(T, F, dtype);
    const bool good = is_same_twice(seed, "expand", {&out}, [&] {
        const void* from = has_base ? base.tensor().data : nullptr;
        const int64_t stride = has_base && !one_row ? base.stride : 0, size = sizeof(S);
        void* to = out.tensor().data;
        const bool aligned = on_16_bytes(to, F, size) && on_16_bytes(from, stride, size);
        const Matrix v = matrix<S>(coefficients.tensor().data, false, T, coefficients.columns, coefficients.stride);
        expand(dtype, {v, factors.matrix<S>(C), {to, from, stride, T, F, aligned, 0.5f}, groups}, nullptr);
    });
    const std::vector<double> v = coefficients.numbers(), b = factors.numbers(), before = base.numbers();
    std::vector<double> truth = product(
        T, F, C, [&](int64_t t, int64_t c) { return v[t * coefficients.columns + c]; },
        [&](int64_t f, int64_t c) { return b[c * F + f]; });
    for (int64_t i = 0; i < T * F; ++i) truth[i] = truth[i] / 2 + (has_base ? before[one_row ? i % F : i] : 0);
    return good & is_right("expand", out, truth);
}

template <class S>
bool wgrad_is_right(uint64_t seed, Dtype dtype) {
    const int64_t T = some_terms(128 / sizeof(S)), F = whole(some_rows()), C = some_columns(), splits = draw(1, 4);
    const Table tokens(T, F, coin() ? F : up(F, 8) + draw(0, 1) * 8, dtype);
    Table coefficients(T, up(C, 8), dtype);  // those behind C have no meaning
    for (int64_t t = 0; t < T; ++t)
        for (int64_t c = C; c < coefficients.columns; ++c) coefficients.buffer.set(coefficients.at(t, c), NAN);
    const int64_t split = coin() ? C : draw(1, C);
    Table first(split, F, coin() ? dtype : Dtype::fp32),
        second(std::max<int64_t>(C - split, 1), F, coin() ? dtype : Dtype::fp32);
    Table partial = workspace(splits, C * F);
    const bool good = is_same_twice(seed, "wgrad", {&first, &second}, [&] {
        WgradParams p = {};
        p.coefficients = matrix<S>(coefficients.tensor().data, false, T, coefficients.columns, coefficients.stride);
        p.tokens = matrix<S>(tokens.tensor().data, false, T, F, tokens.stride);
        p.count = C, p.split = split, p.splits = splits, p.scaling = 0.5f;
        p.first = first.tensor().data, p.first_fp32 = first.tensor().fp32;
        if (split < C) p.second = second.tensor().data, p.second_fp32 = second.tensor().fp32;
        p.partial = static_cast<float*>(partial.tensor().data);
        wgrad(dtype, p, nullptr);
    });
    const std::vector<double> v = coefficients.numbers(), x = tokens.numbers();
    std::vector<double> truth = product(
        C, F, T, [&](int64_t c, int64_t t) { return v[t * coefficients.columns + c]; },
        [&](int64_t f, int64_t t) { return x[t * F + f]; });
    for (double& number : truth) number /= 2;
    return good & is_right("wgrad", first, truth) & (split == C || is_right("wgrad", second, truth, split * F));
}

// One product: of a stage and a dtype in turn.
bool product_is_right(uint64_t seed) {
    generator.seed(seed);
    anywhere = coin();
    const Dtype dtype = static_cast<Dtype>(seed / 3 % 3);
    bool good = false;
    with_dtype(dtype, [&](auto scalar) {
        using S = decltype(scalar);
        good = seed % 3 == 0   ? shrink_is_right<S>(seed, dtype)
               : seed % 3 == 1 ? expand_is_right<S>(seed, dtype)
                               : wgrad_is_right<S>(seed, dtype);
    });
    return good;
}

}  // namespace

int main(int, char** arguments) { return run_problems(arguments, product_is_right); }
