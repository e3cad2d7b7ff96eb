"""The parts of examples/evidence.py, the study of what a mixture of LoRA experts is worth."""
