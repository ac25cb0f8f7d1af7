"""How lightning attention is computed for a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ...kernels import Kernels
from ...kernels.bundles import Ring, Rows
from ...kernels.lightning.contract import Lightning
from ..forward_batch import ForwardBatch, RowsOfKind
from .backend import RING_SIZE, BackendFactory
from .cache import LayerCache


def ring_of(cache: LayerCache, num_pending: Tensor) -> Ring:
    """A layer's keys and values that wait. num_pending: [B] int32, of the rows in question."""
    key, value = cache.ring
    return Ring(key, value, num_pending)


class LightningCall(NamedTuple):
    """The arguments of one layer for a step."""

    q: Tensor  # [T, H, K]
    k: Tensor  # [T, H, K]
    v: Tensor  # [T, H, V]
    slopes: Tensor  # [H] float32
    scale: float
    cache: LayerCache  # one state [num_slots, H, K, V], and a ring's keys and values; updated in place
    batch: ForwardBatch
    out: Tensor  # [T, H, V], written

    @property
    def state(self) -> Tensor:
        """[num_slots, H, K, V]."""
        return self.cache.slot[0]

    def ring(self, part: RowsOfKind) -> Ring:
        return ring_of(self.cache, part.num_pending)


class MinimaxBackend:
    """Prefill parallel over chunks of all prompts at once, decode by its own kernel.

    Best for few heads and long prompts: a single prompt still fills the device.
    """

    name = "minimax"
    replays = False
    prompts_in_graphs = True

    def __init__(self, kernels: Kernels, *, speculative: bool = False) -> None:
        self.lightning = kernels.lightning
        self.ring_size = RING_SIZE if speculative else 0

    def forward(self, call: LightningCall) -> Tensor:
        batch = call.batch
        if batch.prompts:
            _walk(self.lightning.minimax, call, batch.prompts)
        if batch.drafts:
            _verify(self.lightning, call, batch.drafts)
        if batch.decodes:
            _decode(self.lightning, call, batch.decodes)
        return call.out


class SegLaBackend:
    """One launch walks every row, prefill and decode alike, with the state in registers. Best for many rows."""

    name = "seg_la"
    replays = False
    prompts_in_graphs = True

    def __init__(self, kernels: Kernels, *, speculative: bool = False) -> None:
        self.lightning = kernels.lightning
        self.ring_size = RING_SIZE if speculative else 0

    def forward(self, call: LightningCall) -> Tensor:
        batch = call.batch
        if not batch.drafts:
            q, k, v, out = call.q, call.k, call.v, call.out
            return self.lightning.seg_la(q, k, v, call.slopes, call.scale, call.state, batch.rows, out)
        if batch.prompts:  # drafts lie between them and the decode rows
            _walk(self.lightning.seg_la, call, batch.prompts)
        _verify(self.lightning, call, batch.drafts)
        if batch.decodes:
            _decode(self.lightning, call, batch.decodes)
        return call.out


class ReplayBackend:
    """Decode that seldom writes the state: the last tokens wait in a ring per slot, and are folded into the state when
    it is full. The fastest backend, for an eighth more memory per float32 state.

    Prompts go to seg_la, but a few long prompts of few heads go to minimax. seg_la walks a row from end to end, so it
    fills a device with rows x heads alone. minimax cuts long rows up, but reads keys and values twice. On an H100
    (`docs/kernels.md`) the two are equally fast at about 40 long rows x heads.
    """

    MIN_PARALLEL = 40  # long rows x heads
    LONG_PROMPT = 1024  # tokens; shorter ones are over before a second launch would help
    name = "replay"
    replays = True
    prompts_in_graphs = True
    ring_size = RING_SIZE

    def __init__(self, kernels: Kernels, *, speculative: bool = False) -> None:
        self.lightning = kernels.lightning

    def forward(self, call: LightningCall) -> Tensor:
        batch = call.batch
        if batch.prompts:
            _walk(self._for_prompts(call, batch.prompts), call, batch.prompts)
        if batch.drafts:
            _verify(self.lightning, call, batch.drafts)
        if batch.decodes:
            _replay(self.lightning, call, batch.decodes)
        return call.out

    def _for_prompts(self, call: LightningCall, prompts: RowsOfKind) -> WalkOperation:
        longest = prompts.rows.max_len
        long_rows = prompts.tokens.stop / longest  # as many as the tokens would make
        if long_rows * call.q.shape[1] < self.MIN_PARALLEL and longest >= self.LONG_PROMPT:
            return self.lightning.minimax
        return self.lightning.seg_la


LIGHTNING_BACKENDS: dict[str, BackendFactory[LightningCall]] = {
    "auto": ReplayBackend,  # the fastest by measurement: for prompts by their shape, and for decode
    "minimax": MinimaxBackend,
    "seg_la": SegLaBackend,
    "replay": ReplayBackend,
}


WalkOperation = Callable[[Tensor, Tensor, Tensor, Tensor, float, Tensor, Rows, Tensor], Tensor]  # minimax, seg_la


def _walk(operation: WalkOperation, call: LightningCall, part: RowsOfKind) -> None:
    """Rows of any length, into their states. The operation sees no token behind theirs: it sizes its launch by them."""
    q, k, v, out = (x[: part.tokens.stop] for x in (call.q, call.k, call.v, call.out))
    operation(q, k, v, call.slopes, call.scale, call.state, part.rows, out)


def _verify(lightning: Lightning, call: LightningCall, part: RowsOfKind) -> None:
    """Rows with drafts, into their rings and not into their states."""
    q, k, v, out = call.q, call.k, call.v, call.out
    lightning.verify(q, k, v, call.slopes, call.scale, call.state, call.ring(part), part.rows, out)


def _decode(lightning: Lightning, call: LightningCall, part: RowsOfKind) -> None:
    """Rows of one token, into their states."""
    q, k, v, out = (x[part.tokens] for x in (call.q, call.k, call.v, call.out))
    lightning.decode(q, k, v, call.slopes, call.scale, call.state, part.rows, out)


def _replay(lightning: Lightning, call: LightningCall, part: RowsOfKind) -> None:
    """Rows of one token, into their rings, and into their states where a ring is full."""
    q, k, v, out = (x[part.tokens] for x in (call.q, call.k, call.v, call.out))
    lightning.replay(q, k, v, call.slopes, call.scale, call.state, call.ring(part), part.rows, out)
