"""Train a recipe: `python train.py --config configs/tiny.py [overrides]`."""

import sys
from pathlib import Path

from mst_jax.cli import train_main

if __name__ == "__main__":
    sys.exit(train_main(Path(__file__).parent / "configs"))
