"""The auxiliary loss under transformers' Trainer: added once a step, in training alone, on the tokens of the mask."""

import copy
import warnings
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, Trainer

from lmoe_kernels import (
    add_auxiliary_loss,
    balance_loss,
    collect_router_logits,
    disable_lmoe,
    lmoe_layers,
    router_z_loss,
)
from tests.models import llama, with_experts
from tests.processes import on_two_processes
from tests.training import Recorder, WithoutLossArguments, arguments, replica, rows, summed_loss, t5

WEIGHTS = {"balance": 3.0, "z": 0.5}  # large compared with the model's loss, so that counting twice shows


def gradients_of_a_step(model: nn.Module, folder: Path, added: bool, trainer_class=Trainer, **options):
    """The gradients of one step of the optimizer, and the batches that it saw."""
    data = rows(16) if "data" not in options else options.pop("data")
    func = options.pop("compute_loss_func", None)
    recorder = Recorder(model)
    trainer = trainer_class(
        model, arguments(folder, **options), train_dataset=data, callbacks=[recorder], compute_loss_func=func
    )
    handle = add_auxiliary_loss(trainer, **WEIGHTS) if added else None
    trainer.train()
    if handle is not None:
        handle.remove()
    recorder.hook.remove()
    return recorder.gradients, recorder.batches


def expected_gradients(model: nn.Module, batches: list[dict]) -> dict[str, Tensor]:
    """The gradients of the auxiliary loss, averaged over the batches."""
    model.train().zero_grad()
    for batch in batches:
        model(**batch)
        logits, mask = collect_router_logits(model).values(), batch["attention_mask"]
        loss = WEIGHTS["balance"] * balance_loss(logits, mask=mask) + WEIGHTS["z"] * router_z_loss(logits, mask)
        (loss / len(batches)).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


class SaysItIsScaled(Trainer):
    loss_is_scaled_for_ga = True


CASES = {
    "scaled by the model": {},
    "scaled by Trainer": {"model_class": WithoutLossArguments},
    "scaled by a function": {"compute_loss_func": summed_loss},
    "scaled by a function, not by the model": {"compute_loss_func": summed_loss, "model_class": WithoutLossArguments},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "a Trainer that says the loss is scaled": {"trainer_class": SaysItIsScaled, "model_class": WithoutLossArguments},
    "checkpointing": {"activation_checkpointing": True},
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
}


@pytest.mark.parametrize(("case", "accumulated"), [(case, 4) for case in CASES] + [("scaled by the model", 1)])
def test_the_loss_counts_once_a_step(case: str, accumulated: int, tmp_path: Path) -> None:
    options = dict(CASES[case])
    model = with_experts(llama(options.pop("model_class", LlamaForCausalLM)), output_router_logits=True)
    options |= {"gradient_accumulation_steps": accumulated, "data": rows(2 * accumulated)}
    alone, _ = gradients_of_a_step(model, tmp_path, added=False, **copy.copy(options))
    both, batches = gradients_of_a_step(model, tmp_path, added=True, **options)
    assert len(batches) == accumulated
    if options.get("activation_checkpointing"):
        model.activation_checkpointing_disable()
    expected = expected_gradients(model, batches)
    assert any(gradient.abs().max() > 1e-3 for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(
            both[name] - alone[name], gradient, rtol=1e-4, atol=1e-7
        )  # the model's norms compute in fp32


def _step_of_one_process(rank: int, folder: Path) -> None:
    model = with_experts(llama(), output_router_logits=True)
    for average in (True, False):
        options = {"average_tokens_across_devices": average, "gradient_accumulation_steps": 2, "ddp_backend": "gloo"}
        options["data"] = rows(8)
        alone, _ = gradients_of_a_step(model, folder, added=False, **copy.copy(options))
        both, mine = gradients_of_a_step(model, folder, added=True, **options)
        batches: list = [None, None]
        torch.distributed.all_gather_object(batches, mine)
        assert len(mine) == 2
        for name, gradient in expected_gradients(model, batches[0] + batches[1]).items():
            torch.testing.assert_close(both[name] - alone[name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed package")
def test_the_loss_counts_once_on_two_processes(tmp_path: Path) -> None:
    on_two_processes(_step_of_one_process, tmp_path)


def test_replicas_of_data_parallel_keep_their_losses(tmp_path: Path) -> None:
    """DataParallel runs copies of the modules, which are deleted before compute_loss returns; the test makes such copies."""
    model = with_experts(llama(), output_router_logits=True).train()
    trainer = Trainer(model, arguments(tmp_path), train_dataset=rows(2))
    alone = trainer.compute_loss
    batches = [{name: torch.stack([row[name] for row in rows(2)]) for name in ("input_ids", "attention_mask", "labels")}]
    batches.append({name: tensor[:, :5] for name, tensor in batches[0].items()})

    def data_parallel(model: nn.Module, batch: list[dict], **options) -> Tensor:
        return torch.stack([replica(model)(**part).loss for part in batch])

    trainer.compute_loss = data_parallel
    add_auxiliary_loss(trainer, **WEIGHTS)
    loss = trainer.compute_loss(model, batches)
    model.zero_grad()
    loss.mean().backward()
    both = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    data_parallel(model, batches).mean().backward()
    alone = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    for name, gradient in expected_gradients(model, batches).items():
        torch.testing.assert_close(both[name] - alone[name], gradient, rtol=1e-4, atol=1e-7)


def test_evaluation_and_generation_add_no_loss(tmp_path: Path) -> None:
    model, data = with_experts(llama(), output_router_logits=True), rows(6)
    trainer = Trainer(model, arguments(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1), train_dataset=data,
                      eval_dataset=data)  # fmt: skip
    before = trainer.evaluate()["eval_loss"]
    handle = add_auxiliary_loss(trainer, balance=100.0)
    assert trainer.evaluate()["eval_loss"] == before
    trainer.train()
    assert _last(trainer, "eval_loss") == before
    assert _last(trainer, "loss") > before + 50
    with torch.no_grad():
        model.generate(data[0]["input_ids"][None, :3], attention_mask=torch.ones(1, 3), max_new_tokens=2, pad_token_id=0)
        model.train()(data[0]["input_ids"][None])
    assert handle._losses == []
    handle.remove()
    assert "compute_loss" not in vars(trainer)
    assert not model._forward_hooks
    trainer.train()
    assert _last(trainer, "loss") < before + 50


def _last(trainer: Trainer, key: str) -> float:
    return [log[key] for log in trainer.state.log_history if key in log][-1]


def test_under_peft(tmp_path: Path) -> None:
    peft_model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["v_proj"], lora_dropout=0.0))
    model = with_experts(peft_model, output_router_logits=True)
    options = {"gradient_accumulation_steps": 2, "data": rows(4)}
    alone, _ = gradients_of_a_step(model, tmp_path, added=False, **copy.copy(options))
    both, batches = gradients_of_a_step(model, tmp_path, added=True, **options)
    for name, gradient in expected_gradients(model, batches).items():
        torch.testing.assert_close(both[name] - alone[name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_reentrant_checkpointing_warns_once(use_reentrant: bool, tmp_path: Path) -> None:
    model, data = with_experts(llama(), output_router_logits=True), rows(8)
    kwargs = {"use_reentrant": use_reentrant}
    trainer = Trainer(
        model, arguments(tmp_path, max_steps=4, activation_checkpointing=True, activation_checkpointing_kwargs=kwargs),
        train_dataset=data, eval_dataset=data,
    )  # fmt: skip
    add_auxiliary_loss(trainer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        trainer.train()
        trainer.evaluate()
    warned = [str(warning.message) for warning in caught if "router logits" in str(warning.message)]
    assert len(warned) == (1 if use_reentrant else 0)
    assert all("use_reentrant=False" in text for text in warned)


@pytest.mark.parametrize("decoder_length", [5, 8], ids=["shorter", "of one length"])
def test_an_encoder_decoder_model(decoder_length: int, tmp_path: Path) -> None:
    """Each layer counts the tokens that it sees: those of cross-attention's keys are the encoder's."""
    model, data = t5(output_router_logits=True), rows(4)
    for row in data:
        target = torch.randint(1, 32, (decoder_length,))
        row["labels"] = target.where(torch.arange(decoder_length) < torch.randint(2, decoder_length, ()), -100)
    options = {"gradient_accumulation_steps": 2, "data": data}
    alone, _ = gradients_of_a_step(model, tmp_path, added=False, **copy.copy(options))
    both, batches = gradients_of_a_step(model, tmp_path, added=True, **options)
    model.zero_grad()
    for batch in batches:
        model(**batch)
        logits, losses = collect_router_logits(model), []
        assert sum("EncDecAttention.k" in name for name in logits) == 1
        for name, of_layer in logits.items():
            sees_encoder = name.startswith("encoder.") or "EncDecAttention.k" in name
            mask = batch["attention_mask"] if sees_encoder else batch["labels"] != -100
            losses.append(
                WEIGHTS["balance"] * balance_loss(of_layer, mask=mask) + WEIGHTS["z"] * router_z_loss(of_layer, mask)
            )
        (torch.stack(losses).sum() / len(logits) / len(batches)).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(both[name] - alone[name], parameter.grad, rtol=1e-4, atol=1e-7)


def test_a_mask_function_of_the_user(tmp_path: Path) -> None:
    model, data = with_experts(llama(), output_router_logits=True), rows(2)
    trainer = Trainer(model, arguments(tmp_path), train_dataset=data)
    seen = []

    def first_tokens(batch):
        seen.append(set(batch))
        return lambda name: (torch.arange(8) < 2).expand(2, 8) if "q_proj" in name else None

    add_auxiliary_loss(trainer, **WEIGHTS, mask=first_tokens)
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    model.train()
    trainer.current_gradient_accumulation_steps = 1
    added = trainer.compute_loss(model, batch) - model(**batch).loss
    logits = collect_router_logits(model)
    expected = [
        WEIGHTS["balance"] * balance_loss(part) + WEIGHTS["z"] * router_z_loss(part)
        for part in (of_layer[:, :2] if "q_proj" in name else of_layer for name, of_layer in logits.items())
    ]
    torch.testing.assert_close(added, torch.stack(expected).mean())
    assert {"input_ids", "attention_mask"} <= seen[0]


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"trainer must be a transformers\.Trainer with a model, got Linear"):
        add_auxiliary_loss(nn.Linear(2, 2))
    trainer = Trainer(with_experts(llama()), arguments(tmp_path), train_dataset=rows(2))
    with pytest.raises(ValueError, match=r"keep router logits, got none \(is output_router_logits set"):
        add_auxiliary_loss(trainer)
    assert "compute_loss" not in vars(trainer)
    for layer in lmoe_layers(trainer.model).values():
        layer.output_router_logits = True
    with pytest.raises(ValueError, match="balance must be a number of at least 0, got -1"):
        add_auxiliary_loss(trainer, balance=-1)
    handle = add_auxiliary_loss(trainer)
    with pytest.raises(ValueError, match="have at most one auxiliary loss"):
        add_auxiliary_loss(trainer)
    with disable_lmoe(trainer.model), pytest.raises(ValueError, match="kept router logits in its last forward, got none"):
        trainer.train()
    handle.remove()
    made = Trainer(args=arguments(tmp_path), model_init=lambda: with_experts(llama(), output_router_logits=True))
    with pytest.raises(ValueError, match="be created with its model, got model_init"):
        add_auxiliary_loss(made)
