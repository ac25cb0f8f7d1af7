"""The places at which ranks would meet: the parts that they compute add up to the whole there."""

from __future__ import annotations

import pytest
import torch
from leyden.kernels import load
from leyden.models.layers.build import Build
from leyden.models.layers.experts import SparseMoe
from leyden.models.layers.mlp import DenseMlp
from leyden.models.layers.projection import Projection
from leyden.models.layers.shard import Shard
from leyden.models.loading.noise import fill_with_noise
from leyden.models.loading.target import Cut
from leyden.models.specs import ExpertsSpec, SoftmaxRoute
from torch import Tensor, nn

HIDDEN, WIDTH, RANKS = 12, 8, 2


class Recorder(Shard):
    """A lone rank that keeps what it is asked to sum."""

    def sum(self, x: Tensor) -> Tensor:
        object.__setattr__(self, "summed", x.clone())
        return x


def make(part, shard: Shard) -> nn.Module:
    return part(Build(load("torch"), torch.device("cpu"), torch.float32, shard))


def dense(width: int):
    return lambda build: DenseMlp(HIDDEN, width, build)


def experts(width: int):
    return lambda build: SparseMoe(HIDDEN, ExpertsSpec(width, 3, 2, SoftmaxRoute()), build)


def output(width: int):
    return lambda build: Projection(width, {"out": HIDDEN}, build, split="in")


@pytest.mark.parametrize(("part", "features"), [(dense, HIDDEN), (experts, HIDDEN), (output, WIDTH)], ids=str)
@torch.inference_mode()
def test_parts_of_the_inner_width_add_up_to_the_whole_where_ranks_sum(part, features):
    whole = make(part(WIDTH), Shard())
    fill_with_noise(whole.parameters(), std=0.5)
    stored = {target.name: target.view for target in whole.targets("")}
    x = torch.randn(5, features, generator=torch.Generator().manual_seed(1))
    total = torch.zeros(5, HIDDEN)
    for rank in range(RANKS):
        shard = Recorder()
        module = make(part(WIDTH // RANKS), shard)
        for target in module.targets(""):
            if not target.covers:
                (dim,) = [d for d, n in enumerate(target.view.shape) if n != stored[target.name].shape[d]] or [None]
                cut = Cut(dim, rank, RANKS) if dim is not None else None
                target.view.copy_(stored[target.name] if cut is None else cut.part(stored[target.name]))
        module(x.chunk(RANKS, dim=1)[rank] if features == WIDTH else x)
        total += shard.summed
    assert torch.allclose(total, whole(x), atol=1e-5)


def test_more_than_one_rank_is_refused():
    for rank, size in ((0, 2), (1, 1)):
        with pytest.raises(NotImplementedError, match=f"rank {rank} of {size}"):
            Shard(rank, size)
