"""The study behind the layer's defaults: which scaling, which gate at the start, and what fp32 experts are for.

`python -m benchmarks.defaults --help` for the command, docs/defaults.md for what came out.
"""
