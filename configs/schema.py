"""Every setting: its name, type, bounds and default. `sources.py` reads the values.

The engine reads `EngineConfig`, whose fields are also the keyword arguments of `LLM`. The HTTP layer reads
`ServerConfig`. `Settings` holds both. The description of a field is its `--help` text.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator

LinearBackendName = Literal["auto", "minimax", "seg_la", "chunk", "replay", "fla"]
ToolCallParserName = Literal["auto", "none", "minimax", "hermes", "kimi_k2", "qwen3_coder"]
ReasoningParserName = Literal["auto", "none", "think"]
WeightPart = Literal["experts", "mixers", "mlp"]
WeightKind = Literal["none", "fp8", "int8", "int4"]
PUBLISHED = ("awq", "gptq", "gptq_marlin", "awq_marlin", "compressed-tensors", "modelopt", "modelopt_fp4")
DEMO_MODEL = "demo"
MAX_DRAFTS = 7  # of one sequence in one step
MAX_CONNECTIONS = 1 << 16
SPARE_CONNECTIONS = 256  # for requests that are being read, or refused
STRICT = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=(), allow_inf_nan=False)


def as_list(text: str) -> list[str]:
    """The items of a text that separates them by commas. Empty items are dropped."""
    return [part.strip() for part in text.split(",") if part.strip()]


class _Numbers(BaseModel):
    """The base of both kinds of settings: a field that holds a number refuses booleans."""

    model_config = STRICT

    @field_validator("*", mode="before")
    @classmethod
    def _yes_is_no_number(cls, value: Any, info: Any) -> Any:
        """YAML reads yes, no, on and off as booleans, which pydantic would take for 1 and 0."""
        annotation = cls.model_fields[info.field_name].annotation
        if isinstance(value, bool) and {annotation, *get_args(annotation)} & {int, float}:
            raise ValueError("must be a number; true, false, yes, no, on and off are none")
        return value


class EngineConfig(_Numbers):
    """Settings of the engine: model, numbers, memory, scheduling."""

    model: str = Field(DEMO_MODEL, description="checkpoint folder, hub id, or 'demo' for the embedded model")
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    tokenizer: Path | None = Field(
        None, description="folder of the tokenizer and the chat template; default: the model's own"
    )
    chat_template: Path | None = Field(
        None, description="file whose Jinja template renders conversations; default: the tokenizer's own"
    )
    load_format: Literal["auto", "dummy"] = Field(
        "auto", description="dummy = random weights made on the device, to measure speed from a config.json alone"
    )
    linear_backend: LinearBackendName = Field(
        "auto",
        description="how linear layers are computed: lightning layers by minimax, seg_la or replay, gated delta nets "
        "by chunk, replay or fla; replay = decode that seldom writes states; fla = the operations of the package "
        "fla-core, to compare with; auto = the fastest by measurement, today replay",
    )
    kernels: Literal["auto", "torch", "triton"] = Field("auto", description="auto = triton on CUDA, torch elsewhere")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="weights and activations; auto = the checkpoint's on CUDA, float32 on CPU"
    )
    quantization: dict[WeightPart, WeightKind] = Field(
        default_factory=dict,
        description="what weights are quantised to while they are read: none, fp8, int8 or int4 for all, or an object "
        'by part, such as {"experts": "int4", "mixers": "int8", "mlp": "int8"}; a checkpoint\'s own format is read '
        "without this setting; default: none",
    )
    quantization_group: int = Field(
        128, description="weights in a row that share a scale in int8 and int4: 128, 64 or 32"
    )
    state_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="recurrent state; less than float32 drifts over thousands of tokens"
    )
    max_num_seqs: int = Field(64, ge=1, le=65536, description="sequences running at once (= state slots)")
    max_num_batched_tokens: int = Field(
        2048, ge=1, le=1 << 20, description="tokens in one step, prompt chunks included"
    )
    mixed_prefill_tokens: int = Field(
        256,
        ge=1,
        le=1 << 20,
        description="most prompt tokens in a step that also decodes, twice as many beside 128 rows or more; more "
        "tokens delay the decoding rows",
    )
    max_model_len: int | None = Field(None, ge=1, description="context length; default: the checkpoint's")
    max_waiting: int = Field(1024, ge=1, le=1 << 20, description="requests that may queue before 429")
    async_scheduling: bool | None = Field(
        None, description="launch a step before the tokens of its predecessor are known; default: on CUDA"
    )
    cuda_graphs: bool = Field(True, description="replay steps from CUDA graphs, captured at start")
    max_graph_rows: int = Field(
        512,
        ge=1,
        le=65536,
        description="most decoding sequences of a step that has a CUDA graph, with drafts or without",
    )
    block_size: int = Field(16, ge=1, le=1024, description="tokens per KV block")
    prefix_cache: bool = Field(
        True, description="compute only the part of a prompt that no earlier prompt or answer began with"
    )
    snapshots: int | None = Field(
        None,
        ge=0,
        le=1 << 20,
        description="snapshots that the prefix cache keeps on the device; default: by its memory",
    )
    snapshot_interval: int = Field(
        4096,
        ge=0,
        le=1 << 20,
        description="most tokens between snapshots on the way of a prompt, the first of which lie closer; "
        "0 = none are kept",
    )
    snapshot_min_tokens: int = Field(
        128,
        ge=1,
        le=1 << 20,
        description="tokens that a snapshot must spare at least, beyond the one before it; 16 do at an answer's end",
    )
    snapshot_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="states in snapshots; auto = state_dtype; 16 bits take half the memory and round once per hit",
    )
    host_snapshot_gb: float = Field(
        0.0, ge=0, description="host memory for snapshots for which the device has no room, in GB"
    )
    speculative_tokens: int = Field(
        0,
        ge=0,
        le=MAX_DRAFTS,
        description="drafts of a sequence's next tokens, taken from its own text, in one step; 0 = none",
    )
    speculative_max_rows: int = Field(8, ge=1, le=64, description="most decoding sequences of a step with drafts")
    session_folder: Path | None = Field(
        None, description="folder for saved conversations, /v1/sessions; default: none are saved"
    )
    memory_fraction: float = Field(0.9, gt=0, le=1, description="share of the GPU's memory to use")
    cpu_memory_gb: float = Field(2.0, gt=0, description="memory for state and KV cache on a CPU, in GB")
    num_kv_blocks: int | None = Field(None, ge=1, description="fix the KV cache's size instead of measuring")
    num_threads: int | None = Field(None, ge=1, description="CPU threads of the engine; default: all cores but one")
    seed: int = Field(0, ge=0, description="seed of requests without a seed")

    @property
    def quantizes_all_alike(self) -> bool:
        """Whether every part is quantised to the same, as one word for all parts says."""
        return len(self.quantization) == len(get_args(WeightPart)) and len(set(self.quantization.values())) == 1

    @field_validator("quantization", mode="before")
    @classmethod
    def _one_word_is_for_all_parts(cls, value: Any) -> Any:
        """A word, or the text of a JSON object, as an object by part; null is none."""
        if isinstance(value, str) and value.strip().startswith("{"):
            try:
                value = json.loads(value)
            except ValueError as error:
                raise ValueError(f"is not valid JSON: {error}") from None
        if value is None or value == "none":
            return {}
        if isinstance(value, str):
            kinds = get_args(WeightKind)
            if value not in kinds:
                hint = "; a checkpoint's own format is read without this setting" if value in PUBLISHED else ""
                raise ValueError(f"must be {', '.join(kinds[:-1])} or {kinds[-1]}, or an object by part{hint}")
            return dict.fromkeys(get_args(WeightPart), value)
        return value

    @field_validator("quantization_group")
    @classmethod
    def _group_is_served(cls, value: int) -> int:
        if value not in (32, 64, 128):
            raise ValueError("must be 128, 64 or 32")
        return value

    @property
    def saved_state_dtype(self) -> str:
        """The dtype of states that the prefix cache keeps."""
        return self.state_dtype if self.snapshot_dtype == "auto" else self.snapshot_dtype

    @field_validator("max_num_batched_tokens")
    @classmethod
    def _budget_fits_every_row(cls, value: int, info: Any) -> int:
        rows = info.data.get("max_num_seqs")
        if rows is not None and value < rows:
            raise ValueError(f"must be at least max_num_seqs ({rows}), so that every running sequence gets its token")
        return value

    @field_validator("session_folder")
    @classmethod
    def _sessions_need_states_that_are_kept(cls, value: Path | None, info: Any) -> Path | None:
        off = {"prefix_cache": False, "snapshots": 0}
        for name, none in off.items():
            if value is not None and info.data.get(name, ...) == none:
                raise ValueError(
                    f"a session is saved from the prefix cache, which keeps no snapshots with {name} = {none}; "
                    f"leave {name} out, or session_folder"
                )
        return value


def _more_than_can_wait(data: dict[str, Any]) -> int:
    """The default of `max_connections`: enough that a full queue is a 429. Balancers take a 503 for a sick server."""
    names = ("max_num_seqs", "max_waiting")
    wanted = SPARE_CONNECTIONS + sum(data.get(name, EngineConfig.model_fields[name].default) for name in names)
    return min(wanted, MAX_CONNECTIONS)


class ServerConfig(_Numbers):
    """Settings of the HTTP layer."""

    host: str = Field("127.0.0.1", description="address to bind; 0.0.0.0 = all interfaces")
    port: int = Field(8000, ge=0, le=65535, description="0 = any free port")
    served_model_name: str | None = Field(
        None, min_length=1, description="name in the API; default: the model's folder name"
    )
    api_key: list[str] = Field(default_factory=list, description="keys that may call; prefer api_key_file")
    api_key_file: Path | None = Field(None, description="file with one key per line")
    allowed_hosts: list[str] = Field(
        default_factory=list,
        description="host names, beside local ones, that a server on loopback without a key answers; * = any",
    )
    cors_origins: list[str] = Field(
        default_factory=list,
        description="origins whose web pages may call, as https://chat.example; * = any; default: the server's own",
    )
    generation_defaults: bool = Field(
        True, description="take sampling defaults from the checkpoint's generation_config.json"
    )
    tool_call_parser: ToolCallParserName = Field(
        "auto", description="format of tool calls in answers; auto = the chat template's; none = no tools"
    )
    reasoning_parser: ReasoningParserName = Field(
        "auto",
        description="think = split <think>...</think> off an answer; auto = only where the chat template suggests it",
    )
    max_header_bytes: int = Field(65_536, ge=1024, le=1 << 20, description="largest request line and headers")
    max_body_bytes: int | None = Field(
        None,
        ge=1024,
        description="largest request body; default: 8 bytes per token of the context, 2,000,000 at least",
    )
    max_body_depth: int = Field(128, ge=4, le=256, description="deepest nesting of a body's JSON")
    max_n: int = Field(16, ge=1, le=128, description="largest n of a request")
    max_prompts: int = Field(64, ge=1, le=4096, description="most prompts in one completion request")
    # The engine has the upper bounds of these settings as bounds of its own.
    max_stop_strings: int = Field(16, ge=0, le=16, description="most stop strings of a request")
    max_stop_chars: int = Field(256, ge=1, le=256, description="longest stop string")
    max_logprobs: int = Field(20, ge=0, le=20, description="most alternatives per token")
    max_scores: int = Field(
        1 << 22, ge=1024, description="most log-probabilities of a request: tokens x (alternatives + 1), of all choices"
    )
    max_logit_bias: int = Field(1024, ge=0, le=1024, description="most entries of logit_bias")
    max_queue_seconds: float = Field(300.0, gt=0, description="a request that waited longer for its start gets 503")
    step_timeout: float = Field(
        300.0,
        ge=3,
        description="seconds that one engine step may take; a longer step counts as a hang, and the server ends",
    )
    max_connections: int = Field(
        default_factory=_more_than_can_wait,
        ge=1,
        le=MAX_CONNECTIONS,
        description="requests open at once before 503, GET and HEAD not counted; twice as many sockets; "
        "default: max_num_seqs + max_waiting + 256",
    )
    read_timeout: float = Field(30.0, gt=0, description="seconds for a request's headers, and then for its body")
    write_timeout: float = Field(60.0, gt=0, description="seconds that a client may leave its answer unread")
    idle_timeout: float = Field(
        75.0, gt=0, description="seconds that a connection is kept without a request; load balancers keep one for less"
    )
    drain_seconds: float = Field(30.0, ge=0, description="time for open requests after SIGTERM")
    metrics_prefix: str = Field("leyden", pattern=r"^[a-zA-Z_]\w*$", description="'vllm' fits existing dashboards")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe log line")
    access_log: bool = Field(False, description="a log line at info for every request")
    log_format: Literal["text", "json"] = Field("text", description="json = one object per line, for collectors")
    otlp_endpoint: str | None = Field(
        None,
        pattern=r"^https?://\S+$",
        description="URL to which traces are sent, such as http://collector:4318/v1/traces; needs leyden[otel]",
    )
    stats_interval: float = Field(5.0, ge=0, description="seconds between throughput lines while busy; 0 = never")

    @field_validator("api_key", "allowed_hosts", "cors_origins", mode="before")
    @classmethod
    def _one_item_need_not_be_a_list(cls, value: Any) -> Any:
        """Split a text at its commas, as in the environment."""
        return as_list(value) if isinstance(value, str) else value

    @field_validator("api_key", mode="before")
    @classmethod
    def _a_text_holds_a_key(cls, value: Any) -> Any:
        if isinstance(value, str) and not as_list(value):
            raise ValueError("holds no key; set one, or unset it to serve everyone")
        return value

    @field_validator("host")
    @classmethod
    def _an_empty_host_does_not_open_every_interface(cls, value: str) -> str:
        if not value.strip():  # sockets bind all interfaces then
            raise ValueError("is no address; write 127.0.0.1 for this machine alone, or 0.0.0.0 for all interfaces")
        return value

    @field_validator("allowed_hosts")
    @classmethod
    def _hosts_are_names(cls, value: list[str]) -> list[str]:
        for name in value:
            if not re.fullmatch(r"\*|[\w.-]+|[0-9A-Fa-f:]+", name):
                raise ValueError(f"{name!r} is no host name; write it without scheme, port and path")
        return [name.lower() for name in value]

    @field_validator("cors_origins")
    @classmethod
    def _origins_have_no_path(cls, value: list[str]) -> list[str]:
        for origin in value:
            if not re.fullmatch(r"\*|[A-Za-z][\w+.-]*://[^/\s*]+", origin):
                raise ValueError(f"{origin!r} is no origin; write scheme://host or scheme://host:port, without a path")
            if re.fullmatch(r"http://.*:80|https://.*:443", origin, re.IGNORECASE):
                raise ValueError(f"{origin!r} has its scheme's own port, which browsers leave out; leave it out, too")
        return [origin.lower() for origin in value]


class Settings(ServerConfig, EngineConfig):
    """Every setting. The engine's settings are validated first: `max_connections` depends on them."""

    def engine(self) -> EngineConfig:
        """The engine's settings, with the same fields set and unset."""
        return EngineConfig(**self.model_dump(include=set(EngineConfig.model_fields), exclude_unset=True))
