"""The training loop: batches, attention, loss, checkpoints, measured memory."""
