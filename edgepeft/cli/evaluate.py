"""Command: evaluate."""


def evaluate() -> None:
    """evaluate."""
