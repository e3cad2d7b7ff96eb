"""The public functions: error messages, autocast, router logits, what is saved, which backend is taken."""

from collections.abc import Callable

import pytest
import torch
from torch.autograd import forward_ad

from lmoe_kernels import dispatch, explain, lmoe, lmoe_linear, use_backend
from tests.problems import Case, good_arguments, leaves_of, make_problem

BAD = [
    ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
    (
        {"x": torch.zeros(2, 16, dtype=torch.int64)},
        TypeError,
        "x must have one of the dtypes torch.float32, torch.bfloat16, torch.float16, torch.float64, got torch.int64",
    ),
    ({"x": torch.tensor(1.0)}, ValueError, "x must have shape (..., I), got a tensor without dimensions"),
    ({"x": torch.zeros(2, 15)}, ValueError, "lora_a must have shape (E, R, I) = (8, 4, 15), got (8, 4, 16)"),
    ({"lora_a": torch.zeros(4, 16)}, ValueError, "lora_a must have shape (E, R, I) with E, R >= 1, got (4, 16)"),
    ({"lora_b": torch.zeros(8, 0, 12)}, ValueError, "lora_b must have shape (E, R, O) with E, R >= 1, got (8, 0, 12)"),
    ({"lora_a": torch.zeros(2, 4, 16)}, ValueError, "lora_a must have shape (E, R, I) = (8, 4, 16), got (2, 4, 16)"),
    ({"lora_b": torch.zeros(8, 5, 12)}, ValueError, "lora_a must have shape (E, R, I) = (8, 5, 16), got (8, 4, 16)"),
    ({"lora_a": torch.zeros(8, 4, 16).half()}, TypeError, "lora_a must have dtype torch.float32, got torch.float16"),
    (
        {"x": torch.zeros(2, 16).bfloat16(), "lora_b": torch.zeros(8, 4, 12).half()},
        TypeError,
        "lora_b must have dtype torch.bfloat16 like x, or torch.float32, got torch.float16",
    ),
    ({"lora_b": torch.zeros(8, 4, 12, device="meta")}, ValueError, "lora_b must be on cpu like x, got meta"),
    (
        {"gate_weight": None},
        ValueError,
        "exactly one of gate_weight, gate_logits and gates must be given, got none",
    ),
    (
        {"gate_logits": torch.zeros(2, 8)},
        ValueError,
        "exactly one of gate_weight, gate_logits and gates must be given, got gate_weight and gate_logits",
    ),
    (
        {"gates": torch.zeros(2, 8)},
        ValueError,
        "exactly one of gate_weight, gate_logits and gates must be given, got gate_weight and gates",
    ),
    (
        {"gate_weight": None, "gate_logits": torch.zeros(2, 8), "gates": torch.zeros(2, 8)},
        ValueError,
        "exactly one of gate_weight, gate_logits and gates must be given, got gate_logits and gates",
    ),
    (
        {"gate_weight": None, "gates": torch.zeros(2, 8), "gate_bias": torch.zeros(8)},
        ValueError,
        "gate_bias must be None if gates is given, got Tensor",
    ),
    ({"gate_weight": None, "gates": torch.zeros(3, 8)}, ValueError, "gates must have shape (..., E) = (2, 8), got (3, 8)"),
    ({"gate_weight": None, "gates": [0.5]}, TypeError, "gates must be a torch.Tensor, got list"),
    (
        {"gate_weight": None, "gates": torch.zeros(2, 8).half()},
        TypeError,
        "gates must have dtype torch.float32, got torch.float16",
    ),
    (
        {"gate_weight": None, "gates": torch.zeros(2, 8), "top_k": 2},
        ValueError,
        "top_k must be None if gates are given, of which a 0 drops an expert, got 2",
    ),
    (
        {"gate_weight": None, "gates": torch.zeros(2, 8), "return_router_logits": True},
        ValueError,
        "return_router_logits must be False if gates are given, which have no logits, got True",
    ),
    ({"gate_weight": torch.zeros(7, 16)}, ValueError, "gate_weight must have shape (E, I) = (8, 16), got (7, 16)"),
    ({"gate_bias": torch.zeros(8, 1)}, ValueError, "gate_bias must have shape (E) = (8,), got (8, 1)"),
    ({"gate_bias": torch.zeros(8).half()}, TypeError, "gate_bias must have dtype torch.float32, got torch.float16"),
    (
        {"gate_weight": None, "gate_logits": torch.zeros(2, 8), "gate_bias": torch.zeros(8)},
        ValueError,
        "gate_bias must be None if gate_logits is given, got Tensor",
    ),
    (
        {"gate_weight": None, "gate_logits": torch.zeros(3, 8)},
        ValueError,
        "gate_logits must have shape (..., E) = (2, 8), got (3, 8)",
    ),
    ({"scaling": "1"}, TypeError, "scaling must be a finite number, got str"),
    ({"scaling": float("nan")}, ValueError, "scaling must be a finite number, got nan"),
    ({"scaling": -(10**400)}, ValueError, "scaling must be a finite number, got an integer beyond the range of a float"),
    ({"mixing": "sum"}, ValueError, "mixing must be one of 'factors', 'outputs', got 'sum'"),
    ({"top_k": 0}, ValueError, "top_k must be in 1 .. E = 8, got 0"),
    ({"top_k": 9}, ValueError, "top_k must be in 1 .. E = 8, got 9"),
    ({"top_k": 2.0}, TypeError, "top_k must be an int, got float"),
    ({"renormalize": None}, TypeError, "renormalize must be a bool, got NoneType"),
    ({"return_router_logits": "yes"}, TypeError, "return_router_logits must be a bool, got str"),
    ({"base": torch.zeros(2, 11)}, ValueError, "base must have shape (..., O) = (2, 12), got (2, 11)"),
    ({"base": torch.zeros(2, 12).half()}, TypeError, "base must have dtype torch.float32 like x, got torch.float16"),
]


@pytest.mark.parametrize(("changes", "error", "text"), BAD, ids=[text for _, _, text in BAD])
def test_bad_input_gets_one_clear_line(changes: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        lmoe(**good_arguments(**changes))
    assert str(caught.value) == f"lmoe: {text}"


def test_unknown_backend_names_the_known_ones() -> None:
    known = ", ".join(map(repr, dispatch.BACKENDS))
    with pytest.raises(ValueError) as caught:
        lmoe(**good_arguments(), backend="cudnn")
    assert str(caught.value) == f"lmoe: backend must be None or one of {known}, got 'cudnn'"
    with pytest.raises(ValueError, match="use_backend: backend must be None or one of"), use_backend("cudnn"):
        pass


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"weight": torch.zeros(11, 16)}, "weight must have shape (O, I) = (12, 16), got (11, 16)"),
        ({"bias": torch.zeros(11)}, "bias must have shape (O) = (12,), got (11,)"),
        ({"weight": torch.zeros(12, 16).half()}, "weight must have dtype torch.float32 like x, got torch.float16"),
    ],
)
def test_bad_linear_layer(changes: dict, text: str) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        lmoe_linear(**good_arguments(**{"weight": torch.zeros(12, 16), "bias": None, **changes}))
    assert str(caught.value) == f"lmoe_linear: {text}"


@pytest.mark.parametrize("name", ["x", "lora_a", "lora_b", "gate_weight", "gate_logits", "base", "weight", "bias"])
@pytest.mark.parametrize(
    ("made", "got"),
    [
        (torch.Tensor.to_sparse, "one of layout torch.sparse_coo"),
        (torch.Tensor.to_mkldnn, "one of layout torch._mkldnn"),
        (lambda t: torch.nested.nested_tensor(list(t.view(2, -1))), "a nested one"),
        (lambda t: torch.nested.nested_tensor(list(t.view(2, -1)), layout=torch.jagged), "a nested one"),
    ],
    ids=["sparse", "mkldnn", "nested", "jagged"],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_that_are_not_dense(made: Callable, got: str, name: str) -> None:
    """The error is the same under autocast, which must not cast such tensors first."""
    function, arguments = lmoe, good_arguments()
    if name in ("weight", "bias"):
        function, arguments = lmoe_linear, arguments | {"weight": torch.zeros(12, 16), "bias": torch.zeros(12)}
    elif name == "gate_logits":
        arguments = arguments | {"gate_weight": None, "gate_logits": torch.zeros(2, 8)}
    elif name == "base":
        arguments["base"] = torch.zeros(2, 12)
    arguments[name] = made(arguments[name])
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), pytest.raises(TypeError) as caught:
            function(**arguments)
        assert str(caught.value) == f"{function.__name__}: {name} must be a dense tensor, got {got}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_followed(dtype: torch.dtype, backend: str) -> None:
    """Under autocast an fp32 layer computes as if its tokens and frozen weight were half, and gets fp32 gradients."""
    problem = make_problem(Case(T=9, linear=True), torch.float32)
    leaves = leaves_of(problem.tensors)
    with torch.autocast("cpu", dtype=dtype):
        y, logits = problem.call(backend, **leaves)
    assert (y.dtype, logits.dtype) == (dtype, torch.float32)
    half = {name: leaves[name].detach().to(dtype) for name in ("x", "weight", "bias")}
    expected, expected_logits = problem.call(backend, **half)
    assert torch.equal(y, expected)
    assert torch.equal(logits, expected_logits)
    with torch.autocast("cpu", dtype=dtype):  # inside the region, backward must not be cast again
        inside = torch.autograd.grad(y.sum(), list(leaves.values()), retain_graph=True)
    outside = torch.autograd.grad(y.sum(), list(leaves.values()))
    assert all(g.dtype == torch.float32 for g in outside)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


@pytest.mark.parametrize("halves", [["gate_logits"], ["base"], ["x"], ["lora_a", "lora_b"]], ids=" ".join)
def test_autocast_accepts_inputs_of_mixed_precision(halves: list[str]) -> None:
    """Under autocast an outside router or another layer may return half precision while x is still fp32, or the reverse."""
    arguments = good_arguments(gate_weight=None, gate_logits=torch.randn(2, 8), base=torch.randn(2, 12))
    arguments |= {name: arguments[name].bfloat16() for name in halves}
    cast = arguments | {name: arguments[name].bfloat16() for name in ("x", "base")}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(lmoe(**arguments), lmoe(**cast))
        del arguments["base"]
        assert "torch.bfloat16 on cpu" in explain(**arguments)


def test_autocast_casts_no_integers() -> None:
    arguments = good_arguments(weight=torch.ones(12, 16, dtype=torch.int8), bias=None)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match="weight must have one of the dtypes"):
        lmoe_linear(**arguments)


def test_the_meta_device_gives_shapes() -> None:
    arguments = {name: t.to("meta") for name, t in good_arguments().items()}
    y, logits = lmoe(**arguments, return_router_logits=True)
    assert (y.shape, y.device.type, logits.shape) == ((2, 12), "meta", (2, 8))
    assert "on meta" in explain(**arguments)


def test_outside_logits_are_returned_as_they_are(backend: str) -> None:
    t = good_arguments(gate_weight=None)
    given = torch.randn(2, 8, requires_grad=True)
    _, logits = lmoe(**t | {"gate_logits": given}, return_router_logits=True, backend=backend)
    assert logits is given


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_forward_mode_derivatives_are_refused(backend: str) -> None:
    """The kernels compute no tangents: without this error they would be lost without notice."""
    arguments = good_arguments()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        lmoe(**arguments | {"x": forward_ad.make_dual(arguments["x"], arguments["x"])}, backend=backend)


def test_saved_bytes(backend: str) -> None:
    """With E=8 and R=16 in bf16, at most 330 bytes a token are saved in addition to x and the parameters."""
    tokens, features = 64, 256
    x = torch.randn(tokens, features).bfloat16()
    weight, lora_a, lora_b = torch.randn(features, features), torch.randn(8, 16, features), torch.randn(8, 16, features)
    gate_weight = torch.randn(8, features)
    leaves = [t.bfloat16().requires_grad_() for t in (x, lora_a, lora_b, gate_weight)]
    frozen = weight.bfloat16()
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = lmoe_linear(leaves[0], frozen, None, *leaves[1:3], gate_weight=leaves[3], backend=backend)
    known = {t.untyped_storage().data_ptr() for t in (*leaves, frozen)}
    beyond = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    assert sum(size for pointer, size in beyond.items() if pointer not in known) <= 330 * tokens
    assert y.requires_grad


def test_only_what_a_gradient_needs_is_saved(backend: str) -> None:
    """If lora_b alone needs a gradient, neither x nor the frozen weight is saved."""
    problem = make_problem(Case(linear=True), torch.float32)
    t = problem.tensors
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(s) or s, lambda s: s):
        problem.call(backend, lora_b=t["lora_b"].clone().requires_grad_())
    kept = {s.untyped_storage().data_ptr() for s in saved}
    assert t["x"].untyped_storage().data_ptr() not in kept
    assert t["weight"].untyped_storage().data_ptr() not in kept


def test_explain_names_every_backend_and_takes_one() -> None:
    text = explain(**good_arguments())
    lines = text.splitlines()
    assert lines[0] == "lmoe: T=2 I=16 O=12 E=8 R=4, torch.float32 on cpu"
    assert [line.split()[0] for line in lines[1:]] == list(dispatch.BACKENDS)
    assert sum(line.split()[1] == "taken:" for line in lines[1:]) == 1
    assert "  torch      taken: the first that can take the call" in lines
    assert "  reference  not taken: only if selected by name" in lines
    assert "reference  taken: selected by name" in explain(**good_arguments(), backend="reference")
    with use_backend("reference"):
        assert "reference  taken: selected by name" in explain(**good_arguments())
        assert "torch      not taken: 'reference' was selected by name" in explain(**good_arguments())


def test_a_named_backend_that_cannot_raises_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    row = dispatch.Backend("none.such", lambda problem: "there is no TPU", lambda problem: None)
    monkeypatch.setitem(dispatch.BACKENDS, "tpu", row)
    with pytest.raises(ValueError) as caught:
        lmoe(**good_arguments(), backend="tpu")
    assert str(caught.value) == "lmoe: backend must be one that can take this call, got 'tpu': there is no TPU"
    assert "tpu        cannot: there is no TPU" in explain(**good_arguments())
