"""The kernels again, compiled by numba; each gives the bits of the torch module of its name, and is reached through that."""
