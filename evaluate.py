"""Test on the frozen pair: ``python evaluate.py --config configs/clt_cultural.yaml --ckpt_path FILE``."""

from mechdiff.cli import main

if __name__ == "__main__":
    raise SystemExit(main("test"))
