"""Decoding on the CPU without PyTorch's operator calls."""
