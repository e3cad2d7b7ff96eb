"""Models on a GPU: shared routers, generation, dropout, statistics, fitting, named experts, on every backend.

The truth is a copy of the model in float64 on the CPU, and plain is a copy in the model's own dtype there.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

from transformers import LlamaConfig, LlamaForCausalLM

from lmoe_kernels import (
    add_expert,
    apply_lmoe,
    balance_experts,
    collect_router_logits,
    fit_router,
    lmoe_layers,
    load_lmoe,
    remove_expert,
    save_lmoe,
    use_backend,
)
from lmoe_kernels.dispatch import BACKENDS
from lmoe_kernels.options import Problem, Sizes
from lmoe_kernels.routing import RoutingStats
from tests.integration.test_routers import ROUTERS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DEVICE = "cuda"
EVERY = [("layer", "token"), *ROUTERS]
DTYPES = [torch.bfloat16, torch.float32]
SHAPE = (3, 33)  # of a batch: 99 tokens
Outcome = dict[str, Tensor]


def backends() -> list[str]:
    """Those that can run here."""
    problem = Problem(Sizes(1, 1, 1, 1, 1, 1), torch.bfloat16, torch.device(DEVICE, 0))
    return [name for name in BACKENDS if name != "reference" and BACKENDS[name].why_not(problem) is None]


def llama(dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """A model whose experts and gates are random.

    With lora_b ten times larger, the gradients of one step in bf16 are wrong by more than they are, on a CPU as well.
    """
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(DEVICE, dtype)
    apply_lmoe(model, "all-linear", **{"num_experts": 8, "rank": 8} | options)
    for name, parameter in model.named_parameters():
        if "lora_b" in name or "gate" in name.rsplit(".", 1)[-1]:
            nn.init.normal_(parameter, std=0.02 if "lora_b" in name else 0.2)
    return model


def batch(*, padded: bool = False) -> dict[str, Tensor]:
    ids = torch.randint(0, 256, SHAPE, device=DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    return {"input_ids": ids} | ({"attention_mask": mask} if padded else {})


def on_cpu(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy whose layers are computed one by one."""
    own = copy.deepcopy(model).cpu()
    for layer in lmoe_layers(own).values():
        layer._stacked = None
    return own if dtype == next(model.parameters()).dtype else own.to(dtype)


def clear_batch(model: nn.Module, *, padded: bool = False) -> dict[str, Tensor]:
    """A batch for which no rounding in fp32 changes which experts a token keeps, or which one is its strongest."""
    own = on_cpu(model, torch.float64).eval()
    for layer in lmoe_layers(own).values():
        layer.output_router_logits = True
    for _ in range(50):
        inputs = batch(padded=padded)
        with torch.no_grad():
            own(**{name: t.cpu() for name, t in inputs.items()})
        gaps = []
        for name, logits in collect_router_logits(own).items():
            kept = lmoe_layers(own)[name].top_k or 1
            ranked = logits.sort(dim=-1, descending=True).values
            gap = ranked[..., kept - 1] - ranked[..., kept]
            gaps.append(gap[inputs["attention_mask"].cpu() == 1].min() if padded else gap.min())
        if min(gaps) > 1e-5:
            return inputs
    raise AssertionError("no batch has clear choices")


def outcome(model: nn.Module, inputs: dict[str, Tensor]) -> Outcome:
    """The loss, the logits and all gradients of a training step."""
    inputs = {name: t.to(next(model.parameters()).device) for name, t in inputs.items()}
    labels, mask = inputs["input_ids"], inputs.get("attention_mask")
    labels = labels if mask is None else labels.masked_fill(mask == 0, -100)
    model.zero_grad()
    results = model(**inputs, labels=labels)
    results.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert gradients
    valid = results.logits[labels >= 0]  # what a padding token gives is not defined
    return {name: t.detach().cpu().double() for name, t in ({"loss": results.loss, "logits": valid} | gradients).items()}


def error(ours: Tensor, true: Tensor) -> float:
    """Relative to the truth, in the Euclidean norm."""
    return ((ours - true).norm() / true.norm()).item()


def assert_near(ours: Outcome, plain: Outcome, true: Outcome, dtype: torch.dtype) -> None:
    """The errors of a model are sums of many roundings, in another order on another device: allow four times plain's.

    In bf16 the errors of plain PyTorch are some hundredths of a gradient.
    """
    assert ours.keys() == true.keys()
    for name, t in true.items():
        allowed = 4 * error(plain[name], t) + 4 * torch.finfo(dtype).eps
        assert error(ours[name], t) <= allowed, f"{name}: {error(ours[name], t):.2e}, allowed {allowed:.2e}"


@contextmanager
def without_waiting() -> Iterator[None]:
    """Within the block, whatever waits for the GPU raises an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            torch.ones(1, device=DEVICE).item()
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("scope", "reads"), EVERY)
def test_a_training_step_with_every_router(scope: str, reads: str, dtype: torch.dtype) -> None:
    model, inputs = llama(dtype, router=scope, router_reads=reads, gate_bias=True).train(), batch(padded=True)
    true, plain = (outcome(on_cpu(model, kind), inputs) for kind in (torch.float64, dtype))
    for name in backends():
        with use_backend(name):
            assert_near(outcome(model, inputs), plain, true, dtype)


@pytest.mark.parametrize("options", [{"num_experts": 32, "top_k": 2}, {"mixing": "outputs"}, {"shared_a": True}], ids=str)
def test_a_training_step_with_options(options: dict[str, Any]) -> None:
    model = llama(**options).train()
    inputs = clear_batch(model)
    true, plain = (outcome(on_cpu(model, kind), inputs) for kind in (torch.float64, torch.float32))
    for name in backends():
        with use_backend(name):
            assert_near(outcome(model, inputs), plain, true, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("scope", "reads"), EVERY)
@torch.no_grad()
def test_steps_with_a_cache(scope: str, reads: str, dtype: torch.dtype) -> None:
    """The logits of a prefix and of one token after another are those of the whole text."""
    model, inputs = llama(dtype, router=scope, router_reads=reads).eval(), batch(padded=True)
    ids, mask = inputs.values()

    def in_steps() -> Tensor:
        logits, cache = [], None
        for start, stop in ((0, 24), *((i, i + 1) for i in range(24, SHAPE[1]))):
            part = model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True)
            logits.append(part.logits)
            cache = part.past_key_values
        return torch.cat(logits, dim=1)

    def valid(logits: Tensor) -> Outcome:
        return {"logits": logits.cpu().double()[mask.cpu() == 1]}

    true, plain = (
        valid(on_cpu(model, kind)(**{k: t.cpu() for k, t in inputs.items()}).logits) for kind in (torch.float64, dtype)
    )
    assert_near(valid(model(**inputs).logits), plain, true, dtype)
    for name in backends():
        with use_backend(name):
            assert_near(valid(in_steps()), plain, true, dtype)


@pytest.mark.parametrize(("scope", "reads"), [("layer", "token"), ("block", "prefix")])
def test_a_static_cache_gives_the_same_text(scope: str, reads: str) -> None:
    model = llama(router=scope, router_reads=reads).eval()
    ids = batch()["input_ids"][:, :9]
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    texts = [model.generate(ids, **options, **kind) for kind in ({}, {"cache_implementation": "static"})]
    assert torch.equal(*texts)


def test_compiled_with_routers_of_blocks() -> None:
    model, inputs = llama(router="block").train(), batch()
    true, plain = (outcome(on_cpu(model, kind), inputs) for kind in (torch.float64, torch.float32))
    assert_near(outcome(model, inputs), plain, true, torch.float32)
    forward = model.forward
    model.forward = torch.compile(forward)
    assert_near(outcome(model, inputs), plain, true, torch.float32)


@pytest.mark.parametrize("router", ["layer", "block"])
def test_dropout_has_the_same_mask_on_every_backend_and_in_a_checkpoint(router: str) -> None:
    model, inputs, seed = llama(dropout=0.2, router=router).train(), batch(), torch.seed() % 2**31

    def seeded(name: str) -> Outcome:
        torch.manual_seed(seed)
        with use_backend(name):
            return outcome(model, inputs)

    found = {name: seeded(name) for name in backends()}
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found |= {f"{name}, checkpointed": seeded(name) for name in backends()}
    for own in found.values():
        assert all(error(t, found["torch"][name]) < 1e-4 for name, t in own.items())
    torch.manual_seed(seed + 1)
    assert error(outcome(model, inputs)["logits"], found["torch"]["logits"]) > 1e-3, "another seed has another mask"


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 2, "choice_bias": True}, {"router": "block", "router_reads": "prefix"}, {"dropout": 0.1}],
    ids=str,
)
def test_a_training_step_with_statistics_does_not_wait(options: dict[str, Any], backend: str) -> None:
    model, inputs = llama(torch.bfloat16, **options, backend=None if backend == "auto" else backend).train(), batch()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    labels = torch.tensor([0, 1, -1], device=DEVICE)

    def step() -> None:
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if "choice_bias" in options:
            balance_experts(model)

    step()  # compiles kernels and loads them, which waits
    with RoutingStats(model, labels=["a", "b"]) as counting, without_waiting():
        for _ in range(2):
            with counting.label(labels):
                step()
    assert all(layer["tokens"] == 2 * SHAPE[0] * SHAPE[1] for layer in counting.summary().values())


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"router": "block", "router_reads": "prefix"}], ids=str)
def test_statistics_are_those_of_the_cpu(options: dict[str, Any]) -> None:
    model = llama(**options).eval()
    inputs = clear_batch(model, padded=True)

    def summary(of: nn.Module) -> dict[str, dict[str, Any]]:
        here = {name: t.to(next(of.parameters()).device) for name, t in inputs.items()}
        with torch.no_grad(), RoutingStats(of, labels=["a", "b"]) as counting:
            with counting.label("a"):
                of(**here)
            with counting.label(torch.tensor([1, 0, -1])):
                of(**here)
        return counting.summary()

    ours, true = summary(model), summary(on_cpu(model, torch.float64))
    assert ours.keys() == true.keys()
    for name, layer in true.items():
        assert _close(ours[name], layer), (name, ours[name], layer)


def _close(ours: Any, true: Any) -> bool:
    """Nested dicts and lists of numbers, to within fp32."""
    if isinstance(true, dict):
        return ours.keys() == true.keys() and all(_close(ours[key], value) for key, value in true.items())
    if isinstance(true, list):
        return len(ours) == len(true) and all(map(_close, ours, true))
    return ours == pytest.approx(true, rel=1e-3, abs=1e-3) if isinstance(true, float) else ours == true


@pytest.mark.parametrize(("scope", "reads"), [("layer", "token"), ("block", "prefix")])
def test_a_fitted_router_is_that_of_the_cpu(scope: str, reads: str) -> None:
    model = llama(router=scope, router_reads=reads, num_experts=3, expert_names=["a", "b", "c"])
    domains = {name: [torch.randint(64 * i, 64 * (i + 1), (4, 32)) for _ in range(2)] for i, name in enumerate("abc")}
    other = on_cpu(model, torch.float64)
    ours = fit_router(model, {name: [ids.to(DEVICE) for ids in some] for name, some in domains.items()}, sharpness=4.0)
    true = fit_router(other, domains, sharpness=4.0)
    assert ours.keys() == true.keys()
    for name, fit in true.items():
        assert ours[name] == pytest.approx(fit, rel=1e-2), name
    gates = {name: p for name, p in model.named_parameters() if "gate_weight" in name}
    wanted = dict(other.named_parameters())
    assert gates
    assert all(error(gate.detach().cpu().double(), wanted[name].detach()) < 1e-2 for name, gate in gates.items())


@pytest.mark.parametrize("options", [{}, {"router": "block"}], ids=str)
def test_experts_that_come_and_go(options: dict[str, Any]) -> None:
    model, inputs = llama(**options).train(), batch()
    before = outcome(model, inputs)
    add_expert(model, "new", gate_bias=-1.0)
    for layer in lmoe_layers(model).values():
        nn.init.normal_(layer.lora_b, std=0.02)
    assert all(p.device.type == DEVICE for p in model.parameters())
    true, plain = (outcome(on_cpu(model, kind), inputs) for kind in (torch.float64, torch.float32))
    for name in backends():
        with use_backend(name):
            assert_near(outcome(model, inputs), plain, true, torch.float32)
    assert error(outcome(model, inputs)["logits"], before["logits"]) > 1e-3
    remove_expert(model, "new")
    true, plain = (outcome(on_cpu(model, kind), inputs) for kind in (torch.float64, torch.float32))
    assert_near(outcome(model, inputs), plain, true, torch.float32)


def test_a_checkpoint_from_the_gpu_is_loaded_on_the_cpu_and_back(tmp_path: Any) -> None:
    model, inputs = llama(router="block", router_reads="prefix").eval(), batch()
    base = copy.deepcopy(model)
    save_lmoe(model, tmp_path)
    for parameter in base.parameters():
        if parameter.requires_grad:
            nn.init.zeros_(parameter)
    for device in ("cpu", DEVICE):
        other = copy.deepcopy(base).to(device)
        load_lmoe(other, tmp_path)
        ours, loaded = model.state_dict(), other.state_dict()
        assert ours.keys() == loaded.keys()
        assert all(torch.equal(t.cpu(), loaded[name].cpu()) for name, t in ours.items())
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, other(**inputs).logits)


def test_the_adapter_of_peft() -> None:
    peft = pytest.importorskip("peft")
    from lmoe_kernels.peft import LMoEConfig

    config = LlamaConfig(vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
    frozen, inputs = LlamaForCausalLM(config).to(DEVICE), batch()
    model = peft.get_peft_model(frozen, LMoEConfig(target_modules=["q_proj", "down_proj"], num_experts=4, r=8))
    for name, parameter in model.named_parameters():
        if "lmoe_B" in name:
            nn.init.normal_(parameter, std=0.2)
    true, plain = (outcome(copy.deepcopy(model).cpu().to(kind), inputs) for kind in (torch.float64, torch.float32))
    for name in backends():
        with use_backend(name):
            assert_near(outcome(model, inputs), plain, true, torch.float32)
