"""A run as files: layout, events, launching, following, state."""
