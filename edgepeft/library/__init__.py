"""Adapters on disk: names, versions, cards."""
