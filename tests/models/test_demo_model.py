"""The embedded model: the same tokens as transformers', on every backend and device."""

from __future__ import annotations

import json

import pytest
import torch
from backends import BACKENDS
from leyden.configs.schema import EngineConfig, ServerConfig
from leyden.engine.core import EngineCore
from leyden.engine.llm import LLM
from leyden.engine.messages import AddRequest
from leyden.engine.sampling_params import SamplingParams
from leyden.engine.text.tokenizer import Tokenizer
from leyden.models.loading.checkpoint import DEMO_FOLDER
from leyden.server.parsers.forced import forced_grammar
from leyden.server.parsers.formats import TOOL_FORMATS, ChatFormat
from leyden.server.wire.requests import ToolChoice
from tiny_models import greedy
from transformers import MiniMaxForCausalLM

NUM_TOKENS = 24
REQUESTS = ("Hello!", "Tell me a short story about a fox.")


@pytest.fixture(scope="module")
def expected() -> list[tuple[list[int], list[int]]]:
    """(prompt, transformers' greedy answer in float32) of each request."""
    tokenizer = Tokenizer(DEMO_FOLDER)
    model = MiniMaxForCausalLM.from_pretrained(DEMO_FOLDER, dtype=torch.float32).eval()
    prompts = [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in REQUESTS]
    return [(prompt, greedy(model, prompt, NUM_TOKENS)) for prompt in prompts]


WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": WEATHER}}]
TALK = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]


def test_template_shows_tools_and_leaves_other_conversations_alone():
    tokenizer = Tokenizer(DEMO_FOLDER)

    def render(messages, **options):
        return tokenizer.decode(tokenizer.encode_chat(messages, **options), skip_special_tokens=False)

    plain = "<|startoftext|><|system|>Be kind.<|end|><|user|>Hi<|end|><|assistant|>"
    assert render(TALK) == render(TALK, tools=[]) == plain
    assert ChatFormat.choose(ServerConfig(), tokenizer).tools is TOOL_FORMATS["hermes"]
    function = {"name": "weather", "arguments": {"city": "Kiel"}}
    call = {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "type": "function", "function": function}]}
    shown = render([*TALK, call], tools=TOOLS)
    assert json.dumps(TOOLS[0]["function"]) in shown
    assert f"<|assistant|><tool_call>\n{json.dumps(function)}\n</tool_call><|end|>" in shown


def test_a_forced_call_can_be_tried():
    pytest.importorskip("llguidance")
    llm = LLM("demo", device="cpu", max_num_seqs=1)
    chosen = ChatFormat.choose(ServerConfig(), llm.tokenizer)
    format_ = chosen.of_answer(tools=TOOLS, thought="none", max_calls=1, hides=True)
    grammar = forced_grammar(TOOLS, ToolChoice("required"), format_)
    params = SamplingParams(temperature=0.0, max_tokens=80, grammar=grammar)
    [answer] = llm.generate([llm.tokenizer.encode_chat(TALK, tools=TOOLS)], params)
    _, begin, rest = answer.text.partition("<tool_call>\n")
    call = json.loads(rest.partition("\n</tool_call>")[0])
    assert begin and call["name"] == "weather" and list(call["arguments"]) == ["city"]


def answers(
    prompts: list[list[int]], num_tokens: int = NUM_TOKENS, at_least_preemptions: int = 0, **settings
) -> list[list[int]]:
    config = EngineConfig(model="demo", dtype="float32", **({"max_num_seqs": 4} | settings))
    core = EngineCore(config, progress=False)
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens)
    for i, prompt in enumerate(prompts):
        core.add_request(AddRequest(request_id=str(i), prompt_token_ids=prompt, sampling_params=params))
    found: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    while core.has_work:
        for output in core.step():
            found[output.request_id] += output.token_ids
    core.check_integrity()
    assert core.stats().preemptions_total >= at_least_preemptions
    return list(found.values())


def cut_at_stop(ids: list[int]) -> list[int]:
    """Up to and with the first stop token: what an engine that stops there gives."""
    stops = Tokenizer(DEMO_FOLDER).eos_token_ids
    for i, token_id in enumerate(ids):
        if token_id in stops:
            return ids[: i + 1]
    return ids


@pytest.mark.parametrize("backend", ["minimax", "seg_la"])
@pytest.mark.parametrize("chunk", [1, 7, 64, 257])
def test_equals_transformers_token_for_token(expected, backend, chunk):
    rows = min(chunk, 4)
    got = answers(
        [p for p, _ in expected],
        device="cpu",
        linear_backend=backend,
        max_num_batched_tokens=chunk,
        max_num_seqs=rows,
    )
    assert got == [cut_at_stop(answer) for _, answer in expected]


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_transformers_after_preemption(expected, backend):
    longest = max(len(prompt) for prompt, _ in expected) + NUM_TOKENS
    prompts = [prompt for prompt, _ in expected] * 2
    got = answers(
        prompts,
        at_least_preemptions=1,
        device="cpu",
        linear_backend=backend,
        block_size=4,
        num_kv_blocks=longest // 4 + 6,
        max_model_len=longest + 4,
    )
    assert got == [cut_at_stop(answer) for _, answer in expected] * 2


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_interpreted_triton_equals_transformers(expected, backend):
    pytest.importorskip("triton")
    prompt, answer = expected[0]
    got = answers([prompt], num_tokens=3, device="cpu", kernels="triton", linear_backend=backend)
    assert got == [answer[:3]]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["minimax", "seg_la", "auto", "replay"])
@pytest.mark.parametrize("chunk", [7, 512])
def test_gpu_equals_transformers_on_the_cpu_token_for_token(expected, backend, chunk):
    got = answers([p for p, _ in expected], device="cuda", linear_backend=backend, max_num_batched_tokens=chunk)
    assert got == [cut_at_stop(answer) for _, answer in expected]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_gpu_in_bfloat16_tells_nearly_the_same(expected, backend):
    """Half precision may take another word where two are nearly tied, so the bound is on the first tokens alone."""
    prompts = [prompt for prompt, _ in expected]
    config = EngineConfig(model="demo", device="cuda", dtype="bfloat16", linear_backend=backend, max_num_seqs=4)
    core = EngineCore(config, progress=False)
    params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=5)
    for i, prompt in enumerate(prompts):
        core.add_request(AddRequest(request_id=str(i), prompt_token_ids=prompt, sampling_params=params))
    outputs = []
    while core.has_work:
        outputs += core.step()
    for output in outputs:
        answer = expected[int(output.request_id)][1]
        assert answer[0] in [token_id for token_id, _ in output.logprobs[0].top]
