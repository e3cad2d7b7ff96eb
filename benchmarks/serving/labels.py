"""The names of what is compared. Needs no vLLM."""

EXPERTS, RANK = 8, 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MODEL = (
    "a random Llama of 94 M parameters in bf16 (8 layers, hidden size 1024, MLP 2816, 16 heads, 4 of keys and values); "
    f"E={EXPERTS}, R={RANK} on {', '.join(TARGETS)}"
)
LABELS = {
    "base": "the base model, compiled",
    "lmoe": "L-MoE, compiled",
    "lora": f"one LoRA of rank {RANK} by vLLM, compiled",
    "base-eager": "the base model, eager",
    "lmoe-eager": "L-MoE, eager",
    "lora-eager": f"one LoRA of rank {RANK} by vLLM, eager",
}
