"""Talking to a model: the JSON-lines protocol of an inference process, its client, conversations, scores."""
