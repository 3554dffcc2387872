"""Generation, adapter swapping and scoring."""
