"""Which neurons, and how are they switched off?"""

from miner_lens.neurons.ablation import ablate, ablation_hooks
from miner_lens.neurons.baking import bake
from miner_lens.neurons.neuron_set import NeuronSet

__all__ = ["NeuronSet", "ablate", "ablation_hooks", "bake"]
