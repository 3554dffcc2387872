"""Randomness of fresh adapters: a function of the seed and a name, not of the order in which modules are visited."""

from __future__ import annotations

import hashlib

import torch


def generator_of(seed: int, name: str) -> torch.Generator:
    """A generator on the CPU for what is drawn under `name`."""
    digest = hashlib.blake2b(f"{seed}\x1f{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
