"""TRL's SFTTrainer with the coefficients of an adapter: no class and no call of the user."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lmoe_kernels import add_auxiliary_loss, auxiliary_loss
from lmoe_kernels.auxiliary_hook import install
from lmoe_kernels.peft import LMoEConfig
from tests.models import llama, with_experts
from tests.training import Recorder

trl = pytest.importorskip("trl", reason="TRL is not installed")
datasets = pytest.importorskip("datasets")

from tokenizers import Tokenizer, models  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

WEIGHTS = (3.0, 0.5)


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, **{str(i): i for i in range(2, 32)}}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def trainer_of(model: nn.Module, folder: Path, **options) -> tuple[trl.SFTTrainer, Recorder]:
    lengths = (12, 3, 5, 4, 9, 3, 3, 4)
    data = datasets.Dataset.from_dict({"input_ids": [torch.randint(2, 32, (length,)).tolist() for length in lengths]})
    arguments = {"max_steps": 1, "learning_rate": 0.0, "max_grad_norm": 0.0, "save_strategy": "no", "report_to": "none",
                 "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "use_cpu": True, "bf16": False,
                 "logging_steps": 1, "disable_tqdm": True, "gradient_checkpointing": False, **options}  # fmt: skip
    recorder, peft_config = Recorder(model), arguments.pop("peft_config", None)
    config, tokens = trl.SFTConfig(str(folder), **arguments), tokenizer()
    trainer = trl.SFTTrainer(
        model, config, train_dataset=data, processing_class=tokens, callbacks=[recorder], peft_config=peft_config
    )
    return trainer, recorder


def label_tokens(batch: dict[str, Tensor]) -> int:
    return int((batch["labels"][:, 1:] != -100).sum())


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}], ids=["plain", "checkpointing"])
def test_coefficients_count_once_a_step(options: dict, tmp_path: Path) -> None:
    gradients, logged = [], []
    model = with_experts(llama(), output_router_logits=True)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(seed := torch.seed() % 2**31)
    for weights in ((0.0, 0.0), WEIGHTS):
        torch.manual_seed(seed)
        model = with_experts(llama(), output_router_logits=True)
        model.load_state_dict(start)
        install(model, lambda adapter, weights=weights: weights)
        torch.manual_seed(seed)
        trainer, recorder = trainer_of(model, tmp_path, **options)
        trainer.train()
        gradients.append(recorder.gradients)
        logged.append(next(log["loss"] for log in trainer.state.log_history if "loss" in log))
    assert logged[0] == logged[1]  # TRL logs the language-modelling loss
    model = with_experts(llama(), output_router_logits=True).train()
    model.load_state_dict(start)
    tokens = [label_tokens(batch) for batch in recorder.batches]
    assert len(set(tokens)) == 2
    for batch, count in zip(recorder.batches, tokens, strict=True):
        model(batch["input_ids"], attention_mask=batch["attention_mask"])
        loss = auxiliary_loss(model, balance=WEIGHTS[0], z=WEIGHTS[1], mask=batch["attention_mask"])
        (count / sum(tokens) * loss).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert any(gradient.abs().max() > 1e-3 for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[1][name] - gradients[0][name], gradient, rtol=1e-4, atol=1e-6)


def test_the_configuration_of_an_adapter_is_all_it_needs(tmp_path: Path) -> None:
    """While B is zero, the language-modelling loss gives the gates no gradient: theirs is that of the coefficients."""
    for coefficient in (0.0, 3.0):
        config = LMoEConfig(
            num_experts=3, r=2, target_modules=["q_proj"], router_aux_loss_coef=coefficient, task_type="CAUSAL_LM"
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*router_aux_loss_coef")
            trainer, recorder = trainer_of(llama(), tmp_path, peft_config=config)
            trainer.train()
        gates = [gradient for name, gradient in recorder.gradients.items() if "lmoe_gate" in name]
        assert gates
        assert all(bool(gradient.any()) is (coefficient > 0) for gradient in gates)


def test_a_loss_of_another_trainer_is_left_alone_with_a_warning() -> None:
    """Only SFTTrainer sums log_probs up to a loss; in DPO, for example, an addend would distort the preferences."""
    model = with_experts(llama(), output_router_logits=True).train()
    install(model, lambda adapter: WEIGHTS)
    trl.trainer.utils.add_fused_lm_head(model)
    ids = torch.randint(2, 32, (2, 6))
    model.add_model_tags(["trl", "dpo"])
    with pytest.warns(UserWarning, match=r"call add_auxiliary_loss\(trainer\)"):
        output = model(input_ids=ids, labels=ids, fused_lm_head=True)
    gate = next(p for name, p in model.named_parameters() if "gate_weight" in name)
    (first,) = torch.autograd.grad(output.log_probs.sum(), gate)
    install(model, lambda adapter: (0.0, 0.0))
    (second,) = torch.autograd.grad(model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs.sum(), gate)
    assert torch.equal(first, second)


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_add_auxiliary_loss_is_in_the_logged_loss(loss_type: str, tmp_path: Path) -> None:
    model = with_experts(llama(), output_router_logits=True)
    trainer, _ = trainer_of(model, tmp_path, loss_type=loss_type)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        add_auxiliary_loss(trainer, balance=100.0)
        trainer.train()
    assert next(log["loss"] for log in trainer.state.log_history if "loss" in log) > 50
