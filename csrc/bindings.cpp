// SPDX-License-Identifier: Apache-2.0
// lmoe_kernels._cuda: takes the tuples of lmoe_kernels/options.py and their tensors apart, and calls the launchers. It knows
// no torch: of a tensor it calls the methods data_ptr, element_size, dim and stride. The caller keeps all tensors alive
// until the launcher has returned.
//
// Tuples arrive whole because that is the fastest way: one call that reads nine tensors takes 2.0 us. It takes 2.3 us if
// Python passes addresses one by one, and 4.3 us with a setter for each tensor (torch 2.13, pybind11 3, x86-64 CPU,
// 2026-11).
#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>

#include "launchers.h"

namespace py = pybind11;
using namespace lmoe;

namespace {

int64_t to_int(py::handle number) {
    const int64_t value = PyLong_AsLongLong(number.ptr());
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
}

py::object checked(PyObject* result) {
    if (result == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(result);
}

// The address of a tensor's elements, null for None. An empty tensor has no memory; its address must not mean "not given".
void* address(py::handle tensor) {
    static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
    if (tensor.is_none()) return nullptr;
    void* data = PyLong_AsVoidPtr(checked(PyObject_CallMethodNoArgs(tensor.ptr(), data_ptr)).ptr());
    if (data == nullptr && PyErr_Occurred()) throw py::error_already_set();
    return data == nullptr ? reinterpret_cast<void*>(16) : data;
}

float* floats(py::handle tensor) { return static_cast<float*>(address(tensor)); }

Tensor to_tensor(py::handle tensor) {
    static PyObject* const element_size = PyUnicode_InternFromString("element_size");
    if (tensor.is_none()) return {};
    return {address(tensor), to_int(checked(PyObject_CallMethodNoArgs(tensor.ptr(), element_size))) == 4};
}

Rows to_rows(py::handle tensor) {
    static PyObject *const stride = PyUnicode_InternFromString("stride"), *const zero = PyLong_FromLong(0);
    if (tensor.is_none()) return {};
    return {address(tensor), to_int(checked(PyObject_CallMethodOneArg(tensor.ptr(), stride, zero)))};
}

// A vector is the same row for all tokens.
Rows to_rows_or_vector(py::handle tensor) {
    static PyObject* const dim = PyUnicode_InternFromString("dim");
    Rows rows = to_rows(tensor);
    if (!tensor.is_none() && to_int(checked(PyObject_CallMethodNoArgs(tensor.ptr(), dim))) == 1) rows.stride = 0;
    return rows;
}

// The fields of a tuple of options.py, in their order.
template <size_t COUNT>
std::array<py::handle, COUNT> fields(const char* name, const py::tuple& tuple) {
    if (tuple.size() != COUNT) {
        throw py::type_error(std::string("lmoe: ") + name + " must have " + std::to_string(COUNT) + " fields, got " +
                             std::to_string(tuple.size()));
    }
    std::array<py::handle, COUNT> result;
    for (size_t i = 0; i < COUNT; ++i) result[i] = PyTuple_GET_ITEM(tuple.ptr(), i);
    return result;
}

Mixing to_mixing(py::handle name) {
    const bool text = PyUnicode_Check(name.ptr());
    if (text && PyUnicode_CompareWithASCIIString(name.ptr(), "factors") == 0) return Mixing::factors;
    if (text && PyUnicode_CompareWithASCIIString(name.ptr(), "outputs") == 0) return Mixing::outputs;
    throw std::invalid_argument("lmoe: mixing must be one of factors, outputs, got " + py::repr(name).cast<std::string>());
}

template <class Params>
Params params_of(int dtype, const py::tuple& sizes) {
    Params p = {};
    p.dtype = static_cast<Dtype>(dtype);
    const auto [T, I, O, E, R, experts_of_a] = fields<6>("Sizes", sizes);
    p.T = to_int(T), p.I = to_int(I), p.O = to_int(O), p.E = to_int(E), p.R = to_int(R);
    p.experts_of_a = to_int(experts_of_a);
    return p;
}

// `logits` are those of the gate; an outside router's come with the factors, and so do given gates. A backward has neither
// base nor y. Of the options, dropout has no meaning for the kernels.
void set_problem(ForwardParams& p, const py::tuple& options, const py::tuple& factors, py::handle x, py::handle base,
                 py::handle logits, py::handle u, py::handle y) {
    const auto [scaling, mixing, top_k, renormalize, dropout, softmax] = fields<6>("Options", options);
    p.scaling = scaling.cast<float>(), p.mixing = to_mixing(mixing);
    p.top_k = top_k.is_none() ? p.E : std::min(to_int(top_k), p.E);
    p.gates_given = PyObject_IsTrue(softmax.ptr()) == 0;
    p.renormalize = !p.gates_given && (PyObject_IsTrue(renormalize.ptr()) == 1 || p.top_k == p.E);
    const auto [lora_a, lora_b, gate_weight, gate_bias, gate_logits] = fields<5>("Factors", factors);
    p.lora_a = to_tensor(lora_a), p.lora_b = to_tensor(lora_b);
    p.gate_weight = to_tensor(gate_weight), p.gate_bias = to_tensor(gate_bias);
    p.x = to_rows(x), p.base = to_rows_or_vector(base);
    p.logits = to_tensor(gate_logits.is_none() ? logits : gate_logits);
    p.u = address(u), p.y = address(y);
}

void set_one_pass(ForwardParams& p, int64_t smem) { p.path = Path::one_pass, p.smem = smem; }

void set_workspaces(ForwardParams& p, py::handle v, py::handle partial, int64_t shrink_parts, int64_t expand_groups) {
    p.path = Path::stages, p.v = to_rows(v);
    p.partial = floats(partial), p.shrink_parts = shrink_parts, p.expand_groups = expand_groups;
}

void set_backward(BackwardParams& p, py::handle dy, py::handle dlogits_in, py::handle du_dlogits, int64_t x_splits,
                  int64_t dy_splits, const py::tuple& gradients) {
    p.dy = to_rows(dy), p.dlogits_in = floats(dlogits_in);
    p.du_dlogits = to_rows(du_dlogits), p.x_splits = x_splits, p.dy_splits = dy_splits;
    const auto [x, lora_a, lora_b, gate_weight, gate_bias, gate_logits] = fields<6>("Gradients", gradients);
    p.dx = address(x), p.dlora_a = to_tensor(lora_a), p.dlora_b = to_tensor(lora_b);
    p.dgate_weight = to_tensor(gate_weight), p.dlogits = address(gate_logits);  // gate_bias's is summed by torch
}

void set_plan(DecodeParams& p, py::handle partial, int blocks, int64_t chunk, int64_t chunks, int64_t column_tile,
              int64_t smem) {
    p.partial = floats(partial);
    p.blocks = blocks, p.chunk = chunk, p.chunks = chunks, p.column_tile = column_tile, p.smem = smem;
}

Mixture to_mixture(const py::tuple& block) {
    const auto [E, R, O, column, shared_a, scaling, mixing, top_k, renormalize, group] = fields<10>("Block", block);
    Mixture m = {};
    m.E = static_cast<int>(to_int(E)), m.R = static_cast<int>(to_int(R)), m.O = static_cast<int>(to_int(O));
    m.column = static_cast<int>(to_int(column)), m.experts_of_a = PyObject_IsTrue(shared_a.ptr()) == 1 ? 1 : m.E;
    m.scaling = scaling.cast<float>(), m.mixing = to_mixing(mixing), m.group = to_int(group);
    m.top_k = top_k.is_none() ? m.E : std::min(static_cast<int>(to_int(top_k)), m.E);
    m.renormalize = PyObject_IsTrue(renormalize.ptr()) == 1 || m.top_k == m.E;
    return m;
}

template <class Value>
void check_count(const char* name, size_t count, const Value& most) {
    if (count <= std::size(most)) return;
    throw std::invalid_argument(std::string("lmoe: ") + name + " must be at most " + std::to_string(std::size(most)) +
                                ", got " + std::to_string(count));
}

// A stacked call without its tensors: blocks and columns of y one after the other, and the plan.
StackedParams stacked_params(int dtype, int64_t T, int64_t I, const py::tuple& blocks, const py::tuple& columns,
                             const py::tuple& plan) {
    StackedParams p = {};
    p.dtype = static_cast<Dtype>(dtype), p.T = T, p.I = I;
    check_count("blocks", blocks.size(), p.mixtures), check_count("columns", columns.size(), p.columns);
    for (const auto block : blocks) {
        Mixture& m = p.mixtures[p.mixture_count++] = to_mixture(py::reinterpret_borrow<py::tuple>(block));
        m.a = static_cast<int>(p.rows_of_a), m.expert = static_cast<int>(p.E);
        if (p.mixture_count > 1) m.b = (&m)[-1].b + int64_t{(&m)[-1].E} * (&m)[-1].R * (&m)[-1].O;
        p.rows_of_a += int64_t{m.experts_of_a} * m.R, p.E += m.E;
    }
    const auto [grid, chunk, chunks, column_tile, smem] = fields<5>("DecodePlan", plan);
    set_plan(p, py::none(), static_cast<int>(to_int(grid)), to_int(chunk), to_int(chunks), to_int(column_tile),
             to_int(smem));
    for (const auto some : columns) {
        const auto [first, count, mixtures] = fields<3>("Columns", py::reinterpret_borrow<py::tuple>(some));
        const auto bits = static_cast<uint32_t>(to_int(mixtures));
        const int columns_of_y = static_cast<int>(to_int(count)), tile = static_cast<int>(p.column_tile);
        p.columns[p.columns_count++] = {static_cast<int>(to_int(first)), columns_of_y, p.tiles, bits};
        p.tiles += (columns_of_y + tile - 1) / tile;
    }
    return p;
}

// A copy with the tensors of one call.
StackedParams with_tensors(StackedParams p, py::handle y, py::handle x, const py::tuple& factors, py::handle token_group,
                           py::handle token_scale, py::handle partial) {
    static PyObject* const element_size = PyUnicode_InternFromString("element_size");
    const auto [lora_a, lora_b, gate_weight, gate_bias, gate_logits] = fields<5>("StackedFactors", factors);
    p.lora_a = to_tensor(lora_a), p.lora_b = to_tensor(lora_b);
    p.gate_weight = to_tensor(gate_weight), p.gate_bias = to_tensor(gate_bias);
    p.logits = to_tensor(gate_logits), p.logits_stride = to_rows(gate_logits).stride;
    p.x = to_rows(x), p.y = address(y), p.y_stride = to_rows(y).stride, p.partial = floats(partial);
    p.token_group = address(token_group), p.token_scale = floats(token_scale);
    p.group_has_64_bits =
        p.token_group != nullptr && to_int(checked(PyObject_CallMethodNoArgs(token_group.ptr(), element_size))) == 8;
    return p;
}

DropoutParams dropout_params(int dtype, const py::tuple& shape, py::handle rows, py::handle seed, double probability,
                             py::handle out) {
    DropoutParams p = {};
    p.dtype = static_cast<Dtype>(dtype);
    const auto [T, F] = fields<2>("shape", shape);
    p.T = to_int(T), p.F = to_int(F);
    p.rows = to_rows(rows), p.seed = static_cast<const int64_t*>(address(seed)), p.out = address(out);
    p.factor = static_cast<float>(1 / (1 - probability)), p.threshold = static_cast<uint32_t>(probability * 4294967296.0);
    return p;
}

// An address between two elements would make a kernel fail, or read other numbers.
void check_address(const char* name, const void* data, uintptr_t size) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(data);
    if (address % size != 0) {
        throw std::invalid_argument(std::string("lmoe: ") + name +
                                    " must lie on a multiple of its element's size, got address " + std::to_string(address));
    }
}

void check_address(const char* name, const void* data, bool fp32, Dtype dtype) {
    check_address(name, data, fp32 || dtype == Dtype::fp32 ? 4 : 2);
}

void check_addresses(const ForwardParams& p) {
    auto check = [&](const char* name, const Tensor& t) { check_address(name, t.data, t.fp32, p.dtype); };
    check("x", {p.x.data, false}), check("base", {p.base.data, false});
    check("lora_a", p.lora_a), check("lora_b", p.lora_b), check("gate_weight", p.gate_weight);
    check("gate_bias", p.gate_bias), check("logits", p.logits);
    check("u", {p.u, false}), check("y", {p.y, false}), check("v", {p.v.data, false});
    check("partial", {p.partial, true});
}

void check_addresses(const BackwardParams& p) {
    check_addresses(static_cast<const ForwardParams&>(p));
    auto check = [&](const char* name, const Tensor& t) { check_address(name, t.data, t.fp32, p.dtype); };
    check_address("dlogits_in", p.dlogits_in, true, p.dtype);
    check("dy", {p.dy.data, false}), check("du_dlogits", {p.du_dlogits.data, false});
    check("the gradient of x", {p.dx, false}), check("the gradient of lora_a", p.dlora_a);
    check("the gradient of lora_b", p.dlora_b), check("the gradient of gate_weight", p.dgate_weight);
    check("the gradient of logits", {p.dlogits, p.logits.fp32});
}

void check_addresses(const StackedParams& p) {
    check_addresses(static_cast<const ForwardParams&>(p));
    check_address("token_group", p.token_group, p.group_has_64_bits ? 8 : 4);
    check_address("token_scale", p.token_scale, sizeof *p.token_scale);
}

void check_addresses(const DropoutParams& p) {
    check_address("rows", p.rows.data, false, p.dtype), check_address("out", p.out, false, p.dtype);
    check_address("seed", p.seed, sizeof *p.seed);
}

template <class Params>
auto launcher(void (*launch)(const Params&, int, void*)) {
    return [launch](const Params& p, int device, uintptr_t stream) {
        check_addresses(p);
        launch(p, device, reinterpret_cast<void*>(stream));
    };
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "Hand-written CUDA kernels of lmoe_kernels; see csrc/.";
    // module_local: the tests load a second build of this module, for the emulator, in the same process
    py::class_<ForwardParams> forward_params(m, "ForwardParams", py::module_local());
    forward_params.def(py::init(&params_of<ForwardParams>)).def("set_problem", &set_problem);
    forward_params.def("set_one_pass", &set_one_pass).def("set_workspaces", &set_workspaces);
    py::class_<BackwardParams, ForwardParams> backward_params(m, "BackwardParams", py::module_local());
    backward_params.def(py::init(&params_of<BackwardParams>)).def("set_backward", &set_backward);
    py::class_<DecodeParams, ForwardParams> decode_params(m, "DecodeParams", py::module_local());
    decode_params.def(py::init(&params_of<DecodeParams>)).def("set_plan", &set_plan);
    py::class_<StackedParams>(m, "StackedParams", py::module_local())
        .def(py::init(&stacked_params))
        .def("with_tensors", &with_tensors);

    py::class_<DropoutParams>(m, "DropoutParams", py::module_local()).def(py::init(&dropout_params));

    auto def = [&m](const char* name, auto function) {
        m.def(name, function, py::arg("params"), py::arg("device"), py::arg("stream"));
    };
    def("forward", launcher(&lmoe::forward));
    def("backward", launcher(&lmoe::backward));
    def("decode", launcher(&lmoe::decode));
    def("add_stacked", launcher(&lmoe::add_stacked));
    def("dropout", launcher(&lmoe::dropout));
    auto properties = [](int device) {
        const Properties p = lmoe::properties(device);
        return py::make_tuple(p.processors, p.shared_memory_a_block, p.cooperative != 0);
    };
    m.def("properties", properties, py::arg("device"));
}
