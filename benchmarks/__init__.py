"""Measurements and counts: what the kernels cost, in time, bytes and machine code."""
