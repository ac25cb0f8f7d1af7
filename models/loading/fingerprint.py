"""A hash that tells two models apart: of the spec, and of the bits of every parameter as they were loaded."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..specs import ModelSpec

SAMPLED = 1024  # items of each parameter, beside the sum of all
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.inference_mode()
def fingerprint(spec: ModelSpec, model: nn.Module) -> str:
    """sha256, in hex, of the spec without its stop ids, and of each parameter's name, dtype, shape, sum of all bits as
    integers, and some of its items. Reads every parameter once, on its device; takes no memory of their size."""
    named = sorted(model.named_parameters())
    digest = hashlib.sha256(repr(replace(spec, eos_token_ids=())).encode())
    sums = torch.stack([_sum(parameter) for _, parameter in named]).cpu().numpy()
    samples = [_sample(parameter) for _, parameter in named]
    joined = torch.cat(samples).cpu().numpy()
    ends = [0, *torch.tensor([len(sample) for sample in samples]).cumsum(0).tolist()]
    for (name, parameter), total, (start, end) in zip(named, sums, pairwise(ends), strict=True):
        digest.update(f"{name} {parameter.dtype} {list(parameter.shape)} {total}".encode())
        digest.update(joined[start:end].tobytes())
    return digest.hexdigest()


def _bits(parameter: Tensor) -> Tensor:
    """[N] integers."""
    return parameter.detach().reshape(-1).view(INTEGERS[parameter.dtype.itemsize])


def _sum(parameter: Tensor) -> Tensor:
    """The sum of the bits as integers, modulo 2^64. Eight bytes at a time where the size allows, since narrower items
    would have to be widened first."""
    bits = _bits(parameter)
    return bits.view(torch.int64).sum() if parameter.nbytes % 8 == 0 else bits.sum(dtype=torch.int64)


def _sample(parameter: Tensor) -> Tensor:
    """About SAMPLED items as integers, evenly spread: [N] int64."""
    bits = _bits(parameter)
    return bits[:: max(1, len(bits) // SAMPLED)].to(torch.int64)
