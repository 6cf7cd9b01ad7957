"""What is fitted or compared: LightningModules over stored activations, with no language model in them."""

from mechdiff.modules.base import DiffModule
from mechdiff.modules.clt import CLTMap
from mechdiff.modules.clt_sgd import CLTMapSGD
from mechdiff.modules.divergence import Divergence
from mechdiff.modules.heads import HeadComparison
from mechdiff.modules.steering import SteeringSubspace
from mechdiff.modules.steering_sgd import SteeringSubspaceSGD

__all__ = [
    "CLTMap",
    "CLTMapSGD",
    "DiffModule",
    "Divergence",
    "HeadComparison",
    "SteeringSubspace",
    "SteeringSubspaceSGD",
]
