"""Experts on a base that transformers quantised: training, checkpoints and saving, each bitwise."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
)

from lmoe_kernels import (
    apply_lmoe,
    disable_lmoe,
    lmoe_layers,
    load_lmoe,
    print_trainable_parameters,
    remove_lmoe,
    save_lmoe,
)

bitsandbytes = pytest.importorskip("bitsandbytes")
torchao = pytest.importorskip("torchao.quantization")

IDS = torch.arange(48).view(4, 12)
TARGETS = ["q_proj", "down_proj"]
QUANTISED = {
    "bitsandbytes 4 bit": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "bitsandbytes 8 bit": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao int8": lambda: TorchAoConfig(torchao.Int8WeightOnlyConfig()),
}


def llama_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16,
    )  # fmt: skip


@pytest.fixture(params=QUANTISED)
def load(request: pytest.FixtureRequest, tmp_path: Path):
    """A function that loads the same quantised model at every call."""
    LlamaForCausalLM(llama_config()).save_pretrained(tmp_path / "base")
    quantisation = QUANTISED[request.param]
    return lambda: LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantisation())


def with_experts(model: nn.Module, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    apply_lmoe(model, TARGETS, num_experts=3, rank=2)
    return model


def logits_of(model: nn.Module) -> Tensor:
    """Computed in training mode: in eval mode bitsandbytes repacks 4-bit weights on some CPUs and rounds their scales."""
    with torch.no_grad():
        return model.train()(IDS).logits


def trained(model: nn.Module, folder: Path, resume: str | None = None, **options) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, per_device_train_batch_size=2,
        learning_rate=1e-2, logging_steps=1, lr_scheduler_type="constant", **options,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in IDS])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_equal(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.items())


def test_a_new_layer_gives_what_the_quantised_one_gives(load) -> None:
    model = load()
    expected = logits_of(model)
    with_experts(model)
    assert torch.equal(logits_of(model), expected)
    assert len(trained_tensors(model)) == 3 * len(lmoe_layers(model)) == 12
    for layer in lmoe_layers(model).values():
        assert layer.lora_a.dtype == torch.float32
        nn.init.normal_(layer.lora_b)
    assert not torch.equal(logits_of(model), expected)
    remove_lmoe(model)
    assert torch.equal(logits_of(model), expected)


def test_packed_weights_are_counted_unpacked(load, capsys: pytest.CaptureFixture[str]) -> None:
    print_trainable_parameters(load())
    plain = LlamaForCausalLM(llama_config())
    assert f"all params: {plain.num_parameters():,d} " in capsys.readouterr().out


def test_trainer_trains_and_the_adapter_loads_bitwise(load, tmp_path: Path) -> None:
    model = with_experts(load())
    before = trained_tensors(model)
    trained(model, tmp_path, max_steps=2, save_strategy="no")
    after = trained_tensors(model)
    assert not any(torch.equal(after[name], before[name]) for name in before)
    save_lmoe(model, tmp_path / "adapter")
    fresh = load()
    load_lmoe(fresh, tmp_path / "adapter")
    assert_equal(trained_tensors(fresh), after)
    assert torch.equal(logits_of(fresh), logits_of(model))
    with disable_lmoe(model):
        assert torch.equal(logits_of(model), logits_of(load()))


def test_trainer_resumes_bitwise_from_the_adapter_alone(load, tmp_path: Path) -> None:
    whole = with_experts(load())
    trained(whole, tmp_path / "whole", max_steps=4, save_strategy="no")
    first = with_experts(load())
    trained(first, tmp_path / "parts", max_steps=2, save_steps=2)
    checkpoint = tmp_path / "parts" / "checkpoint-2"
    weights = {"lmoe.safetensors", "lmoe_config.json", "model.safetensors.index.json", "config.json"}
    assert {file.name for file in checkpoint.iterdir() if "safetensors" in file.name or "config" in file.name} == weights
    second = with_experts(load(), seed=1)  # other experts, which must all be replaced
    trained(second, tmp_path / "parts", resume=str(checkpoint), max_steps=4, save_strategy="no")
    assert_equal(trained_tensors(second), trained_tensors(whole))
    loaded = load()
    load_lmoe(loaded, checkpoint)
    assert_equal(trained_tensors(loaded), trained_tensors(first))


def test_the_adapter_alone_is_not_taken_for_a_model(load, tmp_path: Path) -> None:
    """from_pretrained would initialise the base at random."""
    model = with_experts(load())
    model.save_pretrained(tmp_path / "adapter")
    before = {file.name: file.read_bytes() for file in (tmp_path / "adapter").iterdir()}
    for model_class in (AutoModelForCausalLM, LlamaForCausalLM):
        with pytest.raises(ValueError, match="the base is not here: load it as before training, then lmoe_kernels"):
            model_class.from_pretrained(tmp_path / "adapter")
    with pytest.raises(KeyError, match="metadata"):
        LlamaForCausalLM.from_pretrained(tmp_path / "adapter", config=llama_config())
    model.save_pretrained(tmp_path / "adapter", is_main_process=False)
    assert {file.name: file.read_bytes() for file in (tmp_path / "adapter").iterdir()} == before


def test_the_best_model_is_loaded_at_the_end(load, tmp_path: Path) -> None:
    model, data = with_experts(load()), [{"input_ids": row, "labels": row} for row in IDS]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=2, learning_rate=1e3,
        eval_strategy="steps", eval_steps=1, save_steps=1, load_best_model_at_end=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    best = load()
    load_lmoe(best, trainer.state.best_model_checkpoint)
    assert_equal(trained_tensors(best), trained_tensors(model))


def test_trainer_refuses_a_quantised_model_without_experts(load, tmp_path: Path) -> None:
    model = load()
    own = model.hf_quantizer
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    with_experts(model)
    Trainer(model, arguments)
    assert isinstance(model.hf_quantizer, type(own))
    for copied in (copy.deepcopy(model.hf_quantizer), pickle.loads(pickle.dumps(model.hf_quantizer))):
        assert copied.is_qat_trainable
        assert vars(copied).keys() == vars(model.hf_quantizer).keys()
    remove_lmoe(model)
    assert model.hf_quantizer is own
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model, arguments)


def test_a_method_that_cannot_be_trained_is_still_refused(load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_experts(load())
    monkeypatch.setattr(type(model.hf_quantizer).__bases__[1], "is_trainable", False)
    with pytest.raises(ValueError, match="do not support training"):
        Trainer(model, TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[]))


def test_pushing_a_quantised_model_is_refused(load, tmp_path: Path) -> None:
    model = with_experts(load())
    with pytest.raises(ValueError, match="save_pretrained: push_to_hub must be False for a quantised model"):
        model.save_pretrained(tmp_path / "there", push_to_hub=True)
    assert not (tmp_path / "there").exists()
