"""The reference, compared with a loop over tokens and experts, with autograd, with PEFT and with mathematical identities."""

from copy import deepcopy

import pytest
import torch
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraConfig
from torch import nn

from lmoe_kernels import lmoe, lmoe_linear, reference
from lmoe_kernels.options import Factors, Saved, Wanted
from tests.problems import CASES, Case, leaves_of, make_problem, outcome, truth
from tools.calls import backward, factors_of, forward_saved
from tools.error_rule import assert_no_worse

F64 = torch.float64


def _by_loop(problem) -> torch.Tensor:
    """One token and one expert at a time, as the paper defines it."""
    case, t = problem.case, problem.tensors
    rows = []
    for token, x in enumerate(t["x"]):
        logits = t["gate_logits"][token] if case.outside_logits else t["gate_weight"] @ x
        logits = logits + t["gate_bias"] if case.gate_bias else logits
        kept = sorted(range(case.E), key=lambda e: (-logits[e].item(), e))[: case.top_k or case.E]
        among = kept if case.renormalize else range(case.E)
        weight = {e: torch.exp(logits[e] - logits[kept].max()) for e in among}
        gate = {e: weight[e] / sum(weight.values()) if case.softmax else logits[e] for e in kept}
        a = {e: t["lora_a"][0 if case.shared_a else e] for e in kept}
        b = {e: t["lora_b"][e].t() for e in kept}
        if case.mixing == "factors":
            delta = sum(gate[e] * b[e] for e in kept) @ (sum(gate[e] * a[e] for e in kept) @ x)
        else:
            delta = sum(gate[e] * (b[e] @ (a[e] @ x)) for e in kept)
        y = case.scaling * delta
        rows.append(y + t["weight"] @ x + t["bias"] if case.linear else y)
    return torch.stack(rows) if rows else torch.zeros(0, case.O, dtype=F64)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_definition_is_the_loop_over_tokens(case: Case) -> None:
    problem = make_problem(case, F64)
    torch.testing.assert_close(problem.call("reference")[0], _by_loop(problem))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_explicit_backward_is_the_gradient_of_the_definition(case: Case) -> None:
    problem = make_problem(case, F64)
    leaves, true = leaves_of(problem.tensors), truth(problem)
    for name, result in outcome(problem, problem.call("reference", **leaves), leaves).items():
        torch.testing.assert_close(result, true[name], msg=lambda m, name=name: f"{name}: {m}")


def test_gate_gradient_has_two_terms_under_factors() -> None:
    """A formula with the first term alone is wrong, the two terms are right, and Euler's identity holds."""
    t = make_problem(Case(E=4), F64).tensors
    gates = torch.rand(7, 4, dtype=F64).softmax(dim=-1).requires_grad_()
    a, b = torch.einsum("te,eri->tri", gates, t["lora_a"]), torch.einsum("te,ero->tro", gates, t["lora_b"])
    delta = torch.einsum("tro,tri,ti->to", b, a, t["x"])
    dy = torch.randn_like(delta)
    (true,) = torch.autograd.grad(delta, gates, dy)

    u, dv = torch.einsum("ti,eri->ter", t["x"], t["lora_a"]), torch.einsum("to,ero->ter", dy, t["lora_b"])
    h, dh = (torch.einsum("te,ter->tr", gates, z) for z in (u, dv))
    through_b, through_a = torch.einsum("ter,tr->te", dv, h), torch.einsum("ter,tr->te", u, dh)
    torch.testing.assert_close(through_b + through_a, true)
    torch.testing.assert_close((gates * true).sum(dim=-1), 2 * (dy * delta).sum(dim=-1))
    one_term = torch.einsum("ter,ter->te", dv, u)
    assert (one_term - true).abs().max() > 0.1 * true.abs().max()


@pytest.mark.parametrize("mixing", ["factors", "outputs"])
def test_one_hot_gates_are_pefts_single_lora(mixing: str, backend: str) -> None:
    """Where one gate is 1, both mixings are the LoRA of that expert, as PEFT computes it."""
    experts, rank, features_in, features_out, alpha = 4, 6, 24, 30, 12
    x = torch.randn(11, features_in)
    layer = nn.Linear(features_in, features_out)
    lora_a, lora_b = torch.randn(experts, rank, features_in), torch.randn(experts, rank, features_out)
    chosen = torch.randint(experts, (11,))
    logits = torch.full((11, experts), -1e4).scatter_(1, chosen[:, None], 0.0)
    y = lmoe_linear(
        x, layer.weight, layer.bias, lora_a, lora_b, gate_logits=logits, scaling=alpha / rank, mixing=mixing, backend=backend
    )
    for expert in range(experts):
        config = LoraConfig(r=rank, lora_alpha=alpha)
        peft = PeftLinear(layer, "default", config=config, r=rank, lora_alpha=alpha)
        peft.lora_A["default"].weight.data.copy_(lora_a[expert])
        peft.lora_B["default"].weight.data.copy_(lora_b[expert].t())
        rows = x[chosen == expert]
        assert_no_worse("y", y[chosen == expert], [peft(rows)], deepcopy(peft).double()(rows.double()))


def test_the_mixings_differ_by_the_cross_terms() -> None:
    t = make_problem(Case(E=3), F64).tensors
    factors, outputs = (
        lmoe(t["x"], t["lora_a"], t["lora_b"], gate_weight=t["gate_weight"], mixing=mixing)
        for mixing in ("factors", "outputs")
    )
    gates = (t["x"] @ t["gate_weight"].t()).softmax(dim=-1)
    u = torch.einsum("ti,fri->tfr", t["x"], t["lora_a"])
    cross = torch.einsum("te,tf,ero,tfr->to", gates, gates, t["lora_b"], u)
    torch.testing.assert_close(factors, cross)
    assert (factors - outputs).abs().max() > 1e-3


def test_gate_softmax_keeps_the_largest() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0], [5.0, 5.0, 5.0, 5.0]], dtype=F64)
    gates = reference.gate_softmax(logits, top_k=2)
    torch.testing.assert_close(gates, torch.tensor([[0.0, 0.5, 0.0, 0.5], [0.5, 0.5, 0.0, 0.0]], dtype=F64))
    torch.testing.assert_close(reference.gate_softmax(logits, top_k=4), logits.softmax(dim=-1))


def test_fp32_parameters_of_the_reference_never_pass_through_half_precision() -> None:
    """With bf16 tokens, logits and gradients have the error of fp32 sums over the same numbers."""
    case = Case(T=19, E=4, gate_bias=True)
    problem = make_problem(case, torch.bfloat16, param_dtype=torch.float32)
    t, options = problem.tensors, case.options
    factors, wanted = factors_of(t), Wanted(False, True, True, True, True, False)
    _, saved = forward_saved("reference", t["x"], factors, options)
    assert saved.logits is not None

    def in_dtype(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The logits, and the gradients of bf16 problem and saved tensors, computed in another dtype."""
        x, dy, dlogits, *weights = (s.to(dtype) for s in (t["x"], problem.dy, problem.dlogits, *factors[:4]))
        of_dtype = Saved(*(None if s is None else s.to(dtype) for s in saved))
        grads = backward("reference", dy, x, Factors(*weights), of_dtype, options, dlogits=dlogits, wanted=wanted)
        own = forward_saved("reference", x, Factors(*weights), options)[1].logits
        assert own is not None
        return dict(zip(("logits", *Factors._fields[:4]), (own, *grads[1:5]), strict=True))

    grads = backward("reference", problem.dy, t["x"], factors, saved, options, dlogits=problem.dlogits, wanted=wanted)
    plain, true = in_dtype(torch.float32), in_dtype(F64)
    for name, ours in zip(plain, (saved.logits, *grads[1:5]), strict=True):
        assert ours is not None
        assert ours.dtype == torch.float32
        assert_no_worse(name, ours, [plain[name]], true[name])
