"""Answers from a loaded base and any of its adapters: generation, batches, losses."""
