"""Which neurons, and how are they switched off?"""

from miner_lens.neurons.ablation import ablate, ablation_hooks
from miner_lens.neurons.baking import bake
from miner_lens.neurons.knockout import knockout
from miner_lens.neurons.neuron_set import NeuronSet
from miner_lens.neurons.scaling import scale

__all__ = [
    "NeuronSet",
    "ablate",
    "ablation_hooks",
    "bake",
    "knockout",
    "scale",
]
