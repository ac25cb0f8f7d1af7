from __future__ import annotations

import threading

import pytest
from openai.types import Completion

BOS, EOS = 256, 257


def validated(response):
    assert response.status_code == 200, response.text
    return Completion.model_validate(response.json(), strict=True)


async def test_a_completion_has_exactly_the_documented_keys(complete):
    body = (await complete()).json()
    assert set(body) == {"id", "object", "created", "model", "choices", "usage"}
    assert body["id"].startswith("cmpl-")
    assert (body["object"], body["model"]) == ("text_completion", "tiny")
    assert body["choices"] == [{"index": 0, "text": "Hello, world", "logprobs": None, "finish_reason": "stop"}]
    assert body["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 13,
        "total_tokens": 16,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_max_tokens_defaults_to_16_and_ends_with_length(complete, engine):
    engine.reply = b"x" * 40
    choice = validated(await complete()).choices[0]
    assert (choice.text, choice.finish_reason) == ("x" * 16, "length")


@pytest.mark.parametrize(
    ("prompt", "sent"),
    [
        ("ab", [[BOS, 97, 98]]),
        (["ab", "c"], [[BOS, 97, 98], [BOS, 99]]),
        ([97, 98], [[97, 98]]),
        ([[97], [98, 99]], [[97], [98, 99]]),
    ],
    ids=["text", "texts", "tokens", "token lists"],
)
async def test_every_form_of_prompt_reaches_the_engine_as_token_ids(complete, engine, prompt, sent):
    assert len(validated(await complete(prompt=prompt)).choices) == len(sent)
    assert [request.prompt_token_ids for request in engine.requests] == sent


async def test_add_special_tokens_false_sends_the_text_alone(complete, engine):
    await complete(prompt="ab", add_special_tokens=False)
    assert engine.requests[0].prompt_token_ids == [97, 98]


@pytest.mark.parametrize(
    ("asked", "sent"),
    [({}, [*b"a</s>b"]), ({"parse_special": False}, [*b"a</s>b"]), ({"parse_special": True}, [*b"a", EOS, *b"b"])],
    ids=str,
)
async def test_control_tokens_that_a_prompt_spells_are_text_unless_asked_for(complete, client, engine, asked, sent):
    validated(await complete(prompt="a</s>b", **asked))
    assert engine.requests[0].prompt_token_ids == [BOS, *sent]
    told = await client.post("/tokenize", json={"prompt": "a</s>b", **asked})
    assert told.json()["tokens"] == [BOS, *sent]


async def test_choices_are_numbered_prompt_times_n_plus_j_and_each_prompt_counts_once(complete, engine):
    engine.choose_reply = lambda request: b"<" + bytes(request.prompt_token_ids[1:]) + b">"
    answer = validated(await complete(prompt=["a", "bb"], n=3))
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert [choice.text for choice in answer.choices] == ["<a>"] * 3 + ["<bb>"] * 3
    assert answer.usage.prompt_tokens == 2 + 3
    assert answer.usage.completion_tokens == 3 * 4 + 3 * 5


async def test_seeds_of_n_choices_differ_and_repeat(complete, engine):
    for _ in range(2):
        await complete(n=3, seed=2**63 - 2)
    seeds = [request.sampling_params.seed for request in engine.requests]
    assert seeds[:3] == [2**63 - 2, 2**63 - 1, -(2**63)]
    assert seeds[3:] == seeds[:3]


async def test_without_a_seed_none_is_sent(complete, engine):
    await complete(n=2)
    assert [request.sampling_params.seed for request in engine.requests] == [None, None]


async def test_engine_request_ids_are_unique_and_lead_from_the_answers_id(client, engine):
    """The header's id may repeat; the log names a request by the engine's."""
    sent = {"json": {"prompt": "a", "n": 2}, "headers": {"x-request-id": "same"}}
    answers = [(await client.post("/v1/completions", **sent)).json() for _ in range(2)]
    keys = [answer["id"].removeprefix("cmpl-") for answer in answers]
    assert len(set(keys)) == 2
    assert sorted(request.request_id for request in engine.requests) == sorted(f"{k}-{i}" for k in keys for i in (0, 1))


@pytest.mark.parametrize(("prompt", "text"), [("Hi", "Hi"), ([72, 105], "Hi"), ([BOS, 72, 105], "Hi")])
async def test_echo_begins_with_the_prompt_text(complete, prompt, text):
    assert validated(await complete(prompt=prompt, echo=True)).choices[0].text == text + "Hello, world"


async def test_echo_with_max_tokens_0_scores_the_prompt_and_generates_nothing(complete):
    body = (await complete(prompt=[97, 98, 99], echo=True, max_tokens=0, logprobs=1)).json()
    choice = body["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("abc", "length")
    assert choice["logprobs"]["tokens"] == ["a", "b", "c"]
    assert body["usage"]["completion_tokens"] == 0


async def test_echoed_logprobs_begin_with_null_and_then_hold_the_maximum_exactly(complete):
    body = (await complete(prompt=[97, 98, 99], echo=True, max_tokens=1, logprobs=1)).json()
    logprobs = body["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["a", "b", "c", "H"]
    assert logprobs["token_logprobs"] == [None, -1.5, -1.5, -1.5]
    assert logprobs["top_logprobs"] == [None, *({t: -0.25, c: -1.5} for t, c in ("cb", "dc", "IH"))]
    assert logprobs["text_offset"] == [0, 1, 2, 3]


async def test_logprobs_of_the_answer_count_text_offsets_from_0(complete, engine):
    engine.reply = b"abc"
    logprobs = (await complete(logprobs=0)).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["a", "b", "c", "</s>"]
    assert logprobs["top_logprobs"][0] == {"a": -1.5}
    assert logprobs["text_offset"] == [0, 1, 2, 3]


async def test_top_logprobs_hold_the_chosen_token_when_it_is_outside_the_top(complete, engine):
    engine.reply = b"a"
    first = (await complete(logprobs=2)).json()["choices"][0]["logprobs"]["top_logprobs"][0]
    assert first == {"b": -0.25, "c": -0.5, "a": -1.5}


async def test_a_token_that_is_part_of_a_character_is_shown_as_bytes(complete, engine):
    engine.reply = "é".encode()
    choice = (await complete(logprobs=0)).json()["choices"][0]
    assert choice["text"] == "é"
    assert choice["logprobs"]["tokens"][:2] == ["bytes:\\xc3", "bytes:\\xa9"]


@pytest.mark.parametrize("stop", ["lo, w", ["zzz", "lo, w"]])
async def test_a_stop_string_across_tokens_ends_the_text_before_it(complete, engine, stop):
    answer = validated(await complete(stop=stop))
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("Hel", "stop")
    assert answer.usage.completion_tokens == 8
    assert engine.num_aborted == 1


async def test_include_stop_str_in_output_keeps_the_stop_string(complete):
    answer = validated(await complete(stop=["lo"], include_stop_str_in_output=True))
    assert answer.choices[0].text == "Hello"


async def test_return_token_ids_adds_prompt_and_answer_ids(complete, engine):
    engine.reply = b"ab"
    choice = (await complete(return_token_ids=True)).json()["choices"][0]
    assert choice["prompt_token_ids"] == [BOS, 72, 105]
    assert choice["token_ids"] == [97, 98, 257]


async def test_every_sampling_field_reaches_the_engine(complete, engine):
    wanted = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": -1,
        "frequency_penalty": 2,
        "max_tokens": 9,
        "min_tokens": 2,
        "seed": 5,
        "ignore_eos": True,
        "skip_special_tokens": False,
    }
    response = await complete(**wanted, stop_token_ids=[3], logit_bias={"7": -100}, priority=-4)
    assert response.status_code == 200
    request = engine.requests[0]
    assert {name: getattr(request.sampling_params, name) for name in wanted} == wanted
    assert request.sampling_params.stop_token_ids == (3,)
    assert request.sampling_params.logit_bias == {7: -100.0}
    assert request.priority == -4


async def test_sampling_defaults_come_from_the_checkpoint_under_the_request(make_client, tokenizer, engine):
    tokenizer.default_sampling = {"temperature": 0.25, "top_k": 5}
    client = make_client()
    await client.post("/v1/completions", json={"prompt": "a", "top_k": 9, "temperature": None})
    params = engine.requests[0].sampling_params
    assert (params.temperature, params.top_k, params.top_p) == (0.25, 9, 1.0)


async def test_generation_defaults_off_leaves_openais_defaults(make_client, tokenizer, engine):
    tokenizer.default_sampling = {"temperature": 0.25}
    await make_client(generation_defaults=False).post("/v1/completions", json={"prompt": "a"})
    assert engine.requests[0].sampling_params.temperature == 1.0


async def test_long_text_is_tokenized_outside_the_event_loops_thread(complete, tokenizer, engine):
    engine.info.max_model_len = 10_000
    await complete(prompt="short")
    assert tokenizer.threads == {threading.get_ident()}
    await complete(prompt="long" * 1000)
    assert len(tokenizer.threads) == 2


async def test_stop_strings_of_a_completion_count_in_all_of_it(complete, engine):
    engine.reply = b"<think>a\n\nb</think>"
    for asked in ({}, {"stop_in_reasoning": True}, {"stop_in_reasoning": False}):
        response = await complete(stop=["\n\n"], max_tokens=50, **asked)
        assert response.json()["choices"][0]["text"] == "<think>a"
        assert "x-ignored-parameters" not in response.headers
