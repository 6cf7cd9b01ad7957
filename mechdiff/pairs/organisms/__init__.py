"""Differences planted in the weights of a copy of any model, by a seed, so that the right answer is known."""

from mechdiff.pairs.organisms.planted import Planted, Truth, copy_model, planted_pair
from mechdiff.pairs.organisms.policy import plant_policy, plant_relay
from mechdiff.pairs.organisms.vocabulary import plant_vocabulary
from mechdiff.pairs.organisms.weights import plant_heads, plant_null, plant_weights, with_rounding

__all__ = [
    "Planted",
    "Truth",
    "copy_model",
    "plant_heads",
    "plant_null",
    "plant_policy",
    "plant_relay",
    "plant_vocabulary",
    "plant_weights",
    "planted_pair",
    "with_rounding",
]
