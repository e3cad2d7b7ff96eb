"""The PEFT tuner under Trainer: resuming, auxiliary losses from the configuration, quantised models."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from transformers import (
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
)

from lmoe_kernels import balance_loss, collect_router_logits, router_z_loss
from tests.integration.peft.tuned import config, logits, trained, tuned, tuner_layers
from tests.models import IDS, llama

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

DATA = [{"input_ids": row, "labels": row} for row in torch.arange(48).remainder(32).view(4, 12)]
COEFFICIENTS = {"router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.01}


def train(model: nn.Module, folder: Path, resume: str | None = None, **options) -> Trainer:
    given = {
        "output_dir": str(folder), "use_cpu": True, "report_to": [], "disable_tqdm": True, "learning_rate": 1e-2,
        "per_device_train_batch_size": 2, "logging_steps": 1, "lr_scheduler_type": "constant", "save_strategy": "no",
    }  # fmt: skip
    trainer = Trainer(model, TrainingArguments(**{**given, **options}), train_dataset=DATA)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer: Trainer) -> list[float]:
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def assert_equal(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_resuming_is_bitwise(checkpointing: bool | None, tmp_path: Path) -> None:
    """With dropout, auxiliary losses, and both kinds of gradient checkpointing or none."""
    options: dict = {}
    given = {"lora_dropout": 0.2, "top_k": 2, "gate_bias": True, **COEFFICIENTS}
    if checkpointing is not None:
        options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": checkpointing}}
    if checkpointing:
        given |= dict.fromkeys(COEFFICIENTS, 0.0)  # router logits have no gradient under the reentrant kind
    first = tuned(**given)
    whole, second = copy.deepcopy(first), tuned(copy.deepcopy(first).unload(), **given)
    expected = train(whole, tmp_path / "whole", max_steps=4, **options)
    train(first, tmp_path / "parts", max_steps=2, save_strategy="steps", save_steps=2, **options)
    checkpoint = tmp_path / "parts" / "checkpoint-2"
    assert (checkpoint / "adapter_model.safetensors").is_file()
    resumed = train(second, tmp_path / "parts", resume=str(checkpoint), max_steps=4, **options)
    assert_equal(trained(second), trained(whole))
    assert losses(resumed) == losses(expected)
    loaded = PeftModel.from_pretrained(copy.deepcopy(first).unload(), checkpoint)
    assert torch.equal(logits(loaded.eval()), logits(first.eval()))


ADD = {
    "get_peft_model": get_peft_model,
    "inject": lambda model, given: inject_adapter_in_model(given, model),
    "later": lambda model, given: later(get_peft_model(model, config(), "first"), given),
}


def later(model: PeftModel, given) -> PeftModel:
    model.add_adapter("second", given)
    model.set_adapter("second")
    return model


@pytest.mark.parametrize("how", ADD)
def test_the_losses_of_the_coefficients_are_added(how: str) -> None:
    model = ADD[how](llama(), config(top_k=2, **COEFFICIENTS)).train()
    loss = model(input_ids=IDS, labels=IDS).loss
    kept = list(collect_router_logits(model).values())
    assert len(kept) == len(tuner_layers(model))
    own = nn.functional.cross_entropy(model.eval()(IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    added = 0.1 * balance_loss(kept, top_k=2) + 0.01 * router_z_loss(kept)
    torch.testing.assert_close(loss, (own + added).float())  # transformers computes the loss in fp32
    torch.testing.assert_close(model(input_ids=IDS, labels=IDS).loss, own.float())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_first_loss_of_a_trainer_has_both_terms_once(checkpointing: bool, tmp_path: Path) -> None:
    model = tuned(top_k=2, **COEFFICIENTS)
    ids = torch.stack([row["input_ids"] for row in DATA])
    own = nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    kept = list(collect_router_logits(model).values())
    expected = own + 0.1 * balance_loss(kept, top_k=2) + 0.01 * router_z_loss(kept)
    options = {"gradient_checkpointing": checkpointing, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    trainer = train(model, tmp_path, max_steps=1, per_device_train_batch_size=4, **options)
    assert losses(trainer) == [pytest.approx(expected.item(), abs=1e-4)]


def test_a_change_of_the_configuration_counts_and_copies_have_their_own() -> None:
    model = tuned(**COEFFICIENTS).train()
    other = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    both = [one(input_ids=IDS, labels=IDS).loss for one in (model, other)]
    assert torch.equal(*both)
    model.peft_config["default"].router_aux_loss_coef = 0.0
    model.peft_config["default"].router_z_loss_coef = 0.0
    without = model(input_ids=IDS, labels=IDS).loss
    assert without < both[0]
    assert torch.equal(other(input_ids=IDS, labels=IDS).loss, both[1])
    plain = other.unload().train()
    later = get_peft_model(plain, config(output_router_logits=True), "later").train()
    assert later(input_ids=IDS, labels=IDS).loss == later.eval()(input_ids=IDS, labels=IDS).loss


def test_without_coefficients_nothing_is_kept_or_added() -> None:
    model = tuned().train()
    loss = model(input_ids=IDS, labels=IDS).loss
    assert not collect_router_logits(model)
    assert torch.equal(loss, model.eval()(input_ids=IDS, labels=IDS).loss)


QUANTISED = {
    "bitsandbytes 4 bit": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "bitsandbytes 8 bit": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao int8": lambda: TorchAoConfig(pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig()),
}


@pytest.mark.parametrize("name", QUANTISED)
def test_a_quantised_base_is_trained_saved_and_loaded(name: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes" if "bitsandbytes" in name else "torchao.quantization")
    size = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**size)).save_pretrained(tmp_path / "base")

    def load() -> nn.Module:
        return LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=QUANTISED[name]())

    def logits_of(model: nn.Module) -> Tensor:
        """In training mode, because in eval mode bitsandbytes repacks 4-bit weights on some CPUs and rounds their scales."""
        return logits(model.train())

    base = load()
    expected = logits_of(base)
    model = get_peft_model(base, config(top_k=2))
    assert torch.equal(logits_of(model), expected)
    before = trained(model)
    assert {tensor.dtype for tensor in before.values()} == {torch.float32}
    train(model, tmp_path / "run", max_steps=2)
    assert not any(torch.equal(tensor, before[key]) for key, tensor in trained(model).items())
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load(), tmp_path / "adapter")
    assert torch.equal(logits_of(loaded), logits_of(model))
    with model.disable_adapter():
        assert torch.equal(logits_of(model), expected)
    assert torch.equal(logits_of(model.unload()), expected)
