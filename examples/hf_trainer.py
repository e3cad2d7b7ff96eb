"""Fine-tune a model of transformers with PEFT and Trainer: auxiliary losses, a learning rate of the gates, save and load.

A small Llama that reads bytes, trained on English, stands for a pretrained model. Its experts then learn Python and C.
A minute or two on a CPU; with --tiny seconds.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from corpus import Domain, load_domains
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from lmoe_kernels import collect_router_logits, parameter_groups
from lmoe_kernels.peft import LMoEConfig

LENGTH = 128  # bytes of one row
Rows = Any  # a list of {"input_ids": ..., "labels": ...}; Trainer takes any sequence, its annotations only a Dataset


def training_rows(domains: list[Domain], count: int) -> Rows:
    """Random rows of these domains in turn."""
    generator = torch.Generator().manual_seed(0)
    batches = [domain.batch(math.ceil(count / len(domains)), LENGTH, generator)[:, :-1] for domain in domains]
    return [{"input_ids": row, "labels": row} for rows in zip(*batches, strict=True) for row in rows]


def bits_per_byte(trainer: Trainer, domains: list[Domain]) -> dict[str, float]:
    """The loss on the validation part of each domain. It does not contain the auxiliary losses."""
    bits = {}
    for domain in domains:
        rows: Rows = [{"input_ids": row, "labels": row} for row in domain.windows(32, LENGTH)[:, :-1]]
        bits[domain.name] = trainer.evaluate(rows)["eval_loss"] / math.log(2)
    return bits


def favourites(model: torch.nn.Module, domain: Domain) -> str:
    """The shares of the tokens for which each expert of the first layer has the largest gate."""
    with torch.no_grad():
        model(domain.windows(8, LENGTH)[:, :-1].to(next(model.parameters()).device))
    logits = next(iter(collect_router_logits(model).values())).flatten(0, 1)
    shares = logits.argmax(dim=1).bincount(minlength=logits.shape[1]) / len(logits)
    return " ".join(f"{share:4.0%}" for share in shares.tolist())


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="few steps, for a test")
    parser.add_argument("--out", type=Path, default=Path("hf_trainer"), help="folder for the results")
    options = parser.parse_args()
    steps, out = (15 if options.tiny else 400), options.out
    torch.manual_seed(0)

    def arguments(name: str, learning_rate: float) -> TrainingArguments:
        return TrainingArguments(
            str(out / name), max_steps=steps, learning_rate=learning_rate, per_device_train_batch_size=8,
            logging_steps=steps, save_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip

    english, *others = domains = load_domains()
    config = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    base = LlamaForCausalLM(config)
    Trainer(base, arguments("base", 3e-3), train_dataset=training_rows([english], 8 * steps)).train()
    base.save_pretrained(out / "base")

    model = get_peft_model(
        base,
        LMoEConfig(
            num_experts=4,
            r=8,
            target_modules="all-linear",
            router_aux_loss_coef=0.01,  # the model adds the balance loss to its loss, in training alone
            router_z_loss_coef=0.001,
            task_type="CAUSAL_LM",
        ),
    )
    model.print_trainable_parameters()
    groups = parameter_groups(model, lr=3e-3, gate_lr=1e-2, weight_decay=0.01)
    trainer = Trainer(
        model, arguments("experts", 3e-3), train_dataset=training_rows(others, 8 * steps),
        optimizers=(torch.optim.AdamW(groups), None),
    )  # fmt: skip
    before = bits_per_byte(trainer, domains)
    trainer.train()
    after = bits_per_byte(trainer, domains)
    print("bits per byte   base  with experts   favourite experts of the first layer")
    for domain in domains:
        print(f"{domain.name:12}{before[domain.name]:8.3f}{after[domain.name]:14.3f}   {favourites(model, domain)}")

    model.save_pretrained(out / "adapter")
    again = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(out / "base"), out / "adapter")
    ids = english.windows(2, LENGTH)
    same = torch.equal(again.eval()(ids).logits, model.cpu().eval()(ids).logits)
    print("the loaded model gives the same logits" if same else "the loaded model gives other logits")


if __name__ == "__main__":
    main()
