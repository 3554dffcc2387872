"""Fine-tune adapters on one consumer GPU, offline, with the memory peak predicted and kept."""

__version__ = "0.1.0"
