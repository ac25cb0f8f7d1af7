"""From a scheduled batch to a step's input, on the scheduler's side."""

from __future__ import annotations

from typing import NamedTuple

from ..memory.ring import RingRule
from ..scheduling.step import ScheduledBatch
from ..sequence import Sequence
from .arrays import Arrays, packed
from .block_tables import SentBlocks
from .counts import Counts
from .decode_rows import DecodeRows, TokenSink
from .graph_shapes import SNAPSHOTS
from .padding import GraphInputs, pad, places_of_draws
from .prompt_scores import wanted_scores
from .sampling_rows import SamplingRows, SlotFacts
from .step_input import StepInput, batch_arrays


class Receivers(NamedTuple):
    """The sequence of each token that a step draws. With drafts a sequence comes once for each of its tokens."""

    sequences: list[Sequence]
    indices: list[int]  # of each token in its sequence's answer
    sink: TokenSink | None = None  # writes all tokens at once; valid as long as none of the sequences has finished


class StepComposer:
    """Makes the inputs of steps, in the order in which the steps run. Remembers the rows of the last step, and which
    blocks the device has.

    inputs: the shapes of the runner's graphs, perhaps none. ring: the rule of the runner's linear backend.
    """

    def __init__(
        self, blocks: SentBlocks, inputs: GraphInputs, *, block_size: int, vocab_size: int, ring: RingRule
    ) -> None:
        self._blocks = blocks
        self._inputs = inputs
        self._block_size = block_size
        self._vocab_size = vocab_size
        self._ring = ring
        self._facts = SlotFacts()
        self._sampling = SamplingRows([], [], self._facts)
        self._decoding: DecodeRows | None = None  # the last step, if it had plain decode rows alone and a graph

    def compose(self, scheduled: ScheduledBatch) -> tuple[StepInput, Receivers]:
        """The batch's input, and the receivers of its tokens. Its blocks and penalised tokens count as known to the
        device from here on, so the caller must run it."""
        rows, advance = self._decoding, scheduled.advance
        if rows is not None and advance is not None and advance.before is rows.sequences:
            rows.advance(advance)
            return rows.step_input({}, scheduled.operations), Receivers(rows.sequences, rows.indices, rows.sink)
        self._decoding = rows = self._decode_rows(scheduled)
        if rows is not None:
            cells = self._blocks.new_cells(scheduled.sequences)
            return rows.step_input(cells, scheduled.operations), Receivers(rows.sequences, rows.indices)
        return self._compose_anew(scheduled)

    def sampling_rows(self, sequences: list[Sequence]) -> SamplingRows:
        """The sampling parameters of these sequences in their slots; most steps have the rows of the step before."""
        slots = [slot for sequence in sequences if (slot := sequence.state_slot) is not None]
        if self._sampling.sequences != sequences or self._sampling.slots != slots:
            self._sampling = SamplingRows(sequences, slots, self._facts)
        return self._sampling

    def _decode_rows(self, scheduled: ScheduledBatch) -> DecodeRows | None:
        """The rows of a step of plain decode rows that has a graph; None for other steps."""
        if scheduled.num_prefills or self._inputs.shape_of_decodes(scheduled.num_decodes) is None:
            return None
        wanted = self.sampling_rows(scheduled.sequences)
        if not wanted.is_plain:
            return None
        return DecodeRows(self._inputs, self._blocks, scheduled, wanted, self._block_size, self._ring)

    def _compose_anew(self, scheduled: ScheduledBatch) -> tuple[StepInput, Receivers]:
        counts = Counts.of(scheduled)
        receivers = Receivers(*_drawn_rows(scheduled))
        sampling = self.sampling_rows(receivers.sequences)
        batch = batch_arrays(scheduled, self._block_size)
        draws = sampling.arrays(self._vocab_size, receivers.indices)
        cells = self._blocks.new_cells(scheduled.sequences)
        step = StepInput(
            arrays=cells | draws | batch,
            num_draws=len(receivers.sequences),
            counts=counts,
            num_columns=max(len(sequence.block_table) for sequence in scheduled.sequences),
            num_top=sampling.num_top,
            scores=wanted_scores(scheduled),
            operations=scheduled.operations,
        )
        shape = self._inputs.shape_for(counts)
        if shape is None or step.scores or len(scheduled.snapshots) > SNAPSHOTS:
            return step, receivers
        places = places_of_draws(scheduled.completing_rows, counts, shape)
        padded = pad(batch | draws, counts, shape, places)
        own: Arrays = cells | {"places": places} | ({} if sampling.is_plain else draws)
        return step.from_graph(shape, packed(padded), own, is_plain=sampling.is_plain), receivers


def _drawn_rows(scheduled: ScheduledBatch) -> tuple[list[Sequence], list[int]]:
    """The sequence of each token that is drawn, and the token's index in the sequence's answer."""
    if not scheduled.num_drafted:
        rows = [scheduled.sequences[row] for row in scheduled.completing_rows]
        return rows, [len(sequence.output_token_ids) for sequence in rows]
    drafted = list(zip(scheduled.sequences, scheduled.drafts, strict=True))
    rows = [s for s, drafts in drafted for _ in range(1 + len(drafts))]
    return rows, [s.num_output_tokens + i for s, drafts in drafted for i in range(1 + len(drafts))]
