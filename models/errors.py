"""Errors about a model folder, and the root of the project's error tree (drawn in `engine.errors`)."""

from __future__ import annotations


class LeydenError(Exception):
    """Root of every error that a user can cause and is told about."""


class CheckpointError(LeydenError):
    """A checkpoint is missing, malformed, unsafe or of an unknown architecture."""


class WeightFormatError(LeydenError):
    """A setting asks for weights in a format that the model's matrices cannot have."""
