"""From the `architectures` of a config.json to the code that reads and runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import CheckpointError
from ..specs import ModelConfig
from . import minimax as minimax_config

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ...kernels import Kernels
    from ..decoder import Cache
    from ..forward_batch import ForwardBatch
    from ..loading.weights import Target
    from ..mixers.lightning_backends import LinearAttentionBackend


class CausalLM(Protocol):
    """What the engine asks of a model: an `nn.Module` whose `forward` takes a batch."""

    config: ModelConfig

    def __call__(self, batch: ForwardBatch, caches: list[Cache]) -> Tensor:
        """Hidden states [T, d] after the last layer. caches: one per layer, updated in place for the batch's slots and
        at its `slot_mapping`."""

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def compute_logits(self, h: Tensor) -> Tensor:
        """h [N, d], rows of what the forward returned, before the last norm -> logits [N, vocab]."""

    def fold_pending(self, caches: list[Cache], slots: Tensor, num_pending: Tensor) -> None:
        """Bring the tokens that wait in rings into the states of all layers. slots: [N] int32, each once; num_pending:
        [N] int32, how many tokens of each wait. A model without rings does nothing."""

    def reserve_positions(self, max_positions: int) -> None:
        """Make tables by position long enough, on the device. Called before a forward reaches those positions."""

    def position_bytes(self, max_positions: int) -> int:
        """Bytes on the device that `reserve_positions` takes, 0 for a model without such tables. Grows with the number,
        or the plan of the memory is wrong."""

    def targets(self) -> Iterator[Target]:
        """Every checkpoint tensor the model wants, and where it goes."""

    def ignored_names(self) -> set[str]:
        """Tensors that a checkpoint may hold and that are not wanted; any other strange one is refused."""


class MakeCausalLM(Protocol):
    """A model's class. On the device `meta` it takes no memory."""

    def __call__(
        self,
        config: ModelConfig,
        kernels: Kernels,
        linear_backend: LinearAttentionBackend,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> CausalLM: ...


@dataclass(frozen=True)
class Family:
    """How one architecture's config.json is read, and the module that runs it."""

    parse: Callable[[Mapping[str, Any], str], ModelConfig]  # of a config.json and its architecture
    module: Callable[[], MakeCausalLM]  # called late: reading a config needs no torch


def _minimax() -> MakeCausalLM:
    from ..decoder import MiniMaxForCausalLM

    return MiniMaxForCausalLM


FAMILIES: dict[str, Family] = {
    "MiniMaxForCausalLM": Family(minimax_config.parse_hf, _minimax),
    "MiniMaxText01ForCausalLM": Family(minimax_config.parse_original, _minimax),
    "MiniMaxM1ForCausalLM": Family(minimax_config.parse_original, _minimax),
}


def find_architecture(config: Mapping[str, Any]) -> str:
    """The architecture of a config.json. An unknown one is an error that lists the known ones."""
    names = config.get("architectures")
    for name in names if isinstance(names, list) else []:
        if isinstance(name, str) and name in FAMILIES:
            return name
    raise CheckpointError(
        f"config.json: unknown architecture ({names!r}, model_type {config.get('model_type')!r}); "
        f"supported: {', '.join(FAMILIES)}"
    )
