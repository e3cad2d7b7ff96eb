"""What can be learned without a GPU: machine code, the traffic of Triton kernels, and the host's part of a call."""
