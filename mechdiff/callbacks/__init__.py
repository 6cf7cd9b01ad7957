"""What is measured on the frozen pair, by callbacks that run when a test has ended."""

from mechdiff.callbacks.base import CausalEvaluation
from mechdiff.callbacks.patching import MappedPatch

__all__ = ["CausalEvaluation", "MappedPatch"]
