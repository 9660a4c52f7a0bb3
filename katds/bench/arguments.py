"""What the benchmarks' command lines share: checked numbers and the number of processes."""

import argparse


def positive(text: str) -> int:
    """`text` as a whole number of at least 1, for the `type` of an argument."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def default_ranks() -> int:
    """Two processes, or on a CUDA machine at most one for each GPU."""
    import torch

    return min(2, torch.cuda.device_count()) if torch.cuda.is_available() else 2
