"""Fit a module and test it: ``python train.py --config configs/clt_cultural.yaml``."""

from mechdiff.cli import main

if __name__ == "__main__":
    raise SystemExit(main("fit"))
