"""What is measured on the frozen pair, by callbacks that run when a test has ended."""

from mechdiff.callbacks.base import CausalEvaluation
from mechdiff.callbacks.behaviour import Behaviour
from mechdiff.callbacks.causal_loss import CausalLoss
from mechdiff.callbacks.gate import Gate
from mechdiff.callbacks.grafts import Grafts
from mechdiff.callbacks.handle_heads import HandleHeads
from mechdiff.callbacks.heads import Heads
from mechdiff.callbacks.layer_patch import LayerPatch
from mechdiff.callbacks.monitor import Monitor
from mechdiff.callbacks.patching import MappedPatch
from mechdiff.callbacks.steering import Steering
from mechdiff.callbacks.transfer import Transfer
from mechdiff.callbacks.yardsticks import Yardsticks

__all__ = [
    "Behaviour",
    "CausalEvaluation",
    "CausalLoss",
    "Gate",
    "Grafts",
    "HandleHeads",
    "Heads",
    "LayerPatch",
    "MappedPatch",
    "Monitor",
    "Steering",
    "Transfer",
    "Yardsticks",
]
