"""The engines of `train_vs_peers.py`: one file each, with `train(task, meter)`, and what they share.

An engine runs in a process of its own. It imports its libraries, calls `meter.begin()`, loads the base, and trains the
task's steps, calling `meter.step(loss)` after each; then it calls `meter.end()` and saves a PEFT adapter.
"""
