"""The batch contract between the engine and the models.

One flat token axis of T tokens without padding inside. Rows are sequences: **prefill (extend) rows first, then
decode rows**. A row is new or continuing by its `context_lens`, never by how many tokens it brings: a one-token
prompt is a prefill.

| here | also known as |
|---|---|
| query_start_loc | cu_seqlens, q_offsets |
| extend_start_loc | the same for the prefill rows alone |
| context_lens | extend_prefix_lens, num_computed_tokens |
| has_initial_state | s_scales |
| state_indices | s_offsets, slot_id, mamba cache indices |
| slot_mapping | out_cache_loc |
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """Everything a model needs to know of one step, on the device, beside the counts that a launch needs as ints.

    Built complete by `engine.batch` and never changed.
    """

    input_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64, 0-based position of each token in its sequence
    query_start_loc: Tensor  # [B + 1] int32, start of each row on the token axis
    context_lens: Tensor  # [B] int32, tokens computed before this step
    has_initial_state: Tensor  # [B] bool, context_lens > 0; False = the state slot is dirty and must be ignored
    state_indices: Tensor  # [B] int32, slot of each row in the state pool; -1 = padding row
    num_pending: Tensor  # [B] int32, computed tokens that wait in the slot's ring, not yet in its state (`replay`)
    slot_mapping: Tensor  # [T] int64, where each token's key and value go: block * block_size + offset
    block_table: Tensor  # [B, M] int32, the KV blocks of each row; entries past its length are 0 and never read
    logits_indices: Tensor  # [N] int64, the last token of each row whose next token is wanted
    num_prefills: int
    num_prefill_tokens: int
    num_decodes: int
    prefills_pending: bool  # some prefill row has tokens waiting in its ring
    max_query_len: int  # longest prefill row; 1 when there is none

    @property
    def extend_start_loc(self) -> Tensor:
        """[num_prefills] int32: start of each prefill row on the token axis."""
        return self.query_start_loc[: self.num_prefills]
