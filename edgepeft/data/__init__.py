"""What the model reads: formats, chat templates, loss masks, packing, statistics."""
