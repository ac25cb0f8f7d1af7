"""GET /load, /server_info and /get_model_info: what routers and the playground ask of a running server."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter
from starlette.responses import Response

from ... import __version__
from ..state import State, max_body_bytes
from ..wire.answers import json_response
from ..wire.document import documented
from ..wire.service import Load, ModelInfo, ServerInfo
from . import reading

router = APIRouter()

PRIVATE_FACTS = {"model_path"}  # clients are not told where files lie on the server


@reading(router, "/load", **documented(Load))
async def load(state: State) -> Response:
    """Sequences and memory in use after the engine's latest step, and drafts so far; `server_load` is vLLM's name for
    all sequences."""
    client = state.llm.client
    stats, info = client.stats, client.info
    answer = Load(
        server_load=stats.num_running + stats.num_waiting,
        num_requests_running=stats.num_running,
        num_requests_waiting=stats.num_waiting,
        state_slots_used=stats.state_slots_used,
        state_slots_total=info.num_state_slots,
        kv_blocks_used=stats.kv_blocks_used,
        kv_blocks_cached=stats.kv_blocks_cached,
        kv_blocks_total=info.num_kv_blocks,
        snapshots_used=stats.snapshots_used,
        snapshots_total=info.num_snapshots,
        host_snapshots_used=stats.host_snapshots_used,
        host_snapshots_total=info.num_host_snapshots,
        draft_tokens_total=stats.draft_tokens_total,
        accepted_tokens_total=stats.accepted_tokens_total,
    )
    return json_response(answer)


@reading(router, "/server_info", **documented(ServerInfo))
async def server_info(state: State) -> Response:
    """What the engine turned out to be: model, numbers, backend, memory."""
    facts = msgspec.structs.asdict(state.llm.client.info)
    shown = {name: fact for name, fact in facts.items() if name not in PRIVATE_FACTS}
    bound = max_body_bytes(state.settings, state.llm.client.info)
    own = ServerInfo(__version__, state.model_name, bound)
    return json_response(msgspec.structs.asdict(own) | shown)


@reading(router, "/get_model_info", **documented(ModelInfo))
async def model_info(state: State) -> Response:
    """SGLang's shape, for its router. The paths are the served name: clients are not told where files lie."""
    return json_response(ModelInfo(state.model_name, state.model_name, state.model_name))
