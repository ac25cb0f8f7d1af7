"""The operations as Triton kernels: CUDA, or CPU tensors under `TRITON_INTERPRET=1`.

See `Kernels` for the contracts.
"""

from __future__ import annotations

from .attention.decode import decode as attention_decode
from .attention.prefill import prefill as attention_prefill
from .attention.rope import rope_and_store_kv
from .dense.activation import silu_, silu_and_mul
from .dense.linear import linear
from .dense.norm import add_rms_norm, gated_rms_norm, rms_norm
from .experts.products import moe
from .experts.routing import route
from .lightning.decode import decode as lightning_decode
from .lightning.minimax import prefill as lightning_prefill
from .lightning.replay import fold as lightning_fold
from .lightning.replay import replay_decode as lightning_replay
from .lightning.seg_la import segments as lightning_segments
from .lightning.snapshot import snapshot as lightning_snapshot
from .lightning.verify import verify as lightning_verify
from .sampling import sample

__all__ = [
    "add_rms_norm",
    "attention_decode",
    "attention_prefill",
    "gated_rms_norm",
    "lightning_decode",
    "lightning_fold",
    "lightning_prefill",
    "lightning_replay",
    "lightning_segments",
    "lightning_snapshot",
    "lightning_verify",
    "linear",
    "moe",
    "rms_norm",
    "rope_and_store_kv",
    "route",
    "sample",
    "silu_",
    "silu_and_mul",
]
