"""The study behind the layer's defaults: the scaling, the gate at the start, and why experts are in fp32.

`python -m benchmarks.defaults --help` for the command, docs/defaults.md for the results.
"""
