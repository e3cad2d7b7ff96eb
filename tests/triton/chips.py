"""Chips that plans are made for, with the shared memory that one program can use."""

from lmoe_kernels.backends.triton.plans import Chip

H200 = Chip("sm_90", 132, 227 << 10)
CHIPS = [
    Chip("sm_80", 108, 163 << 10),
    Chip("sm_86", 84, 99 << 10),
    H200,
    Chip("sm_100", 148, 227 << 10),
    Chip("sm_120", 170, 99 << 10),
    Chip("gfx942", 304, 64 << 10),
]
