"""Command: doctor."""


def doctor() -> None:
    """doctor."""
