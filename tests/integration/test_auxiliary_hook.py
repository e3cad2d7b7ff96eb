"""The losses of an adapter's coefficients: in the loss of the model, with the weight of the micro-batch's label tokens."""

import copy
import warnings
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaForCausalLM, Trainer

from lmoe_kernels import (
    add_auxiliary_loss,
    apply_lmoe,
    auxiliary_loss,
    balance_loss,
    collect_router_logits,
    disable_lmoe,
    router_z_loss,
)
from lmoe_kernels.auxiliary_hook import install
from tests.models import llama, with_experts
from tests.processes import on_two_processes
from tests.training import Recorder, WithoutLossArguments, arguments, replica, rows, summed_loss, t5

BALANCE, Z = WEIGHTS = (3.0, 0.5)  # large compared with the model's loss, so that counting twice shows
CLOSE = {"rtol": 1e-4, "atol": 1e-7}  # the model's norms and its loss compute in fp32


def ready(model: nn.Module, weights: tuple[float, float] = WEIGHTS) -> nn.Module:
    model = with_experts(model, output_router_logits=True)
    install(model, lambda adapter: {"default": weights}[adapter])
    return model


def step(model: nn.Module, folder: Path, weights: tuple[float, float], **options) -> tuple[Trainer, Recorder]:
    """One optimizer step with these coefficients."""
    data, func = options.pop("data"), options.pop("compute_loss_func", None)
    install(getattr(model, "get_base_model", lambda: model)(), lambda adapter: weights)
    recorder = Recorder(model)
    trainer = Trainer(model, arguments(folder, **options), train_dataset=data, callbacks=[recorder], compute_loss_func=func)
    trainer.train()
    recorder.hook.remove()
    return trainer, recorder


def auxiliary(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss of one batch by its definition."""
    model(**{name: tensor for name, tensor in batch.items() if name != "num_items_in_batch"})
    logits, mask = collect_router_logits(model).values(), batch["attention_mask"]
    return BALANCE * balance_loss(logits, mask=mask) + Z * router_z_loss(logits, mask)


def label_tokens(batch: dict[str, Tensor]) -> int:
    """How many labels the causal loss counts: the first token of a sequence is the label of no token."""
    return int((batch["labels"][:, 1:] != -100).sum())


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_added(model: nn.Module, both: Recorder, alone: Recorder, shares: list[float]) -> None:
    """Compare the gradients of two steps, with and without coefficients, with those of the shares of the batches' losses."""
    model.train()
    total = torch.stack([share * auxiliary(model, batch) for share, batch in zip(shares, both.batches, strict=True)]).sum()
    expected = gradients(model, total)
    assert any(gradient.abs().max() > 1e-3 for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(both.gradients[name] - alone.gradients[name], gradient, **CLOSE)


def unequal(count: int) -> list[dict[str, Tensor]]:
    """Rows of which each has a label for another number of tokens."""
    data = rows(count)
    for number, row in enumerate(data):
        row["labels"] = row["labels"].where(torch.arange(8) < max(2, 8 - number), -100)
    return data


@pytest.mark.parametrize("accumulated", [1, 3])
def test_logged_losses_are_those_of_the_definition(accumulated: int, tmp_path: Path) -> None:
    model, data = ready(llama()), unequal(4 * accumulated)
    trainer, recorder = step(
        model, tmp_path, WEIGHTS, data=data, gradient_accumulation_steps=accumulated, max_steps=2, learning_rate=0.0
    )
    logged = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert len(logged) == 2
    assert len(recorder.batches) == 2 * accumulated
    for number, loss in enumerate(logged):
        batches = recorder.batches[number * accumulated : (number + 1) * accumulated]
        total, expected = sum(map(label_tokens, batches)), 0.0
        for batch in batches:
            model.eval()
            with torch.no_grad():
                logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
                cross_entropy = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
                expected += (cross_entropy + label_tokens(batch) * auxiliary(model, batch)).item() / total
        assert abs(loss - expected) < 1e-4 * abs(expected)


CASES = {
    "of one micro-batch": {"steps": 1},
    "accumulated": {},
    "checkpointing": {"activation_checkpointing": True},
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
}


@pytest.mark.parametrize("case", CASES)
def test_the_weight_is_the_share_of_label_tokens(case: str, tmp_path: Path) -> None:
    options = {"steps": 4, **CASES[case]}
    steps = options.pop("steps")
    model = ready(llama())
    options |= {"gradient_accumulation_steps": steps, "data": unequal(2 * steps)}
    _, alone = step(model, tmp_path, (0.0, 0.0), **copy.copy(options))
    _, both = step(model, tmp_path, WEIGHTS, **options)
    if options.get("activation_checkpointing"):
        model.activation_checkpointing_disable()
    tokens = [label_tokens(batch) for batch in both.batches]
    assert steps == 1 or len(set(tokens)) > 1
    assert_added(model, both, alone, [count / sum(tokens) for count in tokens])


def test_trainer_divides_the_loss_of_models_that_get_no_number_of_items(tmp_path: Path) -> None:
    model, options = ready(llama(WithoutLossArguments)), {"gradient_accumulation_steps": 4, "data": unequal(8)}
    _, alone = step(model, tmp_path, (0.0, 0.0), **copy.copy(options))
    _, both = step(model, tmp_path, WEIGHTS, **options)
    assert_added(model, both, alone, [1 / 4] * 4)


def _step_of_one_process(rank: int, folder: Path) -> None:
    model = ready(llama())
    for average in (True, False):
        options = {"average_tokens_across_devices": average, "gradient_accumulation_steps": 2, "ddp_backend": "gloo"}
        options["data"] = unequal(8)
        _, alone = step(model, folder, (0.0, 0.0), **copy.copy(options))
        _, both = step(model, folder, WEIGHTS, **options)
        batches: list = [None, None]
        torch.distributed.all_gather_object(batches, both.batches)
        total = sum(label_tokens(batch) for part in batches for batch in part)
        assert len(both.batches) == 2
        per_process = [total, total] if average else [2 * sum(map(label_tokens, part)) for part in batches]
        shares = [label_tokens(batch) / per_process[number] for number, part in enumerate(batches) for batch in part]
        assert abs(sum(shares) - 1) < 1e-12
        both.batches = batches[0] + batches[1]
        assert_added(model, both, alone, shares)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed package")
def test_the_weights_of_two_processes_sum_to_one(tmp_path: Path) -> None:
    on_two_processes(_step_of_one_process, tmp_path)


def batch_of(data: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in data]) for name in data[0]}


def test_replicas_of_data_parallel_add_their_shares() -> None:
    """DataParallel gives each replica the number of all items in a dimension more."""
    model, data = ready(llama()).train(), unequal(4)
    batches = [batch_of(data[:2]), batch_of(data[2:])]
    total = torch.tensor([sum(map(label_tokens, batches))])
    loss = torch.stack([replica(model)(**batch, num_items_in_batch=total).loss for batch in batches]).sum()
    both = gradients(model, loss)
    install(model, lambda adapter: (0.0, 0.0))
    loss = torch.stack([model(**batch, num_items_in_batch=total).loss for batch in batches]).sum()
    alone = gradients(model, loss)
    expected = gradients(model, sum(label_tokens(batch) / total.sum() * auxiliary(model, batch) for batch in batches))
    for name, gradient in expected.items():
        torch.testing.assert_close(both[name] - alone[name], gradient, **CLOSE)


@pytest.mark.parametrize("form", ["output", "tuple", "shift_labels", "an int"])
def test_every_form_of_the_loss(form: str) -> None:
    model, data = ready(llama()).train(), unequal(3)
    batch, extra, share = batch_of(data), {}, 1.0
    if form == "tuple":
        extra["return_dict"] = False
    if form == "shift_labels":
        batch["shift_labels"] = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:].where(torch.arange(8) < 5, -100)
        extra["num_items_in_batch"] = torch.tensor(50)
        share = int((batch["shift_labels"] != -100).sum()) / 50
    if form == "an int":
        extra["num_items_in_batch"], share = 40, label_tokens(batch) / 40
    both = model(**batch, **extra)[0]
    assert both.dtype is torch.float32
    assert both.dim() == 0
    expected = share * auxiliary(model, batch)
    install(model, lambda adapter: (0.0, 0.0))
    alone = model(**batch, **extra)[0]
    torch.testing.assert_close(both - alone, expected.float(), rtol=1e-5, atol=1e-5)


def test_a_classifier_has_one_label_a_sequence(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # fmt: skip
    model = BertForSequenceClassification(config).double()
    apply_lmoe(model, ["query", "dense"], num_experts=3, rank=2, output_router_logits=True)
    data = [{**row, "labels": torch.randint(0, 2, ())} for row in rows(5)]
    options = {"gradient_accumulation_steps": 3, "data": data, "num_train_epochs": 1, "max_steps": -1}
    torch.manual_seed(seed := torch.seed() % 2**31)
    _, alone = step(model, tmp_path, (0.0, 0.0), **copy.copy(options), seed=seed)
    _, both = step(model, tmp_path, WEIGHTS, **options, seed=seed)
    assert [len(batch["labels"]) for batch in both.batches] == [2, 2, 1]
    model.train()

    def loss(batch: dict[str, Tensor]) -> Tensor:
        model(**{name: batch[name] for name in ("input_ids", "attention_mask")})
        kept = collect_router_logits(model)
        return sum(
            BALANCE * balance_loss(of, mask=m) + Z * router_z_loss(of, m)
            for name, of in kept.items()
            for m in [batch["attention_mask"] if of.shape[:-1] == batch["attention_mask"].shape else None]
        ) / len(kept)

    expected = gradients(model, sum(len(batch["labels"]) / 5 * loss(batch) for batch in both.batches))
    for name, gradient in expected.items():
        torch.testing.assert_close(both.gradients[name] - alone.gradients[name], gradient, **CLOSE)


def test_an_encoder_decoder_model_shifts_no_labels(tmp_path: Path) -> None:
    model, data = t5(output_router_logits=True), rows(8)
    for row in data:
        target = torch.randint(1, 32, (6,))
        row["labels"] = target.where(torch.arange(6) < torch.randint(2, 6, ()), -100)
    options = {"gradient_accumulation_steps": 2, "data": data, "per_device_train_batch_size": 4}
    _, alone = step(model, tmp_path, (0.0, 0.0), **copy.copy(options))
    _, both = step(model, tmp_path, WEIGHTS, **options)
    of_replica = {**both.batches[0], "num_items_in_batch": torch.tensor([9])}
    assert model.train()(**of_replica).loss.dim() == 0
    install(model, lambda adapter: (0.0, 0.0))
    counts = [int((batch["labels"] != -100).sum()) for batch in both.batches]
    losses = []
    for batch, count in zip(both.batches, counts, strict=True):
        model.train()(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")})
        masks = {"encoder": batch["attention_mask"], "decoder": batch["labels"] != -100}
        losses.append(count / sum(counts) * auxiliary_loss(model, balance=BALANCE, z=Z, mask=masks))
    for name, gradient in gradients(model, sum(losses)).items():
        torch.testing.assert_close(both.gradients[name] - alone.gradients[name], gradient, **CLOSE)


def test_evaluation_and_generation_add_no_loss(tmp_path: Path) -> None:
    model, data = ready(llama(), (100.0, 0.0)), rows(6)
    with disable_lmoe(model), torch.no_grad():
        model.train()(**batch_of(data))  # no layer keeps router logits
    trainer = Trainer(model, arguments(tmp_path, eval_strategy="steps", eval_steps=1), train_dataset=data, eval_dataset=data)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    logs = trainer.state.log_history
    assert [log["eval_loss"] for log in logs if "eval_loss" in log] == [before]
    assert next(log["loss"] for log in logs if "loss" in log) > before + 50
    install(model, lambda adapter: (0.0, 0.0))
    assert trainer.evaluate()["eval_loss"] == before
    install(model, lambda adapter: WEIGHTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.eval().generate(data[0]["input_ids"][None, :3], attention_mask=torch.ones(1, 3), max_new_tokens=2,
                              pad_token_id=0)  # fmt: skip
        with torch.no_grad():
            model.train()(data[0]["input_ids"][None])


@pytest.mark.parametrize(
    "options", [{"compute_loss_func": summed_loss}, {"label_smoothing_factor": 0.1}], ids=lambda options: next(iter(options))
)
def test_a_loop_that_ignores_the_loss_gets_one_warning(options: dict, tmp_path: Path) -> None:
    model, data = ready(llama()), unequal(8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step(model, tmp_path, WEIGHTS, data=data, max_steps=4, **options)
    warned = [str(warning.message) for warning in caught if "router_aux_loss_coef" in str(warning.message)]
    assert len(warned) == 1
    assert "call add_auxiliary_loss(trainer), or add auxiliary_loss(model) to your loss" in warned[0]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_reentrant_checkpointing_warns(use_reentrant: bool, tmp_path: Path) -> None:
    kwargs = {"use_reentrant": use_reentrant}
    model = ready(llama())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        step(model, tmp_path, WEIGHTS, data=rows(8), max_steps=3, activation_checkpointing=True,
             activation_checkpointing_kwargs=kwargs)  # fmt: skip
    warned = [str(warning.message) for warning in caught if "router logits" in str(warning.message)]
    assert len(warned) == (1 if use_reentrant else 0)


def test_under_peft_and_in_a_copy(tmp_path: Path) -> None:
    """PEFT's own wrapper calls the transformers model, whose hook adds the loss; a copy has a hook of its own."""
    model = ready(llama())
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["v_proj"], lora_dropout=0.0))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    batch = batch_of(rows(2))
    loss = copy.deepcopy(wrapped).train()(**batch).loss
    torch.testing.assert_close(loss, wrapped.train()(**batch).loss)
    install(model, lambda adapter: (0.0, 0.0))
    alone = wrapped(**batch).loss
    torch.testing.assert_close(loss - alone, auxiliary(wrapped, batch).float(), rtol=1e-5, atol=1e-5)


def test_a_second_installation_replaces_the_first() -> None:
    model, batch = ready(llama()).train(), batch_of(rows(2))
    once = model(**batch).loss
    install(model, lambda adapter: WEIGHTS)
    assert len(model._forward_hooks) == 1
    assert torch.equal(model(**batch).loss, once)


def test_the_graph_has_no_breaks() -> None:
    model, batch = ready(llama()).train(), batch_of(rows(2))
    eager = model(**batch).loss
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**batch).loss, eager, **CLOSE)


def test_coefficients_and_add_auxiliary_loss_exclude_each_other(tmp_path: Path) -> None:
    model: LlamaForCausalLM = ready(llama())
    trainer = Trainer(model, arguments(tmp_path), train_dataset=rows(2))
    with pytest.raises(ValueError) as caught:
        add_auxiliary_loss(trainer)
    assert str(caught.value) == (
        "add_auxiliary_loss: model must have no auxiliary losses of its own, got coefficients of the adapter 'default', "
        "which add them: set these to 0"
    )
    install(model, lambda adapter: (0.0, 0.0))
    add_auxiliary_loss(trainer).remove()
