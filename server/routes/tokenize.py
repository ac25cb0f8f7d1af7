"""POST /tokenize and /detokenize, in vLLM's shapes."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ..door.validation import prepare_detokenize, prepare_tokenize
from ..off_loop import off_loop
from ..state import State
from ..wire.answers import json_response
from ..wire.document import documented
from ..wire.requests import DetokenizeRequest, TokenizeRequest
from ..wire.service import Detokenized, Tokenized

router = APIRouter()


@router.post("/tokenize", **documented(Tokenized, 404, body=TokenizeRequest))
async def tokenize(http: Request, state: State) -> Response:
    """Token ids of a prompt, or of messages laid out by the chat template."""
    request, tokens, headers = await prepare_tokenize(http, state)
    names: list[str] | None = None
    if request.return_token_strs:
        names = await off_loop(len(tokens), lambda: [state.token_names[token_id] for token_id in tokens])
    answer = Tokenized(len(tokens), state.llm.client.info.max_model_len, tokens, names)
    return json_response(answer, headers)


@router.post("/detokenize", **documented(Detokenized, 404, body=DetokenizeRequest))
async def detokenize(http: Request, state: State) -> Response:
    """Text of token ids, control tokens included."""
    request, headers = await prepare_detokenize(http, state)
    decode = state.llm.tokenizer.decode
    text = await off_loop(len(request.tokens), lambda: decode(request.tokens, skip_special_tokens=False))
    return json_response(Detokenized(text), headers)
