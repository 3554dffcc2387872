"""Command: train."""


def train() -> None:
    """train."""
