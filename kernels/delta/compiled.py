"""`Delta` as Triton kernels."""

from __future__ import annotations

from .prefill import prefill as prefill
from .reference import decode as decode
from .reference import fold as fold
from .reference import replay as replay
from .reference import verify as verify
