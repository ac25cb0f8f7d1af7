"""The operations as Triton kernels: CUDA, or CPU tensors under `TRITON_INTERPRET=1`.

See `Kernels` for the contracts.
"""

from __future__ import annotations

from .activation import silu_and_mul
from .attention.decode import decode as attention_decode
from .attention.prefill import prefill as attention_prefill
from .kv_store import store_kv
from .lightning.minimax import decode as lightning_decode
from .lightning.minimax import prefill as lightning_prefill
from .lightning.seg_la import segments as lightning_segments
from .moe import moe
from .norm import add_rms_norm, rms_norm
from .rope import apply_rope

__all__ = [
    "add_rms_norm",
    "apply_rope",
    "attention_decode",
    "attention_prefill",
    "lightning_decode",
    "lightning_prefill",
    "lightning_segments",
    "moe",
    "rms_norm",
    "silu_and_mul",
    "store_kv",
]
