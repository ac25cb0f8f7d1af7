"""`Dense` as Triton kernels."""

from __future__ import annotations

from .activation import gate_ as gate_
from .activation import silu_ as silu_
from .activation import silu_and_mul as silu_and_mul
from .join import join as join
from .linear import linear as linear
from .norm import add_rms_norm as add_rms_norm
from .norm import gated_rms_norm as gated_rms_norm
from .norm import rms_norm as rms_norm
