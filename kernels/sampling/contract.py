"""From a row of logits to a token."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Sample(Protocol):
    def __call__(
        self, logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
    ) -> Tensor:
        """The next token of each row; rows do not depend on each other.

        logits: [N, V], float32, bfloat16 or float16; all others [N], float32, but top_k int32. temperature 0 takes the
        largest logit, of equal ones the first. Otherwise p = softmax(logits / temperature); kept are the tokens with p
        of at least min_p of the largest, then the top_k most likely (0 = all), then the fewest of these, in descending
        order, whose share reaches top_p (1 = all); tokens as likely as the last kept one are kept too. The token drawn
        is the first, in the order of the vocabulary, at which the share of the kept ones exceeds uniform in [0, 1).

        Returns [N] int32; -1 where a logit is NaN or +inf, or all are -inf.
        """
