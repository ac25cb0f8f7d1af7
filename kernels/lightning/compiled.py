"""`Lightning` as Triton kernels."""

from __future__ import annotations

from .decode import decode as decode
from .minimax import minimax as minimax
from .replay import fold as fold
from .replay import replay as replay
from .seg_la import seg_la as seg_la
from .snapshot import snapshot as snapshot
from .verify import verify as verify
