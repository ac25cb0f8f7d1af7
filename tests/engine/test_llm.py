"""The offline twin: prompts in, texts out, and nothing left behind."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from engines import assert_nothing_held
from leyden import LLM, SamplingParams
from leyden.engine.errors import CheckpointError, ConfigError, ContextLengthError, RequestError
from tiny_models import greedy, random_prompt

GREEDY = SamplingParams(temperature=0.0, max_tokens=10)


@pytest.fixture(scope="module")
def llm(tiny):
    sizes = {"max_num_seqs": 4, "max_waiting": 3, "max_num_batched_tokens": 64, "max_model_len": 256}
    return LLM(str(tiny.folder), cpu_memory_gb=0.05, num_threads=1, **sizes)


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(llm):
    yield
    try:
        assert_nothing_held(llm.core)
    finally:
        for each in [*llm.core.scheduler.waiting, *llm.core.scheduler.running]:
            llm.core.abort_request(each.request_id)


def test_text_and_token_ids_are_the_same_prompt(llm, tiny):
    ids = llm.tokenizer.encode("Größe")
    by_text, by_ids = llm.generate(["Größe", ids], GREEDY)
    assert by_text.token_ids == by_ids.token_ids == greedy(tiny.model, ids, 10)
    assert by_text.prompt_token_ids == ids and by_text.finish_reason == "length"
    assert by_text.text == llm.tokenizer.decode(by_text.token_ids).rstrip("\N{REPLACEMENT CHARACTER}")


@pytest.mark.parametrize("prompt", ["hi", [1, 2, 3]])
def test_one_prompt_need_not_be_a_list(llm, prompt):
    assert len(llm.generate(prompt, GREEDY)) == 1


def test_no_prompts_give_no_answers(llm):
    assert llm.generate([], GREEDY) == []


def test_more_prompts_than_the_queue_holds_come_back_in_order(llm, tiny):
    prompts = [random_prompt(3 + i % 7, i) for i in range(16)]
    answers = llm.generate(prompts, GREEDY)
    assert [each.prompt_token_ids for each in answers] == prompts
    assert [each.token_ids for each in answers] == [greedy(tiny.model, p, 10) for p in prompts]


def test_each_prompt_may_bring_its_params(llm):
    each = [SamplingParams(temperature=0.0, max_tokens=n) for n in (1, 5, 0)]
    answers = llm.generate([[1, 2]] * 3, each)
    assert [len(a.token_ids) for a in answers] == [1, 5, 0]
    with pytest.raises(RequestError, match="2 prompts but 3"):
        llm.generate([[1]] * 2, each)


def test_each_prompt_gets_n_answers_that_repeat_by_their_seed(llm):
    params = SamplingParams(n=3, seed=5, max_tokens=6)
    answers = llm.generate([[1, 2], [3]], [params, SamplingParams(max_tokens=1)])
    assert [answer.prompt_token_ids for answer in answers] == [[1, 2]] * 3 + [[3]]
    alone = [llm.generate([1, 2], SamplingParams(seed=5 + j, max_tokens=6))[0] for j in range(3)]
    assert [answer.token_ids for answer in answers[:3]] == [answer.token_ids for answer in alone]
    assert len({tuple(answer.token_ids) for answer in answers[:3]}) == 3


def test_one_stop_string_need_not_be_a_tuple(llm):
    whole = SamplingParams(temperature=0.0, max_tokens=40, stop="no such text in an answer")
    assert whole.stop == ("no such text in an answer",)
    assert llm.generate([1, 2], whole)[0].finish_reason == "length"


def test_stop_string_cuts_the_text_and_frees_the_engine(llm):
    params = {"temperature": 0.0, "max_tokens": 100, "logit_bias": dict.fromkeys(range(256, 320), -100.0)}
    [whole] = llm.generate([[1, 2]], SamplingParams(**params))
    stop = whole.text[20:23]
    [cut] = llm.generate([[1, 2]], SamplingParams(**params, stop=(stop,)))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    assert len(cut.token_ids) < 100


def test_logprobs_belong_to_the_tokens(llm):
    params = SamplingParams(temperature=0.0, max_tokens=6, logprobs=2, prompt_logprobs=1)
    [got] = llm.generate([[1, 2, 3]], params)
    assert [entry.token_id for entry in got.logprobs] == got.token_ids
    assert all(entry.top[0] == (entry.token_id, entry.logprob) for entry in got.logprobs), "greedy takes the best"
    assert [entry and entry.token_id for entry in got.prompt_logprobs] == [None, 2, 3]


def test_prompts_share_the_cache_within_their_salt(tiny):
    llm = LLM(str(tiny.folder), device="cpu", cpu_memory_gb=0.05, num_threads=1, snapshot_min_tokens=1)
    messages = [{"role": "user", "content": "x" * 40}]
    for ask in (
        lambda salt: llm.generate([[1] * 40], GREEDY, cache_salt=salt),
        lambda salt: llm.chat(messages, GREEDY, cache_salt=salt),
    ):
        each = [ask(salt)[0] for salt in ("a", "a", "b", None)]
        assert [answer.num_cached_tokens for answer in each] == [0, len(each[0].prompt_token_ids) - 1, 0, 0]
        assert all(answer.token_ids == each[0].token_ids for answer in each)


def test_chat_renders_the_template(llm, tiny):
    conversation = [{"role": "user", "content": "Hello"}]
    [one] = llm.chat(conversation, GREEDY)
    assert one.prompt_token_ids == llm.tokenizer.encode_chat(conversation)
    assert one.token_ids == greedy(tiny.model, one.prompt_token_ids, 10)
    two = llm.chat([conversation, [{"role": "user", "content": "Bye"}]], GREEDY)
    assert two[0].token_ids == one.token_ids and len(two) == 2


@pytest.mark.parametrize("bad", [[], [10**6], [-1]])
def test_wrong_prompt_is_refused_and_the_others_are_not_left_running(llm, bad):
    with pytest.raises(RequestError):
        llm.generate([[1], [2], bad, [3]], GREEDY)


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda llm: llm.generate(5), "prompts must be a text.*got 5"),
        (lambda llm: llm.generate(None), "prompts must be a text.*got None"),
        (lambda llm: llm.generate(["x", 5]), "a prompt must be a text.*got 5"),
        (lambda llm: llm.generate("x", {"max_tokens": 3}), r"params must be SamplingParams.*got \{'max_tokens': 3\}"),
        (lambda llm: llm.generate(["x"], ["y"]), "params must be SamplingParams.*got 'y'"),
        (lambda llm: llm.generate(["x"], [None]), "params must be SamplingParams.*got None"),
        (lambda llm: llm.chat("hi"), "a conversation must be a list of messages.*got 'hi'"),
        (lambda llm: llm.chat(["hi"]), r"a conversation must be a list of messages.*got \['hi'\]"),
        (lambda llm: llm.chat([[{"role": "user", "content": "x"}], "hi"]), "list of messages.*got 'hi'"),
        (lambda llm: llm.chat([{"role": "user", "content": "x"}], 5), "params must be SamplingParams.*got 5"),
    ],
)
def test_value_that_is_no_prompt_is_a_type_error_with_the_wanted_type(llm, caplog, ask, words):
    with pytest.raises(TypeError, match=words):
        ask(llm)
    assert caplog.text == ""


def test_wrong_prompt_after_many_is_refused_before_any_runs(llm):
    steps = llm.core.stats().steps_total
    with pytest.raises(ContextLengthError):
        llm.generate([*[[1]] * 20, [1] * 300], GREEDY)
    assert llm.core.stats().steps_total == steps


def test_interrupt_leaves_nothing_behind(llm, monkeypatch):
    calls = iter(range(100))

    def interrupted():
        if next(calls) == 3:
            raise KeyboardInterrupt
        return type(llm.core).step(llm.core)

    monkeypatch.setattr(llm.core, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[1], [2]], GREEDY)


def test_request_with_nan_fails_alone(llm, tiny):
    import torch

    poison = 301
    with torch.inference_mode():
        before = llm.core.runner.model.embedding[poison].clone()
        llm.core.runner.model.embedding[poison] = float("nan")
    try:
        bad, good = llm.generate([[1, poison], [1, 2]], GREEDY)
    finally:
        with torch.inference_mode():
            llm.core.runner.model.embedding[poison] = before
    assert (bad.finish_reason, good.finish_reason) == ("error", "length")
    assert good.token_ids == greedy(tiny.model, [1, 2], 10)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_num_seq": 4}, "unknown setting 'max_num_seq'; did you mean 'max_num_seqs'"),
        ({"gpu_memory_utilization": 0.9}, "the setting is memory_fraction here"),
        ({"port": 8000}, "unknown setting 'port'"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"device": "tpu"}, "device"),
        ({"max_model_len": 10**6}, "max_model_len"),
        ({"cpu_memory_gb": 1e-9}, "cpu_memory_gb"),
        ({"device": "cuda:77"}, "cuda:77"),
    ],
)
def test_wrong_setting_is_a_config_error_that_names_it(tiny, settings, words):
    with pytest.raises(ConfigError, match=words):
        LLM(str(tiny.folder), **settings)


def test_missing_folder_is_a_checkpoint_error(tmp_path):
    with pytest.raises(CheckpointError, match="neither a folder"):
        LLM(str(tmp_path / "nowhere"))


def test_the_examples_of_the_page_run():
    page = (Path(__file__).parents[2] / "docs" / "python.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict = {}
    exec("\n".join(examples), names)
    assert len(examples) == 2 and names["best"] in names["stories"] and names["reply"].text


def test_the_page_tells_every_sampling_parameter_and_its_default():
    page = (Path(__file__).parents[2] / "docs" / "python.md").read_text()
    told: dict[str, str] = {}
    for fields, defaults in re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| ([^|]*) \|", page, re.MULTILINE):
        told |= zip(re.findall(r"\w+", fields), re.findall(r"[\w.()]+", defaults), strict=False)
    defaults = {field: repr(getattr(SamplingParams(), field)) for field in SamplingParams.__struct_fields__}
    assert {name: told.get(name) for name in defaults} == defaults
