"""How the linear layers of a model are computed for a step: for each kind of mixer, its backends by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ...kernels import Kernels
from ..specs import ModelSpec
from .backend import BackendFactory, LinearBackend
from .delta_backends import DELTA_BACKENDS
from .lightning_backends import LIGHTNING_BACKENDS

# By `kind` of the mixer's spec. The names are values of the setting `linear_backend`.
LINEAR_BACKENDS: dict[str, dict[str, BackendFactory[Any]]] = {
    "lightning": LIGHTNING_BACKENDS,
    "gated_delta": DELTA_BACKENDS,
}


class LinearBackends(NamedTuple):
    """The backend of each kind of linear mixer in a model. All of them agree on the ring."""

    by_kind: Mapping[str, LinearBackend[Any]]

    @property
    def name(self) -> str:
        """Never `auto`."""
        return ", ".join(dict.fromkeys(backend.name for backend in self.by_kind.values()))

    @property
    def ring_size(self) -> int:
        return next(iter(self.by_kind.values())).ring_size

    @property
    def replays(self) -> bool:
        return next(iter(self.by_kind.values())).replays

    @property
    def prompts_in_graphs(self) -> bool:
        return all(backend.prompts_in_graphs for backend in self.by_kind.values())


def linear_kinds(spec: ModelSpec) -> list[str]:
    """The kinds of the model's mixers that have backends, in the order of first appearance."""
    return [kind for kind in spec.layer_counts if kind in LINEAR_BACKENDS]


def backend_names(spec: ModelSpec) -> list[str]:
    """The names that every kind of linear mixer in the model has a backend for."""
    first, *others = (LINEAR_BACKENDS[kind] for kind in linear_kinds(spec))
    return [name for name in first if all(name in other for other in others)]


def build_backends(name: str, spec: ModelSpec, kernels: Kernels, *, speculative: bool = False) -> LinearBackends:
    """The backends called `name`, one of `backend_names`. `speculative`: as of `BackendFactory`."""
    made = {kind: LINEAR_BACKENDS[kind][name](kernels, speculative=speculative) for kind in linear_kinds(spec)}
    assert len({(backend.ring_size, backend.replays) for backend in made.values()}) == 1, f"{name}: rings differ"
    return LinearBackends(made)
