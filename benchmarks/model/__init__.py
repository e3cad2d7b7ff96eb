"""What the CUDA engine costs on a chip, by its machine code: a model that measures nothing, and was wrong for an H200."""
