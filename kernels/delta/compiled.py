"""`Delta` as Triton kernels."""

from __future__ import annotations

from .decode import decode as decode
from .prefill import prefill as prefill
from .replay import fold as fold
from .replay import replay as replay
from .verify import verify as verify
