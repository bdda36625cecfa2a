"""Triton kernels: a file per op, imported when an op first meets a GPU."""
