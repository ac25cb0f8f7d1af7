"""Sequences, memory and steps: continuous batching over the models, with no word of HTTP."""
