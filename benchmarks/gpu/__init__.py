"""Everything that needs a GPU, in parts of minutes: tests, the goals' times, the tuner, many experts, sanitizers."""
