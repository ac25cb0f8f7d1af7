"""Names of settings in vLLM, SGLang and earlier versions of Leyden, and Leyden's name or answer for each."""

from __future__ import annotations

# A name of another engine, or one that Leyden had before -> the setting with the same meaning.
RENAMED = {
    "gpu_memory_utilization": "memory_fraction",
    "mem_fraction_static": "memory_fraction",
    "max_running_requests": "max_num_seqs",
    "context_length": "max_model_len",
    "chunked_prefill_size": "max_num_batched_tokens",
    "max_prefill_tokens": "max_num_batched_tokens",
    "long_prefill_token_threshold": "mixed_prefill_tokens",
    "max_queued_requests": "max_waiting",
    "num_gpu_blocks_override": "num_kv_blocks",
    "page_size": "block_size",
    "mamba_ssm_cache_dtype": "state_dtype",
    "mamba_ssm_dtype": "state_dtype",
    "mamba_backend": "linear_backend",
    "linear_attn_backend": "linear_backend",
    "num_speculative_tokens": "speculative_tokens",
    "speculative_num_draft_tokens": "speculative_tokens",
    "cudagraph_capture_sizes": "max_graph_rows",
    "cuda_graph_max_bs": "max_graph_rows",
    "random_seed": "seed",
    "generation_config": "generation_defaults",
    "uvicorn_log_level": "log_level",
    "otlp_traces_endpoint": "otlp_endpoint",
    "timeout_keep_alive": "idle_timeout",
    "allowed_origins": "cors_origins",
    "tokenizer_path": "tokenizer",
    "state_checkpoints": "snapshots",
    "state_checkpoint_interval": "snapshot_interval",
    "state_checkpoint_min_tokens": "snapshot_min_tokens",
    "state_checkpoint_dtype": "snapshot_dtype",
    "host_checkpoint_gb": "host_snapshot_gb",
}

# Another engine's setting -> the answer, where it is another one than a name. `{...}` is a setting of ours, spelled as
# the source spells settings: `--prefix-cache` on the command line, `prefix_cache` elsewhere.
ANSWERS = {
    "enable_prefix_caching": "the prefix cache is on already; {prefix_cache} is the setting",
    "no_enable_prefix_caching": "the prefix cache is off with {no_prefix_cache}",
    "disable_radix_cache": "the prefix cache is off with {no_prefix_cache}",
    "enable_chunked_prefill": "prompts are always computed in chunks; {max_num_batched_tokens} is their bound",
    "enforce_eager": "CUDA graphs are off with {no_cuda_graphs}",
    "disable_cuda_graph": "CUDA graphs are off with {no_cuda_graphs}",
    "scheduling_policy": "prompts go by their request's priority, then the shortest first",
    "schedule_policy": "prompts go by their request's priority, then the shortest first",
    "enable_auto_tool_choice": "tool calls are on already where the chat template has tools; {tool_call_parser} is "
    "their format",
    "enable_reasoning": "reasoning is on already where the chat template has it; {reasoning_parser} is its format",
    "enable_metrics": "/metrics is always there",
    "disable_log_stats": "the lines are off when {stats_interval} is 0",
    "disable_log_requests": "prompts are never logged",
    "trust_remote_code": "no code of a checkpoint is ever run, so there is nothing to trust",
    **dict.fromkeys(
        ("tensor_parallel_size", "tp_size", "tp", "pipeline_parallel_size", "pp_size", "pp", "ep_size", "ep"),
        "a model runs on one device; several are not implemented",
    ),
    **dict.fromkeys(("data_parallel_size", "dp_size", "dp"), "start a server for each GPU, and a router before them"),
    **dict.fromkeys(("enable_lora", "lora_modules", "lora_paths"), "adapters are not implemented; merge them first"),
    "kv_cache_dtype": "keys and values have the dtype of the weights; {dtype} is the setting",
    "speculative_config": "drafts come from the text itself; {speculative_tokens} is how many",
    "swap_space": "preempted sequences are computed again; {host_snapshot_gb} keeps states on the host",
    "cpu_offload_gb": "weights stay on the device; {host_snapshot_gb} keeps states on the host",
    "download_dir": "set the environment variable HF_HOME",
    "ssl_certfile": "put a proxy that speaks TLS before the server",
    "ssl_keyfile": "put a proxy that speaks TLS before the server",
}


def hint_for(name: str, *, as_flags: bool = False) -> str | None:
    """The hint for a name that Leyden does not have, or None. `name` is spelled with underscores or as a flag;
    `as_flags` spells Leyden's settings as flags, as the command line does."""
    key = name.lstrip("-").replace("-", "_")
    if key in RENAMED:
        return f"the setting is {_spelled(RENAMED[key], as_flags)} here"
    text = ANSWERS.get(key)
    return None if text is None else text.format_map(_Spelling(as_flags))


class _Spelling(dict[str, str]):
    """Any name -> that setting as the command line or as a file spells it."""

    def __init__(self, as_flags: bool) -> None:
        self._as_flags = as_flags

    def __missing__(self, name: str) -> str:
        return _spelled(name, self._as_flags)


def _spelled(name: str, as_flags: bool) -> str:
    if as_flags:
        return "--" + name.replace("_", "-")
    return f"{name.removeprefix('no_')}: false" if name.startswith("no_") else name
