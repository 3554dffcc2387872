"""Adapters combined with each other and with their base: merge, export, compose, average."""
