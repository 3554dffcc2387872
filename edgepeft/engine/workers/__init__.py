"""Process entry points: python -m edgepeft.engine.workers.NAME."""
