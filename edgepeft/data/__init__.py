"""What the model reads: formats, chat template, loss mask, packing, statistics, and the token cache."""
