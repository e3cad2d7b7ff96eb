"""What the operation costs, compared with the frozen layer, with what people use today, and with the machine's limits.

`rows` defines what is measured and what each row must compute, `measuring` takes times and counts bytes, `showing` writes
tables and pictures; each imports from those before it only. `inspect` reads machine code, counts the bytes that Triton
kernels move, and times the host. Start with `python -m benchmarks --help`. None of this is installed.
"""
