"""The cases of `benchmarks/kernels.py`."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from leyden.benchmarks.kernel_cases.around import OPERATIONS, AroundCase, LinearCase
from leyden.benchmarks.kernel_cases.attention import AttentionCase
from leyden.benchmarks.kernel_cases.base import Case
from leyden.benchmarks.kernel_cases.delta import DeltaCase, DeltaVerifyCase
from leyden.benchmarks.kernel_cases.experts import MoeCase, RoutingCase
from leyden.benchmarks.kernel_cases.lightning import LightningCase, VerifyCase
from leyden.benchmarks.kernel_cases.sampling import SAMPLERS, SamplingCase


def ragged_lengths() -> tuple[int, ...]:
    """16 lengths that add up to nearly 16 x 1024."""
    choose = random.Random(96)
    return tuple(choose.randint(512, 1536) for _ in range(16))


def all_cases() -> Iterator[Case]:
    for heads in (64, 16):
        yield LightningCase("1 x 2048", heads, (2048,))
        yield LightningCase("1 x 8192", heads, (8192,))
        yield LightningCase("16 ragged", heads, ragged_lengths())
        yield LightningCase("4 x 2048 + 60", heads, (2048,) * 4, 60)
        yield LightningCase("64 x 128", heads, (128,) * 64)
    for heads, label, prompts in (  # where `auto` changes its mind; peers compile anew for every number of heads
        (32, "1 x 8192", (8192,)),
        (16, "2 x 4096", (4096,) * 2),
        (16, "3 x 4096", (4096,) * 3),
        (16, "2 x 512", (512,) * 2),
        (16, "8 x 512", (512,) * 8),
        (8, "1 x 1024", (1024,)),
        (8, "4 x 2048", (2048,) * 4),
    ):
        yield LightningCase(label, heads, prompts, has_peers=False)
    for heads in (64, 16):
        for rows in (1, 8, 32, 64, 128, 256):
            yield LightningCase(f"B={rows}", heads, (), rows)
    for rows in (1, 8, 64):
        yield VerifyCase(64, rows)
    yield DeltaCase("1 x 2048", (2048,))
    yield DeltaCase("1 x 8192", (8192,))
    yield DeltaCase("16 ragged", ragged_lengths())
    yield DeltaCase("4 x 2048 + 60", (2048,) * 4, 60)
    yield DeltaCase("64 x 128", (128,) * 64)
    for rows in (1, 8, 32, 64, 128, 256):
        yield DeltaCase(f"B={rows}", (), rows)
    for rows in (1, 8, 64):
        yield DeltaVerifyCase(rows)
    for head_dim in (128, 64):
        yield AttentionCase(is_prefill=False, num_rows=64, length=4096, head_dim=head_dim)
    for rows, length in ((1, 4096), (1, 8192), (4, 2048)):
        yield AttentionCase(is_prefill=True, num_rows=rows, length=length, head_dim=128)
    for tokens in (1, 8, 32, 64, 128, 256, 8192):
        yield MoeCase(tokens)
    for tokens in (1, 128, 8192):
        yield RoutingCase(tokens)
    for channels, size in ((22016, 4096), (4096, 11008), (4096, 4096), (16384, 4096), (32000, 4096)):
        yield LinearCase(channels, size)
    for sampler in SAMPLERS:
        yield SamplingCase(sampler)
    for operation, tokens in itertools.product(OPERATIONS, (8192, 128)):
        yield AroundCase(operation, tokens)
