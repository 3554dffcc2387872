"""What the Chat screen knows and does, without drawing: lanes of answers, the process behind them, what is kept."""
