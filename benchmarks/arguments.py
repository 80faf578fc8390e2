"""What several benchmarks take from the command line."""

import argparse


def positive(text: str) -> int:
    """Return a whole number, 1 at least."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1, the least")
    return number
