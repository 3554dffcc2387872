"""Command: chat."""


def chat() -> None:
    """chat."""
