"""Triton's interpreter with bf16 arithmetic, counting of bytes, and a search for races."""
