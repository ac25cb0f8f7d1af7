"""What a request may tell the chat template: an effort and settings, by the names that the template reads."""

from __future__ import annotations

import msgspec
import pytest
from leyden.engine.errors import RequestError
from leyden.engine.text.template_inputs import template_inputs
from leyden.server.door import prompts, validation
from leyden.server.door.template_settings import MAX_SETTINGS, MAX_SETTINGS_CHARS, read_settings

# As the templates of real checkpoints ask.
QWEN_3_8 = (
    "{% if reasoning_effort is not defined %}{% set reasoning_effort = 'xhigh' %}{% endif %}"
    "{% if reasoning_effort not in ['xhigh', 'medium', 'low'] %}{{ raise_exception('effort') }}{% endif %}"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>{% else %}<think>{% endif %}"
)
QWEN_3_5 = "{% if enable_thinking is true %}<think>{% else %}<think></think>{% endif %}"
GRANITE = "{% if thinking %}think{% endif %}"
RING = "{% if reasoning_effort == 'high' %}a{% elif reasoning_effort == 'low' %}b{% endif %}"
PRINTS = "{{ reasoning_effort }}"
MUTE = "{% for message in messages %}{{ message.enable_thinking }}{% endfor %}"


def settings_of(effort, template, **settings):
    return read_settings(effort, settings, template_inputs([template]))


@pytest.mark.parametrize(
    ("template", "effort", "expected"),
    [
        (QWEN_3_8, "none", {"enable_thinking": False}),
        (QWEN_3_8, "minimal", {"enable_thinking": True, "reasoning_effort": "low"}),
        (QWEN_3_8, "low", {"enable_thinking": True, "reasoning_effort": "low"}),
        (QWEN_3_8, "medium", {"enable_thinking": True, "reasoning_effort": "medium"}),
        (QWEN_3_8, "high", {"enable_thinking": True, "reasoning_effort": "xhigh"}),
        (QWEN_3_8, "xhigh", {"enable_thinking": True, "reasoning_effort": "xhigh"}),
        (QWEN_3_8, "max", {"enable_thinking": True, "reasoning_effort": "xhigh"}),
        (QWEN_3_5, "none", {"enable_thinking": False}),
        (QWEN_3_5, "low", {"enable_thinking": True}),
        (GRANITE, "none", {"thinking": False}),
        (GRANITE, "high", {"thinking": True}),
        (RING, "high", {"reasoning_effort": "high"}),
        (RING, "xhigh", {"reasoning_effort": "high"}),
        (RING, "none", {"reasoning_effort": "low"}),
        (PRINTS, "minimal", {"reasoning_effort": "minimal"}),
        (PRINTS, "none", {"reasoning_effort": "none"}),
    ],
)
def test_effort_becomes_a_word_of_the_template(template, effort, expected):
    assert settings_of(effort, template) == (expected, [])


def test_setting_that_the_template_does_not_read_is_listed():
    assert settings_of("high", MUTE, enable_thinking=False, tone="kind") == (
        {},
        ["chat_template_kwargs.enable_thinking", "chat_template_kwargs.tone", "reasoning_effort"],
    )
    assert settings_of(None, MUTE) == ({}, [])


def test_settings_win_over_an_effort():
    assert settings_of("none", QWEN_3_8, enable_thinking=True)[0] == {"enable_thinking": True}
    assert settings_of("low", PRINTS, reasoning_effort="odd", x=None)[0] == {"reasoning_effort": "odd"}


# vLLM's CVE-2025-61620 and CVE-2025-62426: settings that replace the renderer's own.
OWN = ["messages", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize"]
OWN += ["conversation", "return_dict", "raise_exception", "strftime_now", "range", "namespace", "bos_token"]


@pytest.mark.parametrize("name", OWN)
def test_name_that_the_renderer_reserves_is_refused(name):
    inputs = template_inputs([f"{{{{ {name} }}}}"], ["return_dict"])
    assert name not in inputs.settings
    with pytest.raises(RequestError, match=name) as caught:
        read_settings(None, {name: 1}, inputs)
    assert caught.value.param == "chat_template_kwargs"


@pytest.mark.parametrize(
    "settings",
    [{f"x{i}": 1 for i in range(MAX_SETTINGS + 1)}, {"tone": "x" * MAX_SETTINGS_CHARS}],
    ids=["many", "long"],
)
def test_settings_are_bounded(settings):
    with pytest.raises(RequestError, match="at most"):
        read_settings(None, settings, template_inputs(["{{ tone }}"]))


def test_names_are_found_in_every_template_that_transformers_takes():
    loops = "{% for m in messages %}{% if m.stop %}{% break %}{% endif %}{{ inner }}{% endfor %}"
    tagged = "{% generation %}{{ spoken }}{% endgeneration %}{% set own = 1 %}{{ own }}{{ m.field }}"
    assert template_inputs([loops, tagged, "{% broken", QWEN_3_5]).settings == {
        "inner",
        "spoken",
        "m",
        "enable_thinking",
    }


# -- over HTTP ------------------------------------------------------------------------------------------------


@pytest.fixture
def post(engine, tokenizer, make_client):
    engine.info = msgspec.structs.replace(engine.info, max_model_len=4096)
    tokenizer.chat_template = QWEN_3_8

    async def post(path, **body):
        return await make_client().post(path, json={"messages": [{"role": "user", "content": "Hi"}]} | body)

    return post


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
async def test_chat_and_tokenize_pass_them_on(post, tokenizer, path):
    response = await post(path, reasoning_effort="high", chat_template_kwargs={"enable_thinking": False, "x": 1})
    assert response.status_code == 200, response.text
    assert tokenizer.template_kwargs == {"enable_thinking": False, "reasoning_effort": "xhigh"}
    assert response.headers["x-ignored-parameters"] == "chat_template_kwargs.x"
    response = await post(path, reasoning_effort=None, chat_template_kwargs={})
    assert tokenizer.template_kwargs == {}
    assert "x-ignored-parameters" not in response.headers


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"reasoning_effort": "much"}, "reasoning_effort"),
        ({"reasoning_effort": 1}, "reasoning_effort"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"add_generation_prompt": True}}, "chat_template_kwargs"),
    ],
)
async def test_wrong_template_setting_is_refused_by_name(post, error_of, path, body, param):
    assert error_of(await post(path, **body), 400)["param"] == param


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
async def test_template_settings_are_read_once_per_request(post, monkeypatch, path):
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return read_settings(*arguments)

    for module in (validation, prompts):
        monkeypatch.setattr(module, "read_settings", counted, raising=False)
    assert (await post(path, reasoning_effort="high")).status_code == 200
    assert len(calls) == 1


async def test_a_prompt_has_no_template(make_client, error_of):
    for field in ({"reasoning_effort": "low"}, {"chat_template_kwargs": {"x": 1}}):
        error = error_of(await make_client().post("/tokenize", json={"prompt": "Hi"} | field), 400)
        assert error["param"] == next(iter(field))
    for field in ({"reasoning_effort": "low"}, {"chat_template_kwargs": {"x": 1}}):
        error = error_of(await make_client().post("/v1/completions", json={"prompt": "Hi"} | field), 400)
        assert (error["param"], error["code"]) == (next(iter(field)), "unsupported_parameter")
