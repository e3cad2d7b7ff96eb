"""Train a small language model through L-MoE layers with Trainer, save it and load it again: seconds on a CPU."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from lmoe_kernels import add_auxiliary_loss, apply_lmoe, load_lmoe, print_trainable_parameters

config = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(config)  # or any from_pretrained(...)
apply_lmoe(model, "all-linear", num_experts=4, rank=8, output_router_logits=True)  # freezes everything else
print_trainable_parameters(model)

data: Any = [{"input_ids": text, "labels": text} for text in torch.tensor(list(b"to be or not to be " * 64)).view(-1, 32)]
arguments = TrainingArguments("out", max_steps=20, learning_rate=3e-3, logging_steps=10, report_to="none")
trainer = Trainer(model, arguments, train_dataset=data)
add_auxiliary_loss(trainer, balance=0.01)  # the load-balancing loss, so that every expert is used
trainer.train()
trainer.save_model("out")  # the frozen model and, in lmoe.safetensors and lmoe_config.json, experts and gates
again = LlamaForCausalLM.from_pretrained("out")  # reports the experts' tensors as unexpected: the next line loads them
load_lmoe(again, "out")
tokens = data[0]["input_ids"][None]
same = torch.equal(again.eval()(tokens).logits, model.cpu().eval()(tokens).logits)
print("the loaded model gives the same logits" if same else "the loaded model gives other logits")
