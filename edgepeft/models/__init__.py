"""Base models on this disk: the store, discovery, shapes from config and file headers, the embedded default."""
