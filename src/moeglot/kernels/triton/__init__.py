"""Kernels for GPUs in Triton, on codes and scales as they lie on disk; imported when a tensor is on a GPU, or under Triton's interpreter."""
