"""What mixtures of LoRA experts cost in vLLM: tokens a second, and latencies under load."""
