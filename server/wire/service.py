"""The answers of the routes around generation: models, tokens, health and load, as msgspec structs."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct


class ModelCard(Struct):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(Struct):
    object: Literal["list"]
    data: list[ModelCard]


class Tokenized(Struct):
    """vLLM's answer of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(Struct):
    prompt: str


class Version(Struct):
    version: str


class Health(Struct):
    status: str


class Load(Struct):
    """Sequences, slots, blocks and snapshots of the engine right now, and its drafts so far."""

    server_load: int
    num_requests_running: int
    num_requests_waiting: int
    state_slots_used: int
    state_slots_total: int
    kv_blocks_used: int
    kv_blocks_cached: int
    kv_blocks_total: int
    snapshots_used: int
    snapshots_total: int
    host_snapshots_used: int
    host_snapshots_total: int
    draft_tokens_total: int
    accepted_tokens_total: int


class ServerInfo(Struct):
    """Beside these the fields of `EngineInfo`, but for paths."""

    version: str
    served_model_name: str
    max_body_bytes: int


class ModelInfo(Struct):
    """SGLang's answer of /get_model_info, as far as it applies."""

    model_path: str
    tokenizer_path: str
    served_model_name: str
    is_generation: bool = True
    preferred_sampling_params: None = None
