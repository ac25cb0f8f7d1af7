"""The gated delta rule with its short convolution: all that lies between the projections of a gated delta net.

Of one token at one value head, with S [V, K] the state that the tokens before it left:

    q, k, v = silu(conv4(raw));   q = l2(q) / sqrt(K);   k = l2(k);   l2(x) = x / sqrt(sum x^2 + 1e-6)
    g = -e^{decay} softplus(step + step_bias);   beta = sigmoid(strength)
    u = beta (v - e^g S k);   S = e^g S + u k^T;   o = S q

"Gated Delta Networks: Improving Mamba2 with Delta Rule" (Yang et al. 2024). Value head h takes the key and the query of
key head h // (Hv / Hk). `conv4` weighs a channel's last four raw values, the token's own last; zeros stand before
position 0. All of it is computed in float32, but for long products, which take the inputs' dtype and float32 sums.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from ..bundles import Rows

TAPS = 4  # of the convolution, and places of a tail: a token and the three before it
CHUNK = 64  # tokens that a prompt's row is cut into, at multiples of 64 of its sequence's positions


class DeltaInputs(NamedTuple):
    """The projections of each token, in float32, bfloat16 or float16."""

    raw: Tensor  # [T, C], C = 2 Hk K + Hv V: queries of all key heads, keys of all, values of all value heads
    step: Tensor  # [T, Hv]
    strength: Tensor  # [T, Hv]


class DeltaWeights(NamedTuple):
    """A layer's own parameters, all float32."""

    conv: Tensor  # [TAPS, C], the token's own tap last
    decay: Tensor  # [Hv], the logarithm that checkpoints call A_log
    step_bias: Tensor  # [Hv], called dt_bias


class DeltaState(NamedTuple):
    """The sequences' states in the slots, as of the last token that does not wait in a ring."""

    state: Tensor  # [num_slots, Hv, V, K] in any float dtype
    tail: Tensor  # [num_slots, TAPS, C] in the inputs' dtype; raw values of the token at position t at place t % TAPS


class DeltaRing(NamedTuple):
    """The last tokens of each slot, which its state does not hold yet. N = places of a slot, 16.

    A correction u is final once it is computed: it depends on no later token, and the count alone drops a rejected one.
    So tokens that wait are folded by sums, without a solve.
    """

    key: Tensor  # [num_slots, Hk, N, K], k as it was used
    correction: Tensor  # [num_slots, Hv, N, V], u
    decay: Tensor  # [num_slots, Hv, N] float32, the sum of g since the last fold, the token's own included
    raw: Tensor  # [num_slots, 1, N, C] in the inputs' dtype
    num_pending: Tensor  # [B] int32, tokens that wait in each row's ring, 0 .. N, oldest first


class Delta(Protocol):
    """Common to all: `context_lens` [B] int32 counts the tokens of each row's sequence before its first one here, those
    that wait in a ring included; out: [T, Hv, V] in the inputs' dtype, written and returned. `state` and `tail` are
    updated in place for the rows' slots, other slots stay untouched bit for bit. Where `rows.continues` is False the
    slot's content is ignored. A padding row writes zeros to its part of `out` and nothing to a pool.
    """

    def prefill(
        self,
        inputs: DeltaInputs,
        weights: DeltaWeights,
        pool: DeltaState,
        rows: Rows,
        context_lens: Tensor,
        places: Tensor,
        snapshots: DeltaState,
        out: Tensor,
    ) -> Tensor:
        """Rows of any length, none of whose tokens wait in a ring.

        places: [S, 3] int32, each (b, n, c): what row b's slot would hold after the first n >= 1 of its tokens goes to
        snapshots[c]; context_lens[b] + n is a multiple of CHUNK; c = -1 = padding. The places are sorted by b and n, or
        else states and outputs are wrong. `snapshots` may have another dtype than the pool.
        """

    def decode(
        self,
        inputs: DeltaInputs,
        weights: DeltaWeights,
        pool: DeltaState,
        rows: Rows,
        context_lens: Tensor,
        out: Tensor,
    ) -> Tensor:
        """Rows of one token: inputs and out are of the rows alone, [B, ...]."""

    def replay(
        self,
        inputs: DeltaInputs,
        weights: DeltaWeights,
        pool: DeltaState,
        ring: DeltaRing,
        rows: Rows,
        context_lens: Tensor,
        out: Tensor,
    ) -> Tensor:
        """`decode` that writes the state once per N tokens.

        The token is appended to the row's ring, in place. Where that makes N or more, or the row is new, all waiting
        tokens are folded into state and tail, and the caller's count must return to 0. Otherwise it goes up by one.
        """

    def verify(
        self,
        inputs: DeltaInputs,
        weights: DeltaWeights,
        pool: DeltaState,
        ring: DeltaRing,
        rows: Rows,
        context_lens: Tensor,
        out: Tensor,
    ) -> Tensor:
        """Rows of a few tokens, of which perhaps only the first will be kept: state and tail are read, never written.

        A row's m tokens see the state, the p = num_pending[b] tokens that wait in the ring, and each other. They are
        left in the ring at places p .. p + m - 1; p + m <= N is the caller's duty. The next num_pending says how many
        are kept; later ones are overwritten. In a new row p counts as 0, and nothing of the slot is read. Padding rows
        may be of any length.
        """

    def fold(self, pool: DeltaState, ring: DeltaRing, slots: Tensor, context_lens: Tensor) -> None:
        """Fold the waiting tokens of some slots into their states and tails, in place; afterwards none wait.

        slots: [B] int32, each once; ring.num_pending and context_lens belong to them. Slot -1 and slots where no token
        waits are left alone with any content.
        """
