"""A CPU emulator for the CUDA kernels: builds, seeded bugs, recorded launches, and a race check."""
