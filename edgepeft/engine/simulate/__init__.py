"""The dry run: the real training step on tensors without values, and a model of the CUDA caching allocator."""

from edgepeft.engine.simulate.dry_run import dry_run

__all__ = ["dry_run"]
