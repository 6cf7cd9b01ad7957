"""What is measured on the frozen pair, by callbacks that run when a test has ended."""

from mechdiff.callbacks.base import CausalEvaluation
from mechdiff.callbacks.behaviour import Behaviour
from mechdiff.callbacks.grafts import Grafts
from mechdiff.callbacks.heads import Heads
from mechdiff.callbacks.layer_patch import LayerPatch
from mechdiff.callbacks.patching import MappedPatch

__all__ = ["Behaviour", "CausalEvaluation", "Grafts", "Heads", "LayerPatch", "MappedPatch"]
