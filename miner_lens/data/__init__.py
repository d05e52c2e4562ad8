"""Asked what? Samples, data sets and when an answer counts as right."""

from miner_lens.data.metrics import is_right
from miner_lens.data.sample import Message, Sample, SampleError

__all__ = ["Message", "Sample", "SampleError", "is_right"]
