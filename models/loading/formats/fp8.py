"""Fine-grained FP8, as in the official checkpoints of Qwen, Ling and DeepSeek: blocks of 128 x 128 share a scale.

`x.weight` float8_e4m3fn [N, K], `x.weight_scale_inv` [N / 128, K / 128], rounded up; item = value * scale, although the
name says inverse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...errors import CheckpointError
from ..weight_format import PLAIN, WeightFormat
from .config import QuantizationConfig
from .eight_bits import BLOCK, FP8, POWERS, encode_eight_bits
from .encoded import WEIGHT, Encoded, StoredMatrix, refuse_dtype
from .four_bits import encode_fp4

SCALE = "weight_scale_inv"


@dataclass(frozen=True)
class FineGrainedFp8:
    method: ClassVar[str] = "fp8"

    block: tuple[int, int]

    @classmethod
    def read(cls, config: QuantizationConfig) -> FineGrainedFp8:
        """Raises `CheckpointError`."""
        config.must_be("fmt", "e4m3")
        config.must_be("scale_fmt", "ue8m0")
        config.must_be("routed_experts_quant_method", "mxfp4")
        block = config.get("weight_block_size", [BLOCK, BLOCK])
        if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
            raise CheckpointError(f"{config.file}: weight_block_size must be two positive integers, got {block!r}")
        return cls((block[0], block[1]))

    def encode(self, matrix: StoredMatrix) -> Encoded:
        """Raises `CheckpointError`."""
        matrix.take(self.method, (WEIGHT, SCALE))
        weight = matrix.tensors[WEIGHT]
        if weight.dtype == torch.uint8 and matrix.tensors[SCALE].dtype in POWERS:
            return encode_fp4(matrix, weight, SCALE)  # experts in mxfp4, as Ling's fp4 checkpoints have them
        if weight.dtype != FP8:
            raise refuse_dtype(weight, self.method)
        return encode_eight_bits(matrix, SCALE, self.block)

    @property
    def declared(self) -> WeightFormat:
        return WeightFormat("fp8", self.block) if self.block == (BLOCK, BLOCK) else PLAIN
