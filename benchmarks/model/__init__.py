"""What the CUDA engine costs on a chip, by its machine code: a model, which measures nothing."""
