"""Fine-tune a small Llama with TRL's SFTTrainer and an adapter of L-MoE, without a hub: seconds on a CPU.

SFTTrainer gets the configuration of the adapter; the model itself adds the balance loss of its coefficient.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

if missing := [name for name in ("trl", "datasets") if find_spec(name) is None]:
    sys.exit(f"trl_sft.py: {' and '.join(missing)} must be installed: pip install trl")

import torch
from datasets import Dataset  # pyright: ignore[reportMissingImports]
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]

from lmoe_kernels.peft import LMoEConfig


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each byte."""
    vocabulary = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(vocabulary)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("trl_sft"), help="folder for the results")
    options = parser.parse_args()
    tokenizer = byte_tokenizer()
    pairs = [(a, b) for a in range(10) for b in range(10)]
    data = Dataset.from_list([{"prompt": f"{a} plus {b} is ", "completion": f"{a + b}"} for a, b in pairs])
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            pad_token_id=0, eos_token_id=1, max_position_embeddings=64,
        )
    )  # fmt: skip
    base.save_pretrained(options.out / "base")  # or any from_pretrained(...)

    trainer = SFTTrainer(
        base,
        SFTConfig(
            str(options.out), max_steps=options.steps, learning_rate=3e-3, per_device_train_batch_size=20,
            logging_steps=max(1, options.steps // 3), gradient_accumulation_steps=2, bf16=False, save_strategy="no",
            report_to="none", disable_tqdm=True,
        ),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=LMoEConfig(
            num_experts=4, r=8, target_modules=["q_proj", "v_proj", "down_proj"], router_aux_loss_coef=0.01,
            task_type="CAUSAL_LM",
        ),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(options.out / "adapter"))
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last")

    again = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(options.out / "base"), options.out / "adapter")
    ids = torch.tensor([tokenizer("3 plus 4 is ")["input_ids"]])
    assert trainer.model is not None
    same = torch.equal(again.eval()(ids).logits, trainer.model.cpu().eval()(ids).logits)
    print("the loaded model gives the same logits" if same else "the loaded model gives other logits")


if __name__ == "__main__":
    main()
