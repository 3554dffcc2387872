"""Base models in memory: loading, quantizing, frozen weights."""
