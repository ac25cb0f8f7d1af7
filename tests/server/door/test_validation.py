from __future__ import annotations

import gzip
import json

import pytest

JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"nonsense",
        b"[]",
        b'"text"',
        b"null",
        b"5",
        b'{"prompt": "a"} tail',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "a", "temperature": -Infinity}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": "\xff"}',
        b'{"prompt": "\xed\xa0\x80"}',
        b'\xef\xbb\xbf{"prompt": "a"}',
        '{"prompt": "a"}'.encode("utf-16"),
        rb'{"prompt": "\ud800"}',
        rb'{"prompt": "\udc00\ud800"}',
        rb'{"prompt": "a", "\ud800": 1}',
        b'{"prompt": "a", "prompt": "b"}',
        b'{"prompt": "a", "stream_options": {"include_usage": true, "include_usage": true}}',
        b'{"prompt": "a", "tokens": [], "x": ' + b"[" * 140 + b"]" * 140 + b"}",
        b'{"prompt": "a", "x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        b'{"x": ' + b'{"a":' * 100_000,
    ],
)
@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize", "/detokenize"]
)
async def test_bytes_that_are_not_one_sound_json_object_are_400(client, error_of, path, raw):
    error = error_of(await client.post(path, content=raw, headers=JSON), 400)
    assert error["type"] == "invalid_request_error"


async def test_a_surrogate_pair_is_one_character_and_welcome(client, engine):
    response = await client.post("/v1/completions", content=rb'{"prompt": "\ud83d\ude00"}', headers=JSON)
    assert response.status_code == 200
    assert bytes(engine.requests[0].prompt_token_ids[1:]).decode() == "😀"


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "application/jsonx", ""])
async def test_another_content_type_is_415(client, error_of, content_type):
    headers = {"content-type": content_type} if content_type else {}
    error = error_of(await client.post("/v1/completions", content=b'{"prompt": "a"}', headers=headers), 415)
    assert "application/json" in error["message"]


@pytest.mark.parametrize("encoding", ["gzip", "br", "GZIP, identity", "x" * 200])
async def test_a_compressed_body_is_415_and_told_to_come_uncompressed(client, error_of, encoding):
    headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
    response = await client.post("/v1/completions", content=gzip.compress(b'{"prompt": "a"}'), headers=headers)
    error = error_of(response, 415)
    assert error["code"] == "unsupported_content_encoding" and "send the body uncompressed" in error["message"]
    assert response.headers["accept-encoding"] == "identity"


async def test_a_body_that_says_it_is_not_compressed_is_taken(client):
    headers = {"Content-Type": "application/json", "Content-Encoding": "identity"}
    assert (await client.post("/tokenize", content=b'{"prompt": "a"}', headers=headers)).status_code == 200


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "Application/JSON", "application/x+json"])
async def test_json_content_types_are_taken(client, content_type):
    headers = {"content-type": content_type}
    response = await client.post("/v1/completions", content=b'{"prompt": "a"}', headers=headers)
    assert response.status_code == 200


INTEGERS = ["n", "max_tokens", "min_tokens", "seed", "top_k", "priority", "logprobs"]


@pytest.mark.parametrize("value", ["5", True, 1.0, [1], {}])
@pytest.mark.parametrize("name", INTEGERS)
async def test_integers_are_strict(complete, error_of, name, value):
    assert error_of(await complete(**{name: value}), 400)["param"] == name


@pytest.mark.parametrize("value", ["1", True, []])
@pytest.mark.parametrize(
    "name", ["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"]
)
async def test_numbers_are_strict(complete, error_of, name, value):
    assert error_of(await complete(**{name: value}), 400)["param"] == name


@pytest.mark.parametrize("value", ["true", 1, 0, []])
@pytest.mark.parametrize("name", ["stream", "echo", "ignore_eos", "skip_special_tokens", "return_token_ids"])
async def test_booleans_are_strict(complete, error_of, name, value):
    assert error_of(await complete(**{name: value}), 400)["param"] == name


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 5]}, "prompt[1]"),
        ({"prompt": [1, "a"]}, "prompt[1]"),
        ({"prompt": [1, True]}, "prompt[1]"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": [1, 2.0]}, "prompt[1]"),
        ({"prompt": [[1], 2]}, "prompt[1]"),
        ({"prompt": [[1], [2, None]]}, "prompt[1][1]"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [262]}, "prompt"),
        ({"prompt": [2**63]}, "prompt"),
        ({"prompt": [[1], [262]]}, "prompt[1]"),
        ({"prompt": "", "add_special_tokens": False}, "prompt"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"n": 0}, "n"),
        ({"n": -1}, "n"),
        ({"n": 17}, "n"),
        ({"n": 2**63}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2**31}, "max_tokens"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 2**63}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"seed": 2**63}, "seed"),
        ({"seed": -(2**63) - 1}, "seed"),
        ({"priority": 2**40}, "priority"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": False}, "logprobs"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": "x" * 257}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": [5]}, "stop.0"),
        ({"stop": 5}, "stop"),
        ({"stop_token_ids": [262]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0"),
        ({"stop_token_ids": list(range(257))}, "stop_token_ids"),
        ({"stop_token_ids": ["5"] * 1000}, "stop_token_ids.0"),
        ({"logit_bias": {"262": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"²": 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 3000: 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"5": "1"}}, "logit_bias.5"),
        ({"logit_bias": {str(i): "x" for i in range(1025)}}, "logit_bias"),
        ({"logit_bias": [5]}, "logit_bias"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": True}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"model": 5}, "model"),
    ],
    ids=lambda value: json.dumps(value)[:50],
)
async def test_a_value_out_of_bounds_is_refused_by_name(complete, error_of, engine, body, param):
    error = error_of(await complete(**body), 400)
    assert error["param"] == param
    assert len(error["message"]) <= 1000
    assert engine.requests == []


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"session_id": "a/b"}, "session_id: must be 1 to 64 letters, digits, '-' and '_', got \"a/b\""),
        ({"session_id": "A" * 300}, "session_id: must be 1 to 64 letters, digits, '-' and '_', got 300 characters"),
        ({"cache_salt": "S" * 300}, "cache_salt: must have at most 256 characters, got 300 characters"),
        ({"cache_salt": ""}, 'cache_salt: must have at least 1 character, got ""'),
        ({"stop_token_ids": [1] * 300}, "stop_token_ids: must have at most 256 items, got 300"),
        ({"seed": "A"}, 'seed: must be a valid integer, got "A"'),
        ({"stop": 5}, "stop: must be a valid list, got 5"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
async def test_error_tells_the_type_expected_and_the_value_sent(complete, error_of, body, message):
    assert error_of(await complete(**body), 400)["message"] == message


async def test_too_long_a_prompt_names_the_context_length(complete, error_of):
    error = error_of(await complete(prompt=[5] * 129), 400)
    assert error["code"] == "context_length_exceeded"
    assert error["message"] == "prompt: 129 tokens are too many; the context length is 128"


async def test_too_long_an_answer_names_prompt_bound_and_context(complete, error_of):
    error = error_of(await complete(prompt=[5] * 100, max_tokens=29), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "max_tokens")
    assert all(number in error["message"] for number in ("100", "29", "128"))


async def test_a_request_that_just_fits_is_served_and_a_default_bound_shrinks_to_fit(complete, engine):
    assert (await complete(prompt=[5] * 100, max_tokens=28)).status_code == 200
    assert (await complete(prompt=[5] * 120)).status_code == 200
    assert [request.sampling_params.max_tokens for request in engine.requests] == [28, 8]


async def test_a_full_context_can_be_scored_but_not_continued(complete, error_of):
    assert (await complete(prompt=[5] * 128, echo=True, max_tokens=0)).status_code == 200
    assert error_of(await complete(prompt=[5] * 128), 400)["code"] == "context_length_exceeded"


REFUSED = {
    "best_of": 2,
    "suffix": "x",
    "use_beam_search": True,
    "length_penalty": 0.5,
    "prompt_logprobs": 1,
    "guided_json": {},
    "structural_tag": {},
    "guided_regex": "x",
    "guided_choice": ["a"],
    "guided_grammar": "x",
    "allowed_token_ids": [1],
    "bad_words": ["x"],
    "prompt_embeds": "x",
    "truncate_prompt_tokens": 5,
    "logits_processors": ["x"],
    "return_tokens_as_token_ids": True,
    "spaces_between_special_tokens": False,
    "vllm_xargs": {"a": 1},
    "kv_transfer_params": {},
    "request_id": "x",
    "regex": "x",
    "json_schema": "{}",
    "store": True,
    "service_tier": "flex",
    "tools": [{"type": "function"}],
    "tool_choice": "auto",
}
SERVED_IN_CHAT = {"tools", "tool_choice"}
REFUSED_IN_CHAT = {name: value for name, value in REFUSED.items() if name not in SERVED_IN_CHAT} | {
    "functions": [{}],
    "function_call": "auto",
    "audio": {"voice": "x"},
    "modalities": ["text", "audio"],
    "prediction": {"type": "content"},
    "verbosity": "high",
    "web_search_options": {},
    "chat_template": "{{ x }}",
    "documents": [{}],
    "echo": True,
    "prompt": "x",
    "add_special_tokens": True,
}


@pytest.mark.parametrize("name", REFUSED)
async def test_a_documented_field_that_is_not_served_is_refused_by_name(complete, error_of, name):
    error = error_of(await complete(**{name: REFUSED[name]}), 400)
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")
    assert name in error["message"]


@pytest.mark.parametrize("name", REFUSED_IN_CHAT)
async def test_a_documented_field_that_is_not_served_is_refused_by_name_in_chat(chat, error_of, name):
    error = error_of(await chat(**{name: REFUSED_IN_CHAT[name]}), 400)
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")


@pytest.mark.parametrize("name", ["messages", "max_completion_tokens", "top_logprobs", "continue_final_message"])
async def test_a_chat_field_is_refused_by_completions(complete, error_of, name):
    assert error_of(await complete(**{name: 5}), 400)["param"] == name


HARMLESS = {
    "best_of": 1,
    "suffix": "",
    "use_beam_search": False,
    "length_penalty": 1.0,
    "response_format": {"type": "text"},
    "tools": [],
    "tool_choice": "none",
    "functions": [],
    "function_call": "none",
    "parallel_tool_calls": True,
    "store": False,
    "service_tier": "auto",
    "modalities": ["text"],
    "user": "someone",
    "metadata": {"a": "b"},
    "safety_identifier": "x",
    "prompt_cache_key": "x",
    "spaces_between_special_tokens": True,
    "thinking_token_budget": -1,
}


@pytest.mark.parametrize("path", ["complete", "chat"])
async def test_values_that_ask_for_nothing_are_accepted_in_silence(path, asks):
    response = await asks[path](**HARMLESS)
    assert response.status_code == 200
    assert "x-ignored-parameters" not in response.headers


@pytest.mark.parametrize("value", [True, 1.0, "1"])
async def test_harmless_values_are_compared_with_their_type(complete, error_of, value):
    assert error_of(await complete(best_of=value), 400)["param"] == "best_of"


@pytest.mark.parametrize("path", ["complete", "chat"])
async def test_null_is_the_default_of_every_field(path, asks, engine):
    from leyden.server.door.fields import NEUTRAL_VALUES
    from leyden.server.wire.requests import ChatRequest, CompletionRequest

    ask = asks[path]
    names = {*NEUTRAL_VALUES, *ChatRequest.model_fields, *CompletionRequest.model_fields, "unheard_of"}
    response = await ask(**dict.fromkeys(names - {"prompt", "messages"}))
    assert response.status_code == 200
    assert "x-ignored-parameters" not in response.headers
    await ask()
    assert engine.requests[0].sampling_params == engine.requests[1].sampling_params


async def test_undocumented_fields_are_accepted_and_listed(complete, chunks_of):
    response = await complete(router_hint=1, **{"x\r\nset-cookie: a": 2})
    assert response.status_code == 200
    assert response.headers["x-ignored-parameters"] == "router_hint, x??set-cookie??a"
    stream = await complete(router_hint=1, stream=True, stream_options={"other": 1})
    assert stream.headers["x-ignored-parameters"] == "router_hint, stream_options.other"
    assert chunks_of(stream)


async def test_the_list_of_ignored_fields_is_bounded(complete):
    response = await complete(**{f"field{i}" + "x" * 100: 1 for i in range(100)})
    assert response.status_code == 200
    listed = response.headers["x-ignored-parameters"]
    *names, rest = listed.split(", ")
    assert len(listed) < 3000 and len(names) > 10 and rest == f"and {100 - len(names)} more"


async def test_unknown_message_fields_are_listed_once(chat):
    messages = [{"role": "user", "content": "x", "id": "1"}, {"role": "user", "content": "x", "id": "2"}]
    assert (await chat(messages=messages)).headers["x-ignored-parameters"] == "messages[].id"


async def test_obfuscation_can_be_declined_but_not_had(complete, error_of):
    options = {"include_obfuscation": False}
    assert (await complete(stream=True, stream_options=options)).status_code == 200
    response = await complete(stream=True, stream_options={"include_obfuscation": True})
    assert error_of(response, 400)["param"] == "stream_options.include_obfuscation"


CHAT_SCORES = {"messages": [{"role": "user", "content": "Hi"}], "logprobs": True, "top_logprobs": 20}
RESPONSE_SCORES = {"input": "Hi", "include": ["message.output_text.logprobs"], "top_logprobs": 20}
CAPS = [
    ("max_n", 2, {"n": 2}, {"n": 3}),
    ("max_prompts", 2, {"prompt": ["a"] * 2}, {"prompt": ["a"] * 3}),
    ("max_stop_strings", 2, {"stop": ["a"] * 2}, {"stop": ["a"] * 3}),
    ("max_stop_chars", 5, {"stop": ["aaaaa"]}, {"stop": ["aaaaaa"]}),
    ("max_logprobs", 3, {"logprobs": 3}, {"logprobs": 4}),
    ("max_logit_bias", 2, {"logit_bias": {"1": 1, "2": 1}}, {"logit_bias": {"1": 1, "2": 1, "3": 1}}),
    ("max_scores", 1050, {"logprobs": 20, "max_tokens": 50}, {"logprobs": 20, "max_tokens": 51}),
    ("max_body_depth", 5, {"x": [[[[]]]]}, {"x": [[[[[]]]]]}),
    ("max_body_bytes", 1100, {"x": "y" * 1000}, {"x": "y" * 1200}),
    ("max_header_bytes", 1024, {}, {}),
]


@pytest.mark.parametrize(("setting", "bound", "taken", "refused"), CAPS, ids=[case[0] for case in CAPS])
async def test_every_cap_is_a_setting_that_its_refusal_names(make_client, setting, bound, taken, refused):
    client = make_client(**{setting: bound})
    assert (await client.post("/v1/completions", json={"prompt": "Hi", **taken})).status_code == 200
    headers = {"x-big": "y" * 1024} if setting == "max_header_bytes" else {}
    response = await client.post("/v1/completions", json={"prompt": "Hi", **refused}, headers=headers)
    assert response.status_code in (400, 413, 431)
    message = response.json()["error"]["message"]
    assert str(bound) in message
    assert f"setting {setting}" in message


@pytest.mark.parametrize(
    ("body", "num_tokens"),
    [
        ({"max_tokens": 50}, 50),
        ({"max_tokens": 51}, None),
        ({"n": 2, "max_tokens": 25}, 25),
        ({"n": 2, "max_tokens": 26}, None),
        ({"prompt": ["a", "b"], "max_tokens": 26}, None),
        ({"prompt": "y" * 46, "echo": True, "max_tokens": 3}, 3),
        ({"prompt": "y" * 46, "echo": True, "max_tokens": 4}, None),
        ({"prompt": "y" * 48, "echo": True, "max_tokens": 0}, 0),
        ({"prompt": "y" * 50, "echo": True, "max_tokens": 0}, None),
    ],
)
async def test_log_probabilities_of_a_request_are_bounded_over_prompts_and_choices(
    make_client, engine, body, num_tokens
):
    response = await make_client(max_scores=1050).post("/v1/completions", json={"prompt": "a", "logprobs": 20, **body})
    assert response.status_code == (400 if num_tokens is None else 200), response.text
    assert {request.sampling_params.max_tokens for request in engine.requests} == {num_tokens} - {None}


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/completions", {"prompt": "a", "logprobs": 20, "max_tokens": 60}, "max_tokens"),
        ("/v1/completions", {"prompt": "y" * 50, "logprobs": 20, "max_tokens": 0, "echo": True}, "logprobs"),
        ("/v1/chat/completions", CHAT_SCORES | {"max_completion_tokens": 60}, "max_completion_tokens"),
        ("/v1/responses", RESPONSE_SCORES | {"max_output_tokens": 60}, "max_output_tokens"),
    ],
)
async def test_a_refusal_of_too_many_log_probabilities_names_a_field_that_was_sent(
    make_client, error_of, path, body, field
):
    error = error_of(await make_client(max_scores=1030).post(path, json=body), 400)
    assert error["param"] == field
    assert field == "logprobs" or f"{field} 60 asks for 1260 log-probabilities" in error["message"]


@pytest.mark.parametrize(("n", "num_tokens"), [(1, 50), (2, 25)])
async def test_a_chat_without_a_length_is_as_long_as_its_log_probabilities_may_be(make_client, engine, n, num_tokens):
    body = CHAT_SCORES | {"n": n}
    assert (await make_client(max_scores=1050).post("/v1/chat/completions", json=body)).status_code == 200
    assert {request.sampling_params.max_tokens for request in engine.requests} == {num_tokens}


@pytest.mark.parametrize(("context", "bound"), [(128, 2_000_000), (300_000, 2_400_000)])
async def test_bound_on_a_body_follows_from_the_context_or_the_setting(make_client, engine, context, bound):
    engine.info.max_model_len = context
    client = make_client()
    assert (await client.get("/server_info")).json()["max_body_bytes"] == bound
    body = {"prompt": "Hi", "x": "y" * (bound - 1000)}
    assert (await client.post("/v1/completions", json=body)).status_code == 200
    body["x"] += "y" * 1000
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 413 and str(bound) in response.text
    assert (await make_client(max_body_bytes=5000).get("/server_info")).json()["max_body_bytes"] == 5000


def nested_schema(num_objects):
    schema = {"type": "string"}
    for _ in range(num_objects):
        schema = {"type": "object", "properties": {"inner": schema}, "required": ["inner"]}
    return schema


async def test_a_schema_of_many_objects_one_in_another_is_not_too_deep(make_client, tokenizer):
    tokenizer.chat_template = "tools <tool_call>"
    client, schema = make_client(), nested_schema(40)
    chat = {"messages": [{"role": "user", "content": "Hi"}]}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    form = {"type": "json_schema", "json_schema": {"name": "f", "schema": schema}}
    flat = {"input": "Hi", "tools": [{"type": "function", "name": "f", "parameters": schema}]}
    for path, body in [
        ("/v1/chat/completions", chat | {"tools": [tool]}),
        ("/v1/chat/completions", chat | {"response_format": form}),
        ("/v1/chat/completions", chat | {"structured_outputs": {"json": json.dumps(schema)}}),
        ("/v1/responses", flat),
    ]:
        response = await client.post(path, json=body)
        assert response.status_code == 200, response.text


@pytest.mark.parametrize("num_objects", [110, 200, 5_000, 100_000])
async def test_a_schema_as_deep_as_may_be_set_or_deeper_is_served_or_refused(make_client, tokenizer, num_objects):
    tokenizer.chat_template = "tools <tool_call>"
    nested = '{"type":"object","properties":{"x":' * num_objects + "{}" + "}}" * num_objects
    body = '{"messages":[{"role":"user","content":"Hi"}],"tools":[{"type":"function","function":{"name":"f",'
    raw = f'{body}"parameters":{nested}}}}}]}}'
    for limit in (128, 256):
        client = make_client(max_body_depth=limit, max_body_bytes=10_000_000)
        headers = {"content-type": "application/json"}
        response = await client.post("/v1/chat/completions", content=raw, headers=headers)
        assert response.status_code == (200 if 2 * num_objects + 6 <= limit else 400), response.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("body", "param"),
    [({"n": 5}, "n"), ({"prompt": ["a", "b", "c"], "n": 2}, "prompt"), ({"prompt": ["a"] * 5}, "prompt")],
)
async def test_request_for_more_sequences_than_the_engine_holds_is_400_with_the_bound(
    complete, error_of, engine, body, param, stream
):
    engine.info.num_state_slots, engine.info.max_waiting = 1, 3
    error = error_of(await complete(**body, stream=stream), 400)
    assert error["param"] == param
    assert "no more than 4 (max_num_seqs + max_waiting)" in error["message"]
    assert (await complete(n=4)).status_code == 200


async def test_the_same_in_a_chat(chat, error_of, engine):
    engine.info.num_state_slots, engine.info.max_waiting = 1, 3
    assert error_of(await chat(n=5), 400)["param"] == "n"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_text_that_can_never_fit_is_refused_before_it_is_tokenized(client, error_of, tokenizer, engine, path):
    text = "x" * (engine.info.max_model_len * tokenizer.max_token_chars + 1)
    body = {"prompt": text} if path == "/v1/completions" else {"messages": [{"role": "user", "content": text}]}
    error = error_of(await client.post(path, json=body), 400)
    assert error["code"] == "context_length_exceeded"
    assert "characters" in error["message"]
    assert tokenizer.threads == set()


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "x" * 1400}],
        [{"role": "tool", "content": "", "tool_call_id": "x" * 1400}],
        [{"role": "user", "content": "", "name": "x" * 1400}],
        [{"role": "user", "content": ""}] * 60,
    ],
    ids=["text", "a call's id", "a name", "many messages"],
)
async def test_a_long_conversation_is_laid_out_off_the_event_loop(client, monkeypatch, messages):
    from leyden.server.door import prompts

    sizes = []

    async def off_loop(num_chars, work):
        sizes.append(num_chars)
        return work()

    monkeypatch.setattr(prompts, "off_loop", off_loop)
    await client.post("/v1/chat/completions", json={"messages": messages})
    assert sizes[0] > 1000


async def test_a_request_that_waited_too_long_is_503_with_retry_after(complete, error_of, engine):
    from leyden.engine.errors import QueueTimeoutError

    async def generate(request):
        raise QueueTimeoutError("the request waited too long")
        yield

    engine.generate = generate
    for stream in (False, True):
        response = await complete(stream=stream)
        assert error_of(response, 503)["type"] == "overloaded"
        assert response.headers["retry-after"]
