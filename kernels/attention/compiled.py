"""`Attention` as Triton kernels."""

from __future__ import annotations

from .decode import decode as decode
from .prefill import prefill as prefill
from .rope import rope_ as rope_
from .rope import rope_and_store_kv as rope_and_store_kv
