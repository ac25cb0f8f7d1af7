"""The batch contract between the engine and the models.

One flat token axis of T tokens without padding inside. Rows are sequences: **prefill (extend) rows first, then decode
rows**. `context_lens` tells whether a row is new or continues, never its number of tokens: a one-token prompt is a
prefill row.

The last of the prefill rows may be *verify rows*. A verify row continues a sequence; all of its tokens but the first
are drafts, of which perhaps only the first few will be kept. Softmax attention treats verify rows as prefill rows. A
linear layer must not write tokens into a state that may be rejected. It leaves them in the slot's ring of C places, and
the next `num_pending` says how many of them are kept. The host counts the waiting tokens. Before a row that may not
meet waiting tokens, `Decoder.fold_pending` must have folded them:

| row of m tokens, p waiting | before the step | waiting afterwards |
|---|---|---|
| prefill | p = 0 | 0 |
| verify | p + m <= C | p + kept |
| decode by a backend that `replays` | any p <= C | p + 1, or 0 from p = C - 1 on |
| decode by another | p = 0 | 0 |

| here | also known as |
|---|---|
| query_start_loc | cu_seqlens, q_offsets |
| extend_start_loc | the same for the prefill rows alone |
| context_lens | extend_prefix_lens, num_computed_tokens |
| has_initial_state | s_scales |
| state_indices | s_offsets, slot_id, mamba cache indices |
| slot_mapping | out_cache_loc |
| block_table | req_to_token, by request; elsewhere by row of the batch |
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal, NamedTuple, get_type_hints

from torch import Tensor

from ..kernels.bundles import Rows


class RowsOfKind(NamedTuple):
    """Rows of one kind in a step. All tensors are views of the batch's own: a CUDA graph's inputs change under them."""

    rows: Rows  # `starts` counts from the step's first token
    tokens: slice  # the rows' tokens on the token axis
    context_lens: Tensor  # [B] int32
    num_pending: Tensor  # [B] int32


class Each(NamedTuple):
    """The axis of a step's tensor, and the value of its padding entries.

    axis: "token" [T], "row" [B], "start" [B + 1], "draw" [N] (a row of logits) or "snapshot" [S].
    per_step: added to a row's entry from one of its decode steps to the next.
    """

    axis: Literal["token", "row", "start", "draw", "snapshot"]
    dtype: str
    padding: int = 0
    per_step: int = 0


def layout_of(kind: type) -> dict[str, Each]:
    """The annotated fields of a class, in their order. Packing, padding for graphs and the continuation of decode rows
    follow from them: a field is declared nowhere else."""
    hints = get_type_hints(kind, include_extras=True).items()
    marks = {name: getattr(hint, "__metadata__", ()) for name, hint in hints}
    return {name: mark[0] for name, mark in marks.items() if mark and isinstance(mark[0], Each)}


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """All that a model needs to know of one step: tensors on the device, and the counts that a launch needs as ints.

    Built complete by `engine.execution.step_input.make_batch` and never changed.
    """

    input_ids: Annotated[Tensor, Each("token", "int64")]
    # 0-based position of each token in its sequence.
    positions: Annotated[Tensor, Each("token", "int64", per_step=1)]
    # [B + 1], start of each row on the token axis.
    query_start_loc: Annotated[Tensor, Each("start", "int32")]
    # Tokens computed before this step.
    context_lens: Annotated[Tensor, Each("row", "int32", padding=-1, per_step=1)]
    # context_lens > 0; False = the state slot is dirty and must be ignored.
    has_initial_state: Annotated[Tensor, Each("row", "bool")]
    # Slot of each row in the state pool and in block_table; -1 = padding row.
    state_indices: Annotated[Tensor, Each("row", "int32", padding=-1)]
    # Computed tokens that wait in the slot's ring, not yet in its state.
    num_pending: Annotated[Tensor, Each("row", "int32")]
    # Where each token's key and value go: block * block_size + offset.
    slot_mapping: Annotated[Tensor, Each("token", "int64", padding=-1, per_step=1)]
    # [N], the last token of each row whose next token is wanted.
    logits_indices: Annotated[Tensor, Each("draw", "int64")]
    # [S, 3], (row, tokens, snapshot), sorted: states to save on the way; snapshot -1 = padding.
    snapshots: Annotated[Tensor, Each("snapshot", "int32", padding=-1)]
    block_table: Tensor  # [num_slots, M] int32, the KV blocks of each slot; no entry past a row's end is read
    num_prefills: int
    num_prefill_tokens: int
    num_decodes: int
    max_query_len: int  # longest prefill row; 1 when there is none
    num_drafted: int = 0  # how many of the prefill rows, the last ones, are verify rows
    num_drafted_tokens: int = 0  # tokens of the verify rows

    # Made from the fields above once per step, so that no layer slices them again. None = the step has no such rows.
    rows: Rows = field(init=False)  # all rows
    prefills: RowsOfKind | None = field(init=False)  # prompts, then drafts
    prompts: RowsOfKind | None = field(init=False)  # prefill rows without drafts
    drafts: RowsOfKind | None = field(init=False)  # verify rows
    decodes: RowsOfKind | None = field(init=False)

    def __post_init__(self) -> None:
        end, tokens, longest = self.num_prefills, self.num_prefill_tokens, self.max_query_len
        cut, cut_tokens = end - self.num_drafted, tokens - self.num_drafted_tokens  # between prompts and drafts
        prompts = self._of_kind(slice(0, cut), slice(0, cut_tokens), longest)
        drafts = self._of_kind(slice(cut, end), slice(cut_tokens, tokens), longest)
        is_mixed = prompts is not None and drafts is not None
        prefills = self._of_kind(slice(0, end), slice(0, tokens), longest) if is_mixed else prompts or drafts
        decodes = self._of_kind(slice(end, end + self.num_decodes), slice(tokens, tokens + self.num_decodes), 1)
        rows = Rows(self.state_indices, self.has_initial_state, self.query_start_loc, longest)
        made = {"rows": rows, "prefills": prefills, "prompts": prompts, "drafts": drafts, "decodes": decodes}
        for name, value in made.items():
            object.__setattr__(self, name, value)  # the class is frozen

    @property
    def extend_start_loc(self) -> Tensor:
        """[num_prefills + 1] int32: start of each prefill row on the token axis, and the end of the last."""
        return self.query_start_loc[: self.num_prefills + 1]

    def _of_kind(self, rows: slice, tokens: slice, max_len: int) -> RowsOfKind | None:
        if rows.start == rows.stop:
            return None
        own = self.extend_start_loc if rows.stop <= self.num_prefills else self.query_start_loc
        starts = own[rows.start : rows.stop + 1]
        return RowsOfKind(
            Rows(self.state_indices[rows], self.has_initial_state[rows], starts, max_len),
            tokens,
            self.context_lens[rows],
            self.num_pending[rows],
        )
