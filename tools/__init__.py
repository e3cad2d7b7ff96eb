"""What the tests and the benchmarks share; imports neither of them."""
