"""The messages between a client and the engine: plain msgspec structs, the same in one process or two."""

from __future__ import annotations

from typing import Literal

import msgspec

from .errors import SessionErrorCode
from .outputs import StepOutput
from .sampling_params import SamplingParams
from .text.token_ids import TokenIds, decode_token_ids, encode_token_ids

SessionAction = Literal["save", "restore", "delete", "list"]


class AddRequest(msgspec.Struct, tag="add", kw_only=True):
    """Start a sequence. A lower `priority` runs earlier; ties run in order of arrival.

    If `num_siblings` is set, so many requests with the same prompt follow at once. They name this request as
    `sibling_of`, and the prompt is computed once for all.
    """

    request_id: str
    prompt_token_ids: TokenIds  # any sequence of ids is converted
    sampling_params: SamplingParams
    priority: int = 0
    eos_token_ids: list[int] | None = None  # None = the ids of the checkpoint's config and generation config
    max_queue_seconds: float | None = None  # longest wait for the start; None = no limit
    prefix_cache: bool = True  # False = the sequence neither uses the prefix cache nor leaves anything there
    cache_salt: str | None = None  # the sequence shares the prefix cache only with requests of the same salt
    beginning: int = 0  # length in tokens of the part that other prompts probably share; 0 if unknown
    session_id: str | None = None  # id under which the end of the answer can be saved
    num_siblings: int = 0
    sibling_of: str | None = None

    def __post_init__(self) -> None:
        self.prompt_token_ids = TokenIds(self.prompt_token_ids)

    @property
    def shares_prompt(self) -> bool:
        """Whether the request's sequence may copy the state of another one with the same prompt, or be copied. A
        request for scores of its prompt must compute the prompt itself."""
        return self.sampling_params.max_tokens != 0 and self.sampling_params.prompt_logprobs is None

    @property
    def uses_cache(self) -> bool:
        """Whether the request's sequence uses the prefix cache, and leaves snapshots there."""
        return self.prefix_cache and self.shares_prompt


class AbortRequest(msgspec.Struct, tag="abort"):
    """Remove a sequence in any state. Unknown ids are ignored, because the sequence may just have finished."""

    request_id: str


class SessionCall(msgspec.Struct, tag="session"):
    """Save, restore or delete a session, or list all. `call_id`: made by the caller, repeated in the answer. `list`
    needs no `session_id`."""

    call_id: str
    action: SessionAction
    session_id: str = ""


class Shutdown(msgspec.Struct, tag="shutdown"):
    """End the engine at once, without finishing its sequences."""


class MemoryUse(msgspec.Struct, kw_only=True):
    """Bytes of device memory by use. `total` is the share that the settings give: `memory_fraction` of a GPU; on a CPU
    the weights plus `cpu_memory_gb`."""

    total: int
    weights: int = 0  # parameters and the rope table
    state: int = 0  # the state pool, with its rings
    kv: int = 0  # the KV pool and the block tables
    snapshots: int = 0  # of the prefix cache, on the device
    sampler: int = 0  # tables of token counts, one row per slot
    workspace: int = 0  # of the largest step at its peak
    graphs: int = 0  # CUDA graphs
    other: int = 0  # the CUDA context, compiled kernels, rounding, buffers of sessions, other processes

    def by_kind(self) -> dict[str, int]:
        """The bytes of each use. Their sum plus `unassigned` is `total`."""
        return {name: getattr(self, name) for name in self.__struct_fields__ if name != "total"}

    @property
    def unassigned(self) -> int:
        """The bytes of the share that no use takes; negative if the uses exceed it."""
        return self.total - sum(self.by_kind().values())


class EngineInfo(msgspec.Struct, tag="ready", kw_only=True):
    """The model, the device and the sizes of the pools of a started engine."""

    model_path: str
    architecture: str
    num_parameters: int
    layer_counts: dict[str, int]  # by the kind of the mixer: lightning, gated_delta, softmax
    vocab_size: int
    max_model_len: int
    eos_token_ids: list[int]
    device: str
    device_name: str
    dtype: str
    state_dtype: str
    linear_backend: str  # the chosen backend, never `auto`
    kernels: str
    num_state_slots: int
    max_waiting: int
    num_kv_blocks: int
    num_snapshots: int = 0
    num_host_snapshots: int = 0
    block_size: int
    speculative_tokens: int = 0  # most drafts of a sequence in a step; 0 = speculative decoding is off
    speculative_max_rows: int = 0  # most sequences of a step with drafts
    weight_bytes: int
    quantised_bytes: dict[str, int] = {}  # the part of weight_bytes that is quantised, by kind: `int4 experts`
    memory: MemoryUse
    state_bytes_per_slot: int
    kv_bytes_per_token: int
    has_sessions: bool = False  # whether sessions can be saved
    notes: list[str] = []  # a sentence per clamped size, with the reason


class EngineStats(msgspec.Struct, kw_only=True):
    """The engine's numbers after a step. The fields in `_total` only grow."""

    num_running: int = 0
    num_waiting: int = 0
    state_slots_used: int = 0
    kv_blocks_used: int = 0  # by sequences
    kv_blocks_cached: int = 0  # by the prefix cache alone
    snapshots_used: int = 0
    host_snapshots_used: int = 0
    prefix_cache_queries_total: int = 0  # prompt tokens that were looked up
    prefix_cache_hits_total: int = 0  # looked-up tokens that were found, and so not computed
    draft_tokens_total: int = 0
    accepted_tokens_total: int = 0  # accepted drafts
    prompt_tokens_total: int = 0
    generation_tokens_total: int = 0
    preemptions_total: int = 0
    steps_total: int = 0
    step_seconds_total: float = 0.0
    schedule_seconds_total: float = 0.0
    host_seconds_total: float = 0.0  # step_seconds_total without the time spent waiting for the device
    decode_steps_total: int = 0  # steps of decode rows alone
    decode_host_seconds_total: float = 0.0  # the part of host_seconds_total spent on decode_steps_total


class StepOutputs(msgspec.Struct, tag="outputs", kw_only=True):
    """The outputs of one step, and the engine's numbers after it. Without outputs it shows that the engine is alive.

    started: ids of the requests that leave the queue in the step that is launched next.
    """

    outputs: list[StepOutput]
    stats: EngineStats
    started: list[str] = []


class SessionFile(msgspec.Struct, frozen=True):
    """A saved session. `modified` is in seconds since 1970."""

    session_id: str
    num_bytes: int
    modified: int


class SessionDone(msgspec.Struct, tag="session_done", kw_only=True):
    """The answer to a `SessionCall`: the size of the data that was saved, restored or deleted, or an error."""

    call_id: str
    num_tokens: int = 0
    num_bytes: int = 0
    seconds: float = 0.0  # spent on the call, without the wait for other calls
    files: list[SessionFile] = []  # answer to `list`, the latest first
    is_cut: bool = False  # whether there are more files than listed
    error: str | None = None
    error_code: SessionErrorCode | None = None


class EngineFailed(msgspec.Struct, tag="failed"):
    """The last message of an engine that cannot go on. `is_user_error` = a setting or checkpoint is wrong."""

    message: str
    is_user_error: bool = False


ToEngine = AddRequest | AbortRequest | SessionCall | Shutdown
FromEngine = EngineInfo | StepOutputs | SessionDone | EngineFailed


def to_engine(message: ToEngine) -> bytes:
    return msgspec.msgpack.encode(message, enc_hook=encode_token_ids)


def engine_decoder() -> msgspec.msgpack.Decoder[ToEngine]:
    """A decoder of the bytes that `to_engine` returns."""
    return msgspec.msgpack.Decoder(ToEngine, dec_hook=decode_token_ids)
