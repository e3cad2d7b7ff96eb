"""Tests of the plugin for vLLM, which has an environment of its own: `make test-vllm`."""
