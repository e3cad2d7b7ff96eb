"""How it is measured: times, bytes, the machine's limits, and what a result says about the machine."""
