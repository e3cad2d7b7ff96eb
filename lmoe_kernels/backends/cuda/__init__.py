"""Hand-written CUDA kernels (csrc/) behind a torch-free extension: lowest launch cost, made for few tokens."""
