"""Command: demo."""


def demo() -> None:
    """demo."""
