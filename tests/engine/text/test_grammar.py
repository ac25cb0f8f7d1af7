"""A constrained answer is what its grammar allows, and nobody else notices."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from engines import DEVICE, answer, assert_nothing_held, drain, engine_config, make_core, request
from leyden.engine.core import EngineCore, grammar_compiler
from leyden.engine.errors import RequestError
from leyden.engine.llm import LLM
from leyden.engine.sampling_params import SamplingParams
from leyden.engine.text import grammar
from leyden.engine.text.grammar import Grammar, choice_grammar, json_grammar, make_matcher, regex_grammar
from leyden.engine.text.json_schema import MAX_OPEN_PROPERTIES
from leyden.engine.text.tokenizer import Tokenizer
from tiny_models import byte_tokenizer, random_prompt
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

pytest.importorskip("llguidance")

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
WORDS = ["red", "green blue", 'a "quoted" one', "\u00e9t\u00e9"]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("demo", device=DEVICE, max_num_seqs=8, cpu_memory_gb=0.2, num_threads=1)


@pytest.fixture(scope="module")
def vocabulary(llm):
    """As llguidance wants it."""
    return llm.tokenizer.for_grammars()


def generate(llm: LLM, grammar: str, n: int = 4, **params):
    asked = {"temperature": 1.5, "max_tokens": 80} | params
    return llm.generate(["Once"] * n, [SamplingParams(grammar=grammar, seed=i, **asked) for i in range(n)])


def test_json_follows_its_schema(llm):
    for done in generate(llm, json_grammar(PERSON), n=8):
        person = json.loads(done.text)
        assert done.finish_reason == "stop" and set(person) == {"name", "age"}
        assert len(person["name"]) <= 8 and 0 <= person["age"] <= 99


@pytest.mark.parametrize("pattern", ["[0-9]{3}-[a-z]{2,4}", "(yes|no)( sir)?", "[a-c]+/[d-f]{2}", r"\d+\.\d\d"])
def test_text_matches_its_regular_expression_as_a_whole(llm, pattern):
    for done in generate(llm, regex_grammar(pattern)):
        assert done.finish_reason == "length" or re.fullmatch(pattern, done.text), done.text


def test_a_choice_is_one_of_them(llm):
    texts = {done.text for done in generate(llm, choice_grammar(WORDS), n=8)}
    assert texts <= set(WORDS) and len(texts) > 1


def test_a_grammar_of_rules(llm):
    lark = 'start: sum\nsum: NUMBER ("+" NUMBER)~1..3\nNUMBER: /[1-9][0-9]?/\n'
    for done in generate(llm, lark):
        assert re.fullmatch(r"\d+(\+\d+){1,3}", done.text), done.text


def test_log_probabilities_come_from_the_raw_logits(llm):
    free = llm.generate("Once", SamplingParams(temperature=0.0, max_tokens=1, logprobs=5))[0]
    bound = llm.generate(
        "Once", SamplingParams(temperature=0.0, max_tokens=1, logprobs=5, grammar=choice_grammar(WORDS))
    )[0]
    assert bound.logprobs[0].top[:5] == free.logprobs[0].top[:5]
    assert bound.logprobs[0].token_id == bound.token_ids[0]


@pytest.mark.parametrize("lags", [False, True], ids=["at once", "a step behind"])
def test_neighbours_and_lag_change_nothing(lags):
    settings = {"device": DEVICE, "dtype": "float32", "max_num_seqs": 8, "cpu_memory_gb": 0.2, "num_threads": 1}
    llm = LLM("demo", async_scheduling=lags, **settings)
    bound = SamplingParams(temperature=1.0, seed=3, max_tokens=60, grammar=json_grammar(PERSON))
    free = SamplingParams(temperature=1.0, seed=4, max_tokens=30)
    alone = [llm.generate("Once upon", params)[0].text for params in (bound, free)]
    together = llm.generate(["Once upon"] * 4, [bound, free, bound, free])
    assert [done.text for done in together] == alone * 2
    json.loads(alone[0])


def test_a_preempted_answer_goes_on_where_it_was():
    settings = {"device": DEVICE, "max_num_seqs": 4, "cpu_memory_gb": 0.2, "num_threads": 1, "block_size": 4}
    roomy, tight = LLM("demo", **settings), LLM("demo", num_kv_blocks=20, max_model_len=80, **settings)
    params = [SamplingParams(temperature=1.0, seed=i, max_tokens=40, grammar=json_grammar(PERSON)) for i in range(4)]
    expected = [done.text for done in roomy.generate(["Once upon a time"] * 4, params)]
    assert [done.text for done in tight.generate(["Once upon a time"] * 4, params)] == expected
    assert tight.core.stats().preemptions_total > 0


WIDE = {"type": "object", "properties": {f"p{i}": {} for i in range(MAX_OPEN_PROPERTIES + 1)}}
JOINED = "start: A\nA: " + " & ".join(f"/.*a{i}.*/" for i in range(grammar.MAX_CONJUNCTIONS + 2))


BAD = {
    "syntax": "start: (((",
    "empty": "",
    "rule": "start: nothing\n",
    "look-around": regex_grammar("(?=a)b"),
    "size": "x" * (grammar.MAX_GRAMMAR_CHARS + 1),
    "conjunctions": JOINED,
    "wide": json_grammar({"type": "array", "items": WIDE}),
    "hidden schema": "start: %json // {}\n{}",
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_bad_grammar_is_refused_and_the_others_go_on(llm, bad):
    with pytest.raises(RequestError, match="grammar") as error:
        llm.generate(["Once", "Once"], [SamplingParams(grammar=bad), SamplingParams()])
    assert error.value.param == "grammar"
    assert_nothing_held(llm.core)
    assert len(llm.generate("Once", SamplingParams(max_tokens=3))[0].token_ids) == 3


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (f"start: answer\nanswer: {grammar.regex_rule('(')}\n", 'invalid regex "(": regex parse error: unclosed group'),
        (json_grammar({"pattern": "("}), "failed to compile JSON schema: regex parse error: unclosed group"),
        (json_grammar({"type": "foo"}), "failed to compile JSON schema: Invalid type: foo"),
        ("start: x\n", 'unknown name: "x"'),
        ('start: answer\nanswer: "a', "line 2, column 11: lexer error"),
    ],
    ids=["regex", "pattern", "schema", "name", "syntax"],
)
def test_an_error_tells_the_cause_and_nothing_of_the_grammar_around_it(vocabulary, bad, told):
    with pytest.raises(ValueError, match=f"^{re.escape(told)}$"):
        make_matcher(bad, vocabulary)


def test_an_ampersand_in_a_text_or_pattern_is_no_conjunction(vocabulary):
    sound = "start: " + ' "a" '.join(['"&"', "/[&]/"] * grammar.MAX_CONJUNCTIONS)
    make_matcher(sound, vocabulary)


def test_a_bad_grammar_among_others_in_the_engine(tiny):
    core = make_core(tiny.folder)
    alone = answer(core, random_prompt(9, 1), max_tokens=8)
    bad = request("bad", random_prompt(5, 2), max_tokens=8, grammar="start: (((")
    answers = drain(core, bad, request("good", random_prompt(9, 1), max_tokens=8))
    assert answers["good"].token_ids == alone.token_ids
    assert answers["bad"].finish_reason == "error" and "line 1, column " in answers["bad"].error


def test_where_nothing_is_allowed_that_request_fails_alone(tiny, monkeypatch):
    core = make_core(tiny.folder)
    alone = answer(core, random_prompt(9, 1), max_tokens=8)
    monkeypatch.setattr(Grammar, "fill", lambda self, mask: mask.fill(0))
    bound = request("bound", random_prompt(5, 2), max_tokens=8, grammar="start: /a+/\n")
    answers = drain(core, bound, request("good", random_prompt(9, 1), max_tokens=8))
    assert answers["good"].token_ids == alone.token_ids
    assert answers["bound"].finish_reason == "error" and "allows no token" in answers["bound"].error


def test_a_grammar_that_is_slow_again_and_again_fails_alone(tiny, monkeypatch):
    monkeypatch.setattr(grammar, "QUICK_SECONDS", 0.0)
    monkeypatch.setattr(grammar, "MAX_SLOW_SECONDS", 0.0)
    core = make_core(tiny.folder)
    alone = answer(core, random_prompt(9, 1), max_tokens=8)
    slow = request("slow", random_prompt(5, 2), max_tokens=8, grammar="start: /a+/\n")
    answers = drain(core, slow, request("good", random_prompt(9, 1), max_tokens=8))
    assert answers["good"].token_ids == alone.token_ids
    assert answers["slow"].finish_reason == "error" and len(answers["slow"].token_ids) == 1


def test_without_the_extra_it_is_refused_by_name(tiny, monkeypatch):
    monkeypatch.setattr(grammar.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match="structured"):
        make_core(tiny.folder).add_request(request("a", [1, 2], grammar="start: /a/\n"))


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Of a kind that llguidance cannot read."""
    return PreTrainedTokenizerFast(tokenizer_object=Backend(WordLevel({"a": 0, "b": 1}, unk_token="b")), eos_token="b")


@pytest.mark.parametrize(
    ("make", "reason"),
    [(lambda: byte_tokenizer(control=()), "no token that could end"), (word_tokenizer, "llguidance")],
    ids=["without an end", "of another kind"],
)
def test_a_tokenizer_that_suits_no_grammar_stops_only_requests_with_one(tiny, tmp_path, make, reason):
    folder = shutil.copytree(tiny.folder, tmp_path / "model")
    make().save_pretrained(folder)
    grammars = grammar_compiler(engine_config(folder))
    grammars.prepare()
    core = EngineCore(engine_config(folder), progress=False, grammars=grammars)
    grammars.wait()
    bound = request("bound", random_prompt(5, 2), max_tokens=8, grammar="start: /a+/\n")
    answers = drain(core, bound, request("good", random_prompt(9, 1), max_tokens=8))
    assert answers["bound"].finish_reason == "error" and reason in answers["bound"].error
    assert len(answers["good"].token_ids) == 8


def test_grammar_is_compiled_once_for_all_its_requests(tiny, monkeypatch):
    compiled = []
    monkeypatch.setattr(
        grammar, "make_matcher", lambda text, vocabulary: compiled.append(text) or make(text, vocabulary)
    )
    make = make_matcher
    core, ids = make_core(tiny.folder), Tokenizer(tiny.folder).encode
    either = choice_grammar(["aaaa", "bbbb"])
    requests = [
        request(str(i), random_prompt(5, i), max_tokens=8, grammar=either, logit_bias={ids(first)[0]: 9.0})
        for i, first in enumerate("ab")
    ]
    answers = drain(core, *requests)
    assert len(compiled) == 1
    assert [answers[each.request_id].token_ids[:4] for each in requests] == [ids("aaaa"), ids("bbbb")]
    for i in range(grammar.MAX_KEPT):
        drain(core, request("other", random_prompt(5, i), max_tokens=2, grammar=choice_grammar([f"a{i}"])))
    drain(core, request("again", random_prompt(5, 1), max_tokens=2, grammar=either))
    assert compiled.count(either) == 2, "it was the one asked for longest ago"


BOMBS = {
    "deep schema": json_grammar(json.loads('{"type": "array", "items": ' * 30 + "{}" + "}" * 30)),
    "large enum": json_grammar({"enum": [f"value {i}" for i in range(5000)]}),
    "repetition": regex_grammar("((a{1,1000}){1,1000}){1,1000}"),
    "backtracking": regex_grammar("(.*a){300}b"),
    "states": regex_grammar("(a|b)*a(a|b){500}"),
    "recursion": 'start: a\na: "x" a a | "y"\n',
    "endless text": 'start: /a+/ "a"\n%llguidance {"no_forcing": false}',
    "endless reference": json_grammar({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}),
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_a_bomb_is_refused_or_harmless(llm, vocabulary, bomb):
    """Bounded in work, not in time: that it ends at all is the law."""
    try:
        make_matcher(bomb, vocabulary)
    except ValueError:
        return
    done = llm.generate("Once", SamplingParams(temperature=1.0, seed=1, max_tokens=20, grammar=bomb))[0]
    assert done.finish_reason in ("length", "stop", "error")
    assert_nothing_held(llm.core)
