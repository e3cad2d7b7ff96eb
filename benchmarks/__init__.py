"""What the operation costs: beside the frozen layer, beside what people use today, and beside the machine's limits.

`python -m benchmarks --help` for users, the `bench_*.py` files (pytest-benchmark) for developers. Nothing here is installed.
"""
