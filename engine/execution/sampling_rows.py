"""The sampling parameters of a step's rows, gathered on the host as arrays."""

from __future__ import annotations

from array import array
from typing import NamedTuple

import numpy as np

from ..sampling_params import SamplingParams
from ..sequence import UNSEEN, Sequence
from .arrays import Arrays

_MASK64 = (1 << 64) - 1
_BELOW_ONE = np.float32(1 - 2**-24)
_NO_INTS = np.empty(0, dtype=np.int64)


class Bias(NamedTuple):
    table: array[int]  # the block table of the bias's sequence
    token_ids: np.ndarray  # [N] int64
    values: np.ndarray  # [N] float32, added to the logits


class SlotFacts:
    """Facts of the sequences in the slots. A sequence gets a new block table with each slot, so a fact that was noted
    with another table is a former owner's."""

    def __init__(self) -> None:
        self._counted: dict[int, array[int]] = {}  # tables of sequences whose tokens the sampler has counted
        self._biases: dict[int, Bias] = {}

    def count(self, sequence: Sequence, slot: int) -> bool:
        """Whether the sampler has yet to count the sequence's tokens in this slot; they count as counted afterwards."""
        is_new = self._counted.get(slot) is not sequence.block_table
        self._counted[slot] = sequence.block_table
        return is_new

    def bias(self, sequence: Sequence, slot: int) -> Bias:
        """The sequence's logit bias as arrays, made once per slot and sequence."""
        found = self._biases.get(slot)
        if found is None or found.table is not sequence.block_table:
            bias = sequence.sampling_params.logit_bias or {}
            ids, values = np.fromiter(bias, np.int64, len(bias)), np.fromiter(bias.values(), np.float32, len(bias))
            found = self._biases[slot] = Bias(sequence.block_table, ids, values)
        return found


class SamplingRows:
    """The sequences of a step in their slots. Steps with the same rows share it: only `arrays` changes."""

    def __init__(self, sequences: list[Sequence], slots: list[int], facts: SlotFacts) -> None:
        self.sequences = sequences
        self.slots = slots
        self._facts = facts
        params = [sequence.sampling_params for sequence in sequences]
        self.num_top = [p.logprobs for p in params]  # per row, alternatives wanted; None = no log-probabilities at all
        self.seeds = np.array([sequence.seed & _MASK64 for sequence in sequences], dtype=np.uint64)
        self.is_drawn = any(not p.is_greedy for p in params)
        self._biased = [(row, facts.bias(sequences[row], slots[row])) for row, p in enumerate(params) if p.logit_bias]
        self._unended = [row for row, p in enumerate(params) if p.min_tokens]
        self._bias_arrays: Arrays | None = None  # of `_biased` alone, the same in every step
        self._penalised = [row for row, p in enumerate(params) if p.is_penalised]
        self._constrained = [row for row, sequence in enumerate(sequences) if sequence.grammar is not None]
        wants_logprobs = any(num is not None for num in self.num_top)
        self.is_plain = not (self._biased or self._unended or self._penalised or self._constrained or wants_logprobs)
        self.constant = self._constant_arrays(params)

    def arrays(self, vocab_size: int, indices: list[int]) -> Arrays:
        """The fields of `SamplingBatch` by name. indices: of each row's new token in its answer. Tokens of sequences
        with penalties count as counted afterwards, so the caller must run the step."""
        numbers = np.zeros(len(self.sequences), dtype=np.float32)
        if self.is_drawn:
            numbers = draws(self.seeds, np.array(indices))
        parts = (self._bias(vocab_size), self._tokens_to_count(vocab_size), self._masks(vocab_size))
        return {"uniform": numbers, **self.constant, **parts[0], **parts[1], **parts[2]}

    def _constant_arrays(self, params: list[SamplingParams]) -> Arrays:
        penalised = [params[row] for row in self._penalised]
        # Far below 1e-6 the division would overflow; every such temperature is greedy but for exact ties.
        temperatures = [p.temperature and max(p.temperature, 1e-6) for p in params]
        return {
            "slots": np.array(self.slots, dtype=np.int32),
            "temperature": np.array(temperatures, dtype=np.float32),
            "top_k": np.array([max(p.top_k, 0) for p in params], dtype=np.int32),
            "top_p": np.array([p.top_p for p in params], dtype=np.float32),
            "min_p": np.array([p.min_p for p in params], dtype=np.float32),
            "logprob_rows": np.array([row for row, num in enumerate(self.num_top) if num is not None], dtype=np.int64),
            "penalised_rows": np.array(self._penalised, dtype=np.int64),
            "penalised_slots": np.array([self.slots[row] for row in self._penalised], dtype=np.int64),
            "repetition": np.array([p.repetition_penalty for p in penalised], dtype=np.float32),
            "presence": np.array([p.presence_penalty for p in penalised], dtype=np.float32),
            "frequency": np.array([p.frequency_penalty for p in penalised], dtype=np.float32),
        }

    def _bias(self, vocab_size: int) -> Arrays:
        """The rows' logit bias, and -inf for the stop ids that `min_tokens` still forbids."""
        if self._bias_arrays is None:
            at = [_NO_INTS, *(row * vocab_size + bias.token_ids for row, bias in self._biased)]
            values = [np.empty(0, dtype=np.float32), *(bias.values for _, bias in self._biased)]
            self._bias_arrays = {"bias_at": np.concatenate(at), "bias": np.concatenate(values)}
        waiting = [(row, self.sequences[row]) for row in self._unended]
        waiting = [(row, s) for row, s in waiting if s.num_output_tokens < s.sampling_params.min_tokens]
        forbidden = [row * vocab_size + token for row, s in waiting for token in s.stop_ids]
        if not forbidden:
            return self._bias_arrays
        never = np.full(len(forbidden), -np.inf, dtype=np.float32)
        return {
            "bias_at": np.concatenate([self._bias_arrays["bias_at"], forbidden]),
            "bias": np.concatenate([self._bias_arrays["bias"], never]),
        }

    def _masks(self, vocab_size: int) -> Arrays:
        """The tokens that the rows' grammars allow, one bit each. Computed while the device runs the step before."""
        mask = np.zeros((len(self._constrained), -(-vocab_size // 32)), dtype=np.int32)
        for bits, row in zip(mask, self._constrained, strict=True):
            grammar = self.sequences[row].grammar
            assert grammar is not None
            grammar.fill(bits)
        return {"mask_rows": np.array(self._constrained, dtype=np.int64), "mask": mask}

    def _tokens_to_count(self, vocab_size: int) -> Arrays:
        """All tokens of the sequences that the sampler has not counted in their slots."""
        fresh, prompts, answers = [], [_NO_INTS], [_NO_INTS]
        for row in self._penalised:
            sequence, slot = self.sequences[row], self.slots[row]
            if self._facts.count(sequence, slot):
                assert UNSEEN not in sequence.output_token_ids
                fresh.append(slot)
                prompts.append(np.array(sequence.prompt_token_ids, dtype=np.int64) + slot * vocab_size)
                answers.append(np.array(sequence.output_token_ids, dtype=np.int64) + slot * vocab_size)
        return {
            "fresh_slots": np.array(fresh, dtype=np.int64),
            "prompt_at": np.concatenate(prompts),
            "answer_at": np.concatenate(answers),
        }


def draws(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """`uniform` as float32, rounded so that it stays below 1."""
    return np.minimum(uniform(seeds, positions).astype(np.float32), _BELOW_ONE)


def uniform(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """[.., N] float64 in [0, 1) from seeds [N] uint64 and positions [.., N]: splitmix64 (Steele et al. 2014)."""
    z = seeds * np.uint64(0xD1342543DE82EF95)
    z = z + (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53
