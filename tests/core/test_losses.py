"""Losses on router logits: on given tensors, on a model's layers, with masks."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmoe_kernels import (
    apply_lmoe,
    auxiliary_loss,
    balance_loss,
    collect_router_logits,
    lmoe_layers,
    router_z_loss,
)
from tests.models import IDS, llama, with_experts
from tools.error_rule import assert_no_worse


def test_router_logits_carry_the_losses_gradient() -> None:
    model = with_experts(llama(), output_router_logits=True)
    assert collect_router_logits(model) == {}
    model(IDS)
    logits = collect_router_logits(model)
    assert list(logits) == list(lmoe_layers(model))
    (balance_loss(logits.values()) + router_z_loss(logits.values())).backward()
    assert all(layer.gate_weight.grad is not None for layer in lmoe_layers(model).values())


def test_balance_loss() -> None:
    even = torch.eye(4, dtype=torch.float64).repeat(3, 1) * 50
    torch.testing.assert_close(balance_loss(even), torch.ones((), dtype=torch.float64))
    collapsed = torch.zeros(12, 4, dtype=torch.float64)
    collapsed[:, 2] = 50
    torch.testing.assert_close(balance_loss(collapsed), torch.full((), 4.0, dtype=torch.float64))
    logits = torch.randn(5, 6, 4, dtype=torch.float64)
    best = logits.view(-1, 4).topk(2).indices
    chosen = torch.tensor([(best == e).sum() for e in range(4)]) / (2 * 30)
    expected = 4 * (chosen * logits.view(-1, 4).softmax(-1).mean(0)).sum()
    torch.testing.assert_close(balance_loss(logits, top_k=2), expected)
    mask = torch.rand(5, 6) > 0.4
    torch.testing.assert_close(balance_loss(logits, mask=mask), balance_loss(logits[mask]))
    torch.testing.assert_close(balance_loss([logits, even]), (balance_loss(logits) + balance_loss(even)) / 2)
    assert torch.autograd.gradcheck(balance_loss, logits[0].clone().requires_grad_())


def test_router_z_loss() -> None:
    logits = torch.randn(7, 3, dtype=torch.float64)
    torch.testing.assert_close(router_z_loss(logits), logits.exp().sum(-1).log().square().mean())
    mask = torch.arange(7) < 4
    torch.testing.assert_close(router_z_loss(logits, mask), router_z_loss(logits[:4]))


@pytest.mark.parametrize("loss", [balance_loss, router_z_loss])
def test_losses_are_in_fp32_under_autocast(loss) -> None:
    logits = torch.randn(70, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(logits)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, loss(logits))


NESTED = torch.nested.nested_tensor([torch.zeros(2, 3)], layout=torch.jagged)
LOSSES = pytest.mark.parametrize("loss", [balance_loss, router_z_loss])
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def value_and_gradient(loss, logits: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    value = loss(leaf, mask=mask)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


@LOSSES
@HALF
def test_losses_of_half_precision_logits_have_the_error_of_fp32(loss, dtype: torch.dtype) -> None:
    logits = (torch.randn(257, 5) * 3).to(dtype)
    ours, true = loss(logits), loss(logits.double())
    orders = [torch.randperm(257) for _ in range(8)]
    plain = [loss(logits.float()[order]) for order in orders]
    assert ours.dtype == torch.float32
    assert_no_worse("loss", ours, plain, true)
    gradient, of_truth = value_and_gradient(loss, logits)[1], value_and_gradient(loss, logits.double())[1]
    assert_no_worse("gradient", gradient, [value_and_gradient(loss, logits.float())[1].to(dtype)], of_truth)


@LOSSES
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_the_logits_of_masked_tokens_change_nothing(loss, poison: float) -> None:
    logits, mask = torch.randn(3, 6, 4), torch.rand(3, 6) > 0.4
    mask[0, 0], mask[0, 1] = True, False
    for weights in (mask, mask.long(), mask.half()):
        expected, expected_gradient = value_and_gradient(loss, logits, weights)
        poisoned = logits.masked_fill(~mask[..., None], poison)
        value, gradient = value_and_gradient(loss, poisoned, weights)
        assert torch.equal(value, expected)
        assert torch.equal(gradient, expected_gradient)
        assert not gradient[~mask].any()
        torch.testing.assert_close(value, loss(logits[mask]))
    assert loss(poisoned).isnan() or loss(poisoned).isinf() or poison == -float("inf")


@LOSSES
def test_a_mask_of_weights(loss) -> None:
    """A token of weight 3 counts as three tokens; the scale of all weights does not matter."""
    logits, counts = torch.randn(9, 4, dtype=torch.float64), torch.arange(9) % 4
    expected = loss(logits.repeat_interleave(counts, dim=0))
    for scale in (1.0, 1e-20, 1e20):
        torch.testing.assert_close(loss(logits, mask=counts.double() * scale), expected)


@LOSSES
@pytest.mark.parametrize("tokens", [0, 5])
def test_the_loss_is_zero_if_no_token_counts(loss, tokens: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for mask in (torch.zeros(tokens, dtype=torch.bool), torch.zeros(tokens), None):
            if mask is None and tokens:
                continue
            value, gradient = value_and_gradient(loss, torch.randn(tokens, 4).to(dtype), mask)
            assert value == 0
            assert torch.equal(gradient, torch.zeros(tokens, 4).to(dtype))


@LOSSES
def test_losses_over_layers_on_several_devices(loss) -> None:
    """The layers of a model may be spread over GPUs; the meta device is the second device here."""
    assert loss([torch.empty(7, 3, device="meta"), torch.randn(7, 3)]).device.type == "meta"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (([],), "router_logits must be a tensor (..., E) or several, got none (is output_router_logits set?)"),
        (([1.0],), "router_logits must be a tensor (..., E) or several, got ['float']"),
        (({"q_proj": torch.zeros(2, 3)},), "router_logits must be a tensor (..., E) or several, got dict"),
        ((None,), "router_logits must be a tensor (..., E) or several, got NoneType"),
        ((torch.zeros(2, 3), 1, [1, 1]), "mask must be a torch.Tensor, got list"),
        ((torch.zeros(2, 3), 4), "top_k must be in 1 .. E = 3, got 4"),
        ((torch.zeros(2, 3), 1, torch.ones(3)), "mask must have the tokens' shape (2,), got (3,)"),
        ((torch.zeros(2, 3), 1, torch.tensor([1, -1])), "mask must be at least 0 for every token, got -1"),
        ((torch.zeros(2, 3), 1, torch.tensor([0.0, -torch.inf])), "mask must be at least 0 for every token, got -inf"),
        ((torch.zeros(2, 3), 1, torch.ones(2, device="meta")), "mask must have data, got one on the meta device"),
        (
            (torch.zeros(2, 3), 1, torch.ones(2).to_sparse()),
            "mask must be a dense tensor, got one of layout torch.sparse_coo",
        ),
        ((torch.zeros(2, 0),), "router_logits must have shape (..., E) with E >= 1, got (2, 0)"),
        ((torch.zeros(2, 3).to_sparse(),), "router_logits must be a dense tensor, got one of layout torch.sparse_coo"),
        (
            (torch.nested.nested_tensor([torch.zeros(2, 3)], layout=torch.jagged),),
            "router_logits must be a dense tensor, got a nested one",
        ),
    ],
)
def test_bad_input_of_the_losses(arguments: tuple, text: str) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        balance_loss(*arguments)
    assert str(caught.value) == f"balance_loss: {text}"


@LOSSES
@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn], ids=str)
def test_dtypes_without_an_order_are_refused(loss, dtype: torch.dtype) -> None:
    for argument, tensors in (
        ("router_logits", (torch.ones(2, 3).to(dtype), None)),
        ("mask", (torch.ones(2, 3), torch.ones(2).to(dtype))),
    ):
        with pytest.raises(TypeError, match=rf"{loss.__name__}: {argument} must have one of the dtypes .*, got {dtype}"):
            loss(tensors[0], mask=tensors[1])
    with pytest.raises(TypeError, match=r"router_logits must have one of the dtypes .*, got torch.int64"):
        loss(torch.ones(2, 3, dtype=torch.int64))


def test_trains_under_gradient_checkpointing() -> None:
    model = with_experts(llama(), output_router_logits=True).train()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.zero_grad()
        loss = F.cross_entropy(model(IDS[:, :-1]).logits.flatten(0, 1), IDS[:, 1:].flatten())
        (loss + balance_loss(collect_router_logits(model).values())).backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def expected_loss(model: nn.Module, balance: float, z: float, mask: Tensor | None = None) -> Tensor:
    layers = lmoe_layers(model)
    losses = [
        balance * balance_loss(logits, layers[name].top_k or 1, mask) + z * router_z_loss(logits, mask)
        for name, logits in collect_router_logits(model).items()
    ]
    return torch.stack(losses).mean()


def test_the_loss_of_a_model() -> None:
    model = llama()
    apply_lmoe(model, "q_proj", num_experts=3, rank=2, output_router_logits=True)
    apply_lmoe(model, "down_proj", num_experts=5, rank=2, top_k=2, output_router_logits=True)
    apply_lmoe(model, "v_proj", num_experts=5, rank=2)
    mask = torch.arange(12) < torch.tensor([[7], [12]])
    model(IDS)
    assert torch.equal(auxiliary_loss(model), expected_loss(model, 0.01, 0.0))
    loss = auxiliary_loss(model, balance=0.3, z=0.2, mask=mask)
    assert torch.equal(loss, expected_loss(model, 0.3, 0.2, mask))
    assert torch.equal(loss, auxiliary_loss(model, balance=0.3, z=0.2, mask=lambda name: mask))
    assert loss != auxiliary_loss(model, balance=0.3, z=0.2)
    loss.backward()
    assert all(layer.gate_weight.grad is not None for layer in lmoe_layers(model).values() if layer.output_router_logits)
    assert auxiliary_loss(model, balance=0) == 0


class Flat(nn.Module):
    """Flattens a batch into one row of tokens, as the feed-forward layers of some models do."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(0, 1)).view_as(x)


def test_a_layer_that_sees_all_tokens_in_one_row() -> None:
    model, mask = Flat(), torch.rand(3, 5) > 0.4
    mask[0, 0] = True
    apply_lmoe(model, "fc", num_experts=3, rank=2, output_router_logits=True)
    model(torch.randn(3, 5, 4))
    assert torch.equal(auxiliary_loss(model, mask=mask), expected_loss(model, 0.01, 0.0, mask.flatten()))
    with pytest.raises(
        ValueError, match=r"auxiliary_loss: mask must have the shape \(15,\) of the tokens that 'fc' processes"
    ):
        auxiliary_loss(model, mask=mask.t()[:4])


class EncoderDecoder(nn.Module):
    """An encoder, a decoder with cross-attention, and a head whose name belongs to neither."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"fc": nn.Linear(4, 4)})
        self.decoder = nn.ModuleDict({"fc": nn.Linear(4, 4), "encoder_attn": nn.ModuleDict({"k_proj": nn.Linear(4, 4)})})
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        seen = self.decoder["encoder_attn"]["k_proj"](self.encoder["fc"](x)).sum(1, keepdim=True)
        return self.head(self.decoder["fc"](y) + seen)


@pytest.mark.parametrize("of_decoder", [5, 3], ids=["of one length", "shorter"])
def test_masks_of_an_encoder_and_a_decoder(of_decoder: int) -> None:
    model = EncoderDecoder()
    targets = ["fc", "k_proj"] if of_decoder == 5 else "all-linear"  # the head's mask is found by the shape of its tokens
    apply_lmoe(model, targets, num_experts=3, rank=2, output_router_logits=True)
    mask, other = torch.arange(5) < torch.tensor([[3], [5]]), torch.arange(of_decoder) < torch.tensor([[2], [1]])
    model(torch.randn(2, 5, 4), torch.randn(2, of_decoder, 4))
    logits = list(collect_router_logits(model).values())
    seen = (mask, other, mask, other)[: len(logits)]
    expected = torch.stack([balance_loss(part, mask=m) for part, m in zip(logits, seen, strict=True)]).mean()
    torch.testing.assert_close(auxiliary_loss(model, balance=1, mask={"encoder": mask, "decoder": other}), expected)
    if of_decoder == 5:
        seen = (mask, None, mask)
        expected = torch.stack([balance_loss(part, mask=m) for part, m in zip(logits, seen, strict=True)]).mean()
        torch.testing.assert_close(auxiliary_loss(model, balance=1, mask={"encoder": mask, "decoder": None}), expected)


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (torch.ones(2, 5), "be {'encoder': ..., 'decoder': ...} for a model that has both, or a function of a layer's name, "
         "got one tensor"),
        ({"encoder": torch.ones(2, 5), "decoder": torch.ones(2, 5)},
         "be a function of a layer's name if the name of a layer (here 'head') does not show its tokens, "
         "got two masks that fit"),
        ({"encoder": torch.ones(2, 4), "decoder": torch.ones(2, 5)},
         "have the shape (2, 5) of the tokens that 'encoder.fc' processes, got (2, 4)"),
        ({"encoder": torch.ones(2, 5)}, "have the keys ['encoder', 'decoder'], got ['encoder']"),
        (lambda name: 1, "have the shape (2, 5) of the tokens that 'encoder.fc' processes, got int"),
        (5, "be a tensor, {'encoder': ..., 'decoder': ...} or a function of a layer's name, got int"),
    ],
)  # fmt: skip
def test_masks_that_do_not_fit_are_refused(mask, text: str) -> None:
    model = EncoderDecoder()
    apply_lmoe(model, "all-linear", num_experts=3, rank=2, output_router_logits=True)
    model(torch.randn(2, 5, 4), torch.randn(2, 5, 4))
    with pytest.raises((ValueError, TypeError)) as caught:
        auxiliary_loss(model, mask=mask)
    assert str(caught.value) == f"auxiliary_loss: mask must {text}"


def test_bad_weights_and_no_router_logits() -> None:
    model = with_experts(llama())
    model(IDS)
    with pytest.raises(ValueError, match=r"have kept router logits in its last forward, got none \(is output_router_logits"):
        auxiliary_loss(model)
    for name, weight in (("balance", float("nan")), ("z", -0.1)):
        with pytest.raises(ValueError, match=rf"auxiliary_loss: {name} must be a number of at least 0, got {weight}"):
            auxiliary_loss(model, **{name: weight})


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_router_logits_without_a_graph_give_a_warning(use_reentrant: bool) -> None:
    model = with_experts(llama(), output_router_logits=True).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            loss = model(IDS, labels=IDS).loss
            collect_router_logits(model)
            loss.backward()
        with torch.no_grad():
            model(IDS)
            collect_router_logits(model)
        model.eval()
        with torch.no_grad():
            model(IDS)
        collect_router_logits(model)
        for layer in lmoe_layers(model).values():
            layer.requires_grad_(False)
        model.train()
        with torch.no_grad():
            model(IDS)
        collect_router_logits(model)
    warned = [warning for warning in caught if "pass use_reentrant=False" in str(warning.message)]
    assert [(warning.filename, warning.category) for warning in warned] == [(__file__, UserWarning)] * use_reentrant
