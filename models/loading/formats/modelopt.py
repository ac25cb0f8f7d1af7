"""NVIDIA's ModelOpt: FP8 with a scale of all items or of blocks, and NVFP4.

`x.weight` float8_e4m3fn with `x.weight_scale` or `x.weight_scale_inv`; or uint8 [N, K / 2] with `x.weight_scale`
float8_e4m3fn [N, K / 16] and the scalar `x.weight_scale_2`, by which it is multiplied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..weight_format import PLAIN, WeightFormat
from .config import QuantizationConfig
from .eight_bits import FP8, encode_eight_bits
from .encoded import WEIGHT, Encoded, StoredMatrix, refuse_dtype
from .four_bits import encode_fp4

SCALE, BLOCK_SCALE, GLOBAL = "weight_scale", "weight_scale_inv", "weight_scale_2"


@dataclass(frozen=True)
class ModelOpt:
    method: ClassVar[str] = "modelopt"

    algorithm: str

    @classmethod
    def read(cls, config: QuantizationConfig) -> ModelOpt:
        """Raises `CheckpointError`."""
        config.must_be("quant_algo", "FP8", "FP8_PB_WO", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4", "MIXED_PRECISION")
        return cls(config.text("quant_algo"))

    def encode(self, matrix: StoredMatrix) -> Encoded:
        """Raises `CheckpointError`."""
        weight = matrix.tensors.get(WEIGHT)
        if weight is not None and weight.dtype == torch.uint8:
            matrix.take(self.method, (WEIGHT, SCALE, GLOBAL))
            return encode_fp4(matrix, weight, SCALE, GLOBAL)
        role = BLOCK_SCALE if BLOCK_SCALE in matrix.tensors else SCALE
        matrix.take(self.method, (WEIGHT, role))
        if weight is None or weight.dtype != FP8:
            raise refuse_dtype(matrix.first, self.method)
        return encode_eight_bits(matrix, role)

    @property
    def declared(self) -> WeightFormat:
        blocks = {"FP8": (1, 0), "FP8_PER_CHANNEL_PER_TOKEN": (1, 0), "FP8_PB_WO": (128, 128)}
        return WeightFormat("fp8", blocks[self.algorithm]) if self.algorithm in blocks else PLAIN
