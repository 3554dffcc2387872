"""Command: plan."""


def plan() -> None:
    """plan."""
