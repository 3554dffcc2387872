"""What a run costs in bytes, by category and phase."""
