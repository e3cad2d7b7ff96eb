"""Layers of a model that are computed together: which are, when they compute alone, and what is kept for how long."""

import copy
import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lmoe_kernels import LMoELinear, apply_lmoe, disable_lmoe, lmoe_layers, load_lmoe, remove_lmoe, save_lmoe, stack
from tests.models import IDS, llama

NAMES = ("q_proj", "k_proj", "v_proj")
ALL = [*NAMES, "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The numbers of projections of the stacks that are computed during the test; few tokens count as many."""
    found: list[int] = []
    real = stack.apply

    def counted(x: Tensor, projections: list, *args, **kwargs):
        found.append(len(projections))
        return real(x, projections, *args, **kwargs)

    monkeypatch.setattr(stack, "apply", counted)
    monkeypatch.setattr(stack, "_pays", lambda x, stack: True)
    return found


class Attention(nn.Module):
    """q, k and v of one x, or k and v of another one."""

    def __init__(self, **options) -> None:
        super().__init__()
        for name, features in zip(NAMES, (12, 6, 6), strict=True):
            setattr(self, name, nn.Linear(16, features, dtype=torch.float64))
        apply_lmoe(self, NAMES, **{"num_experts": 3, "rank": 2} | options)
        for layer in lmoe_layers(self).values():
            nn.init.normal_(layer.lora_b)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        other = x if other is None else other
        return torch.cat([self.q_proj(x), self.k_proj(other), self.v_proj(other)], dim=-1)


def alone(module: nn.Module) -> nn.Module:
    """A copy whose layers compute alone."""
    other = copy.deepcopy(module)
    for layer in lmoe_layers(other).values():
        layer._stacked = None
    return other


def results(module: nn.Module, run: Callable[[nn.Module], Tensor]) -> list[Tensor]:
    module.zero_grad()
    y = run(module)
    if y.requires_grad:
        y.square().sum().backward()
    return [y.detach(), *(p.grad for p in module.parameters() if p.grad is not None)]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, 16, dtype=torch.float64)


def assert_as_alone(module: nn.Module, run: Callable[[nn.Module], Tensor]) -> None:
    torch.testing.assert_close(results(module, run), results(alone(module), run))


@pytest.mark.parametrize(
    "options", [{}, {"router": "group"}, {"router": "block"}, {"top_k": 1, "renormalize": False}], ids=str
)
def test_a_llama(options: dict, sizes: list[int]) -> None:
    model = llama()
    apply_lmoe(model, ALL, num_experts=3, rank=2, output_router_logits=True, **options)
    for layer in lmoe_layers(model).values():
        nn.init.normal_(layer.lora_b)

    def run(model: nn.Module) -> Tensor:
        y = model(IDS).logits
        kept = [layer.router_logits for layer in lmoe_layers(model).values()]
        return torch.cat([y.flatten(), *(logits.flatten() for logits in kept)])

    wanted = results(alone(model), run)
    assert sizes == []
    torch.testing.assert_close(results(model, run), wanted)
    assert sizes == [3, 2, 3, 2]


def test_some_of_the_layers_of_a_group(sizes: list[int]) -> None:
    model = llama()
    apply_lmoe(model, ["q_proj", "v_proj", "up_proj"], num_experts=3, rank=2)
    model(IDS)
    assert sizes == [2, 2]


def test_off(sizes: list[int]) -> None:
    module = Attention(stack=False)
    module(draw(4))
    assert sizes == []
    with pytest.raises(TypeError, match="apply_lmoe: stack must be a bool, got str"):
        apply_lmoe(llama(), "q_proj", stack="no")  # pyright: ignore[reportArgumentType]


def test_a_loaded_model(sizes: list[int], tmp_path) -> None:
    module = Attention()
    save_lmoe(module, tmp_path)
    plain = copy.deepcopy(module)
    remove_lmoe(plain)
    load_lmoe(plain, tmp_path)
    x = draw(4)
    torch.testing.assert_close(plain(x), module(x))
    assert sizes == [3, 3]
    remove_lmoe(plain)
    load_lmoe(plain, tmp_path, stack=False)
    plain(x)
    assert sizes == [3, 3]


@pytest.mark.parametrize("name", ["encoder_attn", "EncDecAttention", "crossattention"])
def test_cross_attention_is_no_group(name: str, sizes: list[int]) -> None:
    parts = nn.ModuleDict({part: nn.Linear(16, 16, dtype=torch.float64) for part in NAMES})
    model = nn.ModuleDict({name: nn.ModuleDict({"self": parts})})
    apply_lmoe(model, NAMES, num_experts=3, rank=2)
    x = draw(4)
    for part in NAMES:
        parts[part](x)
    assert sizes == []


@pytest.mark.parametrize("checkpointed", ["reentrant", "not reentrant"])
def test_activation_checkpointing_of_a_block(checkpointed: str, sizes: list[int]) -> None:
    reentrant = checkpointed == "reentrant"
    x = draw(2, 5).requires_grad_()
    assert_as_alone(Attention(), lambda module: checkpoint(module, x, use_reentrant=reentrant))
    assert sizes == [3, 3]


def _and_more(layer: nn.Module, x: Tensor) -> Tensor:
    """A part of a forward that has tensors to save even if the layer only takes its result."""
    return layer(x).tanh() * x.mean()


@pytest.mark.parametrize("checkpointed", ["reentrant", "not reentrant"])
@pytest.mark.parametrize("of", ["each", "first", "others"])
def test_activation_checkpointing_of_layers(checkpointed: str, of: str, sizes: list[int]) -> None:
    reentrant = checkpointed == "reentrant"
    x = draw(2, 5).requires_grad_()

    def run(module: nn.Module) -> Tensor:
        ys = []
        for i, layer in enumerate((module.q_proj, module.k_proj, module.v_proj)):
            repeats = {"each": True, "first": i == 0, "others": i > 0}[of]
            ys.append(checkpoint(_and_more, layer, x, use_reentrant=reentrant) if repeats else _and_more(layer, x))
        return torch.cat(ys, dim=-1)

    module = Attention()
    for _ in range(4):  # a group changes nothing between a forward and its repetition
        assert_as_alone(module, run)


def test_other_tensors(sizes: list[int]) -> None:
    module, x, other = Attention(), draw(4), draw(4)
    for _ in range(5):
        assert_as_alone(module, lambda module: module(x, other))
    assert sizes == [3, 3, 3]  # then the group has stopped
    module = Attention()
    for _ in range(5):
        module(x)
        module(x, other)
    assert sizes == [3, 3, 3] + [3] * 10  # never three times in a row


def test_equal_values_in_another_tensor(sizes: list[int]) -> None:
    module, x = Attention(), draw(4)
    assert_as_alone(module, lambda module: module(x, x.clone()))


def test_x_that_changes_in_place(sizes: list[int]) -> None:
    def run(module: nn.Module) -> Tensor:
        x = torch.arange(64, dtype=torch.float64).view(4, 16) / 64
        with torch.no_grad():
            first = module.q_proj(x)
            x.mul_(3)
            return torch.cat([first, module.k_proj(x), module.v_proj(x)], dim=-1)

    assert_as_alone(Attention(), run)
    assert sizes == [3]


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "values": lambda layer: layer.lora_b.detach().mul_(2),
    "bias": lambda layer: layer.frozen_layer.bias.detach().add_(1),
    "parameter": lambda layer: setattr(layer, "gate_weight", nn.Parameter(layer.gate_weight.detach() * 3)),
    "option": lambda layer: setattr(layer, "scaling", 0.5),
    "disabled": lambda layer: setattr(layer, "disabled", True),
    "frozen": lambda layer: layer.lora_a.requires_grad_(False),
    "base": lambda layer: setattr(layer, "frozen_layer", nn.Sequential(nn.Tanh(), layer.frozen_layer)),
    "hook": lambda layer: layer.frozen_layer.register_forward_hook(lambda module, args, y: y + 1),
    "logits": lambda layer: setattr(layer, "output_router_logits", True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_that_changes_between_the_calls(change: str, sizes: list[int]) -> None:
    x = draw(4).requires_grad_()

    def run(module: nn.Module) -> Tensor:
        first = module.q_proj(x)
        if not module.k_proj.__dict__.get("was_changed"):
            module.k_proj.was_changed = True
            CHANGES[change](module.k_proj)
        ys = torch.cat([first, module.k_proj(x), module.v_proj(x)], dim=-1)
        logits = module.k_proj.router_logits
        return ys if logits is None else torch.cat([ys.flatten(), logits.flatten()])

    with torch.set_grad_enabled(change != "values"):  # the backward of the first layer has saved them
        assert_as_alone(Attention(), run)
    assert sizes == [3]


@pytest.mark.parametrize("first", [torch.no_grad, torch.enable_grad])
def test_gradients_that_are_switched_between_the_calls(first: Callable, sizes: list[int]) -> None:
    x, module = draw(4), Attention()
    with first():
        module.q_proj(x)
    with torch.enable_grad() if first is torch.no_grad else torch.no_grad():
        assert module.k_proj(x).requires_grad == (first is torch.no_grad)


def test_autocast_that_begins_between_the_calls() -> None:
    module, x = Attention().float(), draw(400).float()
    module.q_proj(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert module.k_proj(x).dtype == torch.bfloat16
        q, k, v = module.q_proj(x), module.k_proj(x), module.v_proj(x)
    assert {t.dtype for t in (q, k, v)} == {torch.bfloat16}


def test_autocast_casts_x_once(sizes: list[int]) -> None:
    module, x = Attention().float(), draw(400).float().requires_grad_()

    def run(module: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return module(x)

    torch.testing.assert_close(results(module, run), results(alone(module), run), atol=0.05, rtol=0.05)
    assert sizes == [3]


def test_inference_mode(sizes: list[int]) -> None:
    """Tensors of inference mode have no version, so that a change in place would not be seen."""
    module = Attention()
    with torch.inference_mode():
        x = draw(4)
        torch.testing.assert_close(module(x), alone(module)(x))
    assert sizes == []


def test_disabled_and_removed(sizes: list[int]) -> None:
    module, x = Attention(), draw(4)
    with disable_lmoe(module):
        assert torch.equal(module.k_proj(x), module.k_proj.frozen_layer(x))
        module(x)
    module.k_proj.disabled = True
    assert_as_alone(module, lambda module: module(x))
    module.k_proj.disabled = False
    module.k_proj = module.k_proj.frozen_layer
    gc.collect()
    assert_as_alone(module, lambda module: module(x))
    assert sizes == []


def test_dropout_in_training_only(sizes: list[int]) -> None:
    module, x = Attention(dropout=0.5), draw(4)
    module(x)
    assert sizes == []
    module.eval()(x)
    assert sizes == [3]


@pytest.mark.parametrize("options", [{"shared_a": True}, {"choice_bias": True, "top_k": 2}], ids=str)
def test_options_without_stacks(options: dict, sizes: list[int]) -> None:
    Attention(**options)(draw(4))
    assert sizes == []


@pytest.mark.parametrize("name", ["lora_a", "lora_b", "gate_weight"])
def test_parameters_that_are_elsewhere(name: str, sizes: list[int]) -> None:
    """As those of another layer are under FSDP, DeepSpeed or offloading while the first layer is called."""
    module, x = Attention(), draw(4)
    wanted = module.q_proj.frozen_layer(x)
    parameter = getattr(module.v_proj, name)
    for data in (parameter.data.flatten()[:3], torch.empty(0, dtype=x.dtype), parameter.data.to("meta")):
        setattr(module.v_proj, name, nn.Parameter(data))
        assert module.q_proj(x).shape == wanted.shape
    assert sizes == []


def test_copies_are_groups_of_their_own(sizes: list[int]) -> None:
    module, x = Attention(), draw(4)
    other = copy.deepcopy(module)
    nn.init.normal_(other.k_proj.lora_b)
    assert_as_alone(other, lambda module: module(x))
    assert sizes == [3]
    one = copy.deepcopy(module.q_proj)
    torch.testing.assert_close(one(x), module.q_proj(x))
    assert sizes == [3, 3]  # the copy of one layer computes alone


def test_a_replica_is_not_in_the_group_of_its_original(sizes: list[int]) -> None:
    module, x = Attention(), draw(4)
    for replica in (module.q_proj._replicate_for_data_parallel(), copy.copy(module.q_proj)):
        replica._parameters = {"gate_bias": None}
        for name in ("lora_a", "lora_b", "gate_weight"):
            setattr(replica, name, nn.Parameter(torch.randn_like(getattr(module.q_proj, name))))
        torch.testing.assert_close(replica(x), alone(replica)(x))
    assert sizes == []
    module(x)
    assert sizes == [3]


def test_nothing_is_kept_after_the_last_call(sizes: list[int]) -> None:
    module, x = Attention(), draw(4)
    module(x)
    group, _ = module.q_proj._stacked
    assert group._kept is None
    kept = weakref.ref(x)
    del x
    assert kept() is None


def test_what_is_not_taken_goes_with_x_or_with_the_next_call(sizes: list[int]) -> None:
    module, x = Attention(), draw(4)
    group, _ = module.q_proj._stacked
    with torch.no_grad():
        module.q_proj(x)
    k = weakref.ref(group._kept.results[1][0])
    assert k() is not None
    del x
    gc.collect()
    assert k() is None
    x = draw(4).requires_grad_()
    module.q_proj(x)
    k = weakref.ref(group._kept.results[1][0])
    module(draw(4))
    gc.collect()
    assert k() is None


def test_hooks_of_layers_run(sizes: list[int]) -> None:
    module, x, seen = Attention(), draw(4), []
    module.k_proj.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    module.v_proj.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    assert_as_alone(module, lambda module: module(x))
    assert len(seen) == 2


def test_frozen_layers_of_a_group(sizes: list[int]) -> None:
    module, x = Attention(), draw(4)
    module.k_proj.requires_grad_(False)
    assert_as_alone(module, lambda module: module(x))
    assert sizes == [3]
    assert all(p.grad is None for p in module.k_proj.parameters())


def test_torch_compile_computes_the_layers_separately(sizes: list[int]) -> None:
    module, x = Attention(), draw(400)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), alone(module)(x))
    assert sizes == []


def test_generate(sizes: list[int]) -> None:
    model = llama()
    apply_lmoe(model, ALL, num_experts=3, rank=2)
    for layer in lmoe_layers(model).values():
        nn.init.normal_(layer.lora_b)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS, **options), alone(model).generate(IDS, **options))
    assert sizes == [3, 2, 3, 2] * 3


def test_a_layer_in_two_models_is_correct(sizes: list[int]) -> None:
    module, x = Attention(), draw(4)
    other = Attention()
    other.k_proj = module.k_proj
    assert isinstance(other.k_proj, LMoELinear)
    assert_as_alone(other, lambda module: module(x))
