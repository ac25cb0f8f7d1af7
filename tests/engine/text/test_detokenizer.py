"""Text from tokens: the same however it is cut, never half a character, never the beginning of a stop string."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from leyden.engine.outputs import RequestOutput, StepOutput, TokenLogprobs
from leyden.engine.sampling_params import SamplingParams
from leyden.engine.text.detokenizer import MAX_OPEN, IncrementalDetokenizer, StopStrings, TextStream
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

FFFD = "\N{REPLACEMENT CHARACTER}"
characters = st.characters(exclude_categories=("Cs",), exclude_characters=FFFD)
texts = st.text(characters, max_size=30) | st.text("aäß€😀👩‍👩‍👧é\n ", max_size=20)
relaxed = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


def cut(items, sizes: list[int]):
    """`items` in pieces of the given sizes, again and again."""
    start = 0
    for i in range(len(items) + 1):
        if start >= len(items):
            return
        size = sizes[i % len(sizes)]
        yield items[start : start + size]
        start += size


def byte_ids(tokenizer, data: bytes) -> list[int]:
    """The token of each byte."""
    of_byte = {tokenizer.token_bytes(i): i for i in range(256)}
    return [of_byte[bytes([b])] for b in data]


def finish(stream: TextStream, steps: list[StepOutput]) -> list:
    """Outputs up to the first that ends."""
    outputs = []
    for step in steps:
        outputs.append(stream.push(step))
        if outputs[-1].finish_reason is not None:
            break
    return outputs


def run(tokenizer, text: str, *, sizes=(1,), finish_reason="length", stop_token_id=None, **params):
    """(whole text, last output) of a stream that brings `text` in pieces and then ends."""
    ids = tokenizer.encode(text) + ([stop_token_id] if stop_token_id is not None else [])
    pieces = list(cut(ids, list(sizes)))
    steps = [StepOutput(request_id="r", token_ids=piece) for piece in pieces]
    steps[-1].finish_reason, steps[-1].stop_token_id = finish_reason, stop_token_id
    outputs = finish(TextStream(tokenizer, SamplingParams(**({"max_tokens": None} | params)), [0] * 3), steps)
    return "".join(output.text for output in outputs), outputs[-1]


@relaxed
@given(text=texts, sizes=st.lists(st.integers(1, 7), min_size=1, max_size=5))
def test_any_cut_gives_the_whole_text_and_no_half_character(tokenizer, text, sizes):
    detokenizer = IncrementalDetokenizer(tokenizer)
    deltas = [detokenizer.push(piece) for piece in cut(tokenizer.encode(text), sizes)]
    assert not any(FFFD in delta for delta in deltas)
    assert "".join(deltas) + detokenizer.flush() == text


def test_character_appears_with_its_last_byte(tokenizer):
    detokenizer = IncrementalDetokenizer(tokenizer)
    deltas = [detokenizer.push([token]) for token in tokenizer.encode("a€😀b")]
    assert deltas == ["a", "", "", "€", "", "", "", "😀", "b"]


def test_broken_bytes_do_not_hang_the_stream(tokenizer):
    detokenizer = IncrementalDetokenizer(tokenizer)
    shown = ""
    for i, token in enumerate(byte_ids(tokenizer, b"\xff" * 40)):
        shown += detokenizer.push([token])
        assert i <= MAX_OPEN or shown, "nothing came in spite of too many open tokens"
    shown += "".join(detokenizer.push([token]) for token in tokenizer.encode("after"))
    assert shown.endswith("after")
    assert len(shown.removesuffix("after")) == 40 and set(shown[:-5]) == {FFFD}


@relaxed
@given(data=st.binary(max_size=30))
def test_bytes_decode_as_python_decodes_them_up_to_a_broken_end(tokenizer, data):
    ids = byte_ids(tokenizer, data)
    whole = data.decode("utf-8", errors="replace")
    detokenizer = IncrementalDetokenizer(tokenizer)
    streamed = "".join(detokenizer.push([token]) for token in ids) + detokenizer.flush()
    assert streamed.rstrip(FFFD) == whole.rstrip(FFFD)


class ByteFallback:
    """A sentencepiece-like tokenizer: words carry their space in front, everything else is spelled in bytes."""

    WORDS = ("▁the", "▁a", "b", "▁")
    control_ids = frozenset()

    def __init__(self) -> None:
        names = [*self.WORDS, *(f"<0x{byte:02X}>" for byte in range(256))]
        self._backend = Backend(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
        self._backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )

    def ids(self, pieces: list[str]) -> list[int]:
        return [
            i
            for piece in pieces
            for i in (
                [self.WORDS.index(piece)] if piece in self.WORDS else [len(self.WORDS) + b for b in piece.encode()]
            )
        ]

    def decode(self, ids, skip_special_tokens=True) -> str:
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)


@relaxed
@given(
    pieces=st.lists(st.sampled_from([*ByteFallback.WORDS, "é", "€", "😀", "\n"]), max_size=20),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
)
def test_byte_fallback_tokenizers_keep_their_spaces_and_characters(pieces, sizes):
    fallback = ByteFallback()
    ids = fallback.ids(pieces)
    detokenizer = IncrementalDetokenizer(fallback)
    deltas = [detokenizer.push(piece) for piece in cut(ids, sizes)]
    assert not any(FFFD in delta for delta in deltas)
    assert "".join(deltas) + detokenizer.flush() == fallback.decode(ids)


WORDS = st.text(st.sampled_from("Helo wrd\né€😀"), max_size=12)


@relaxed
@given(prompt=WORDS, answer=WORDS, sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4), skip=st.booleans())
@example("Hello", " world", [1], True)
@example("", " world", [1], True)
def test_prompt_and_answer_are_the_text_of_their_tokens(sentencepiece, prompt, answer, sizes, skip):
    """Whatever the decoder does with a text's first token: SentencePiece's drop its blank."""
    before = sentencepiece._with_control.encode(f"<s>{prompt}").ids
    ids = sentencepiece.encode("x" + answer, add_special_tokens=False)[2:]  # without the blank that begins a text
    text = sentencepiece.decode(before, skip)
    detokenizer = IncrementalDetokenizer(sentencepiece, skip, prompt_token_ids=before)
    deltas = [detokenizer.push(piece) for piece in cut(ids, sizes)] + [detokenizer.flush()]
    assert text + "".join(deltas) == sentencepiece.decode(before + ids, skip)
    assert not any(FFFD in delta for delta in deltas)


@pytest.mark.parametrize("broken", [b"\xe2", b"\xe2\x82", b"\xff\xff\xff", b"\x82" * 9])
def test_broken_end_of_a_prompt_is_no_part_of_the_answer(tokenizer, broken):
    prompt = [*tokenizer.encode("ab"), *byte_ids(tokenizer, broken)]
    detokenizer = IncrementalDetokenizer(tokenizer, prompt_token_ids=prompt)
    assert detokenizer.push(tokenizer.encode(" c€")) + detokenizer.flush() == " c€"


def test_valid_text_after_a_long_run_of_broken_bytes_is_not_lost(tokenizer):
    for broken in range(1, 30):
        detokenizer = IncrementalDetokenizer(tokenizer)
        ids = byte_ids(tokenizer, b"\xff" * broken + "€uro".encode())
        shown = "".join(detokenizer.push([token]) for token in ids) + detokenizer.flush()
        assert shown == FFFD * broken + "€uro", broken


def test_incomplete_character_at_the_end_is_dropped(tokenizer):
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert detokenizer.push(tokenizer.encode("ab€")[:-1]) + detokenizer.flush() == "ab"


def test_a_run_of_control_tokens_makes_no_token_dearer(tokenizer, monkeypatch):
    asked: list[int] = []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, skip=True: asked.append(len(ids)) or decode(ids, skip))
    control = min(tokenizer.control_ids)
    detokenizer = IncrementalDetokenizer(tokenizer)
    text = detokenizer.push([*byte_ids(tokenizer, b"a\xc3"), *[control] * 500, *byte_ids(tokenizer, b"\xa4b")])
    assert text + detokenizer.flush() == "aäb"
    assert max(asked) <= 4, "what is decoded again grows"


def test_control_tokens_are_skipped_unless_asked_for(tokenizer):
    [end] = tokenizer._with_control.encode("<|end|>").ids
    ids = [*tokenizer.encode("a"), end, *tokenizer.encode("b")]
    for skip, expected in ((True, "ab"), (False, "a<|end|>b")):
        detokenizer = IncrementalDetokenizer(tokenizer, skip)
        assert "".join(detokenizer.push([token]) for token in ids) + detokenizer.flush() == expected


# -- stop strings ---------------------------------------------------------------------------------------------


def scan(text: str, sizes: list[int], stops: tuple[str, ...], include: bool) -> tuple[str, str | None]:
    scanner = StopStrings(stops, include)
    shown = ""
    for piece in cut(text, sizes):
        safe, stop = scanner.push(piece)
        shown += safe
        if stop is not None:
            return shown, stop
    return shown + scanner.flush(), None


@relaxed
@given(
    text=st.text("abc", max_size=20),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=4).map(tuple),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    include=st.booleans(),
)
def test_stop_strings_do_not_depend_on_how_the_text_is_cut(text, stops, sizes, include):
    """The first stop string to be complete ends the text; of two that end together, the longer."""
    expected = text, None
    for end in range(len(text) + 1):
        found = sorted((stop for stop in stops if text[:end].endswith(stop)), key=len)
        if found:
            stop = found[-1]
            expected = text[: end if include else end - len(stop)], stop
            break
    assert scan(text, sizes, stops, include) == expected


@relaxed
@given(text=st.text("ab", max_size=20), stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3).map(tuple))
def test_nothing_is_held_back_that_cannot_become_a_stop_string(text, stops):
    scanner, shown = StopStrings(stops, False), ""
    for char in text:
        safe, stop = scanner.push(char)
        if stop is not None:
            return
        shown += safe
        held = text[len(shown) :][: len(scanner._held)]
        assert held == scanner._held
        assert held == "" or any(stop.startswith(held) for stop in stops)


@pytest.mark.parametrize("size", [1, 2, 3, 50])
@pytest.mark.parametrize("include", [False, True])
def test_stop_string_that_spans_tokens_ends_the_stream(tokenizer, size, include):
    text, last = run(
        tokenizer, "one € two STOP three", sizes=[size], stop=("STOP",), include_stop_str_in_output=include
    )
    assert text == ("one € two STOP" if include else "one € two ")
    assert (last.finish_reason, last.stop_reason) == ("stop", "STOP")


def merged(steps: list[StepOutput], sizes: list[int]) -> list[StepOutput]:
    """The steps as a slow reader gets them: so many as one, again and again."""
    piles = [msgspec.msgpack.decode(msgspec.msgpack.encode(pile), type=list[StepOutput]) for pile in cut(steps, sizes)]
    for pile in piles:
        for later in pile[1:]:
            pile[0].extend(later)
    return [pile[0] for pile in piles]


@relaxed
@given(
    text=st.text("abé€", min_size=1, max_size=20),
    stops=st.lists(st.text("abé", min_size=1, max_size=3), max_size=3).map(tuple),
    min_tokens=st.integers(0, 6),
    include=st.booleans(),
    ends_with_token=st.booleans(),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
)
def test_an_answer_does_not_depend_on_how_its_steps_pile_up(
    tokenizer, text, stops, min_tokens, include, ends_with_token, sizes
):
    ids = tokenizer.encode(text)
    steps = [StepOutput(request_id="r", token_ids=[i], logprobs=[TokenLogprobs.of(i, -1.0, [])]) for i in ids]
    steps[0].prompt_logprobs = [None]
    steps[-1].finish_reason = "stop" if ends_with_token else "length"
    steps[-1].stop_token_id = ids[-1] if ends_with_token else None
    params = SamplingParams(
        max_tokens=None, stop=stops, min_tokens=min_tokens, include_stop_str_in_output=include, logprobs=0
    )

    def whole(steps: list[StepOutput]) -> RequestOutput:
        first, *rest = finish(TextStream(tokenizer, params, [0] * 3), steps)
        for output in rest:
            first.extend(output)
            first.text += output.text
            first.pieces += output.pieces
        return first

    assert whole(merged(steps, sizes)) == whole(merged(steps, [1]))


def test_stop_string_may_begin_inside_a_multibyte_character_run(tokenizer):
    text, last = run(tokenizer, "ab€€c", stop=("€c",))
    assert (text, last.stop_reason) == ("ab€", "€c")


def test_held_back_text_is_released_at_the_end(tokenizer):
    text, last = run(tokenizer, "tell ST", stop=("STOP",))
    assert (text, last.finish_reason, last.stop_reason) == ("tell ST", "length", None)


def test_text_that_may_become_a_stop_string_is_not_shown(tokenizer):
    stream = TextStream(tokenizer, SamplingParams(stop=("STOP",)), [0] * 1)
    deltas = [stream.push(StepOutput(request_id="r", token_ids=[t])).text for t in tokenizer.encode("xSTxSTO")]
    assert deltas == ["x", "", "", "STx", "", "", ""]


def test_no_stop_string_counts_before_min_tokens(tokenizer):
    text, last = run(tokenizer, "abXcdXef", stop=("X",), min_tokens=4)
    assert (text, last.stop_reason) == ("abXcd", "X")
    text, last = run(tokenizer, "abX", stop=("X",), min_tokens=3)
    assert (text, last.finish_reason) == ("abX", "length"), "the last token is within min_tokens too"


def test_stop_token_is_hidden_unless_asked_for(tokenizer):
    [end] = tokenizer._with_control.encode("<|end|>").ids
    x = tokenizer.encode("x")[0]
    for stop_id, include, expected in ((x, False, "ab"), (x, True, "abx"), (end, False, "ab"), (end, True, "ab")):
        text, last = run(
            tokenizer,
            "ab",
            finish_reason="stop",
            stop_token_id=stop_id,
            stop_token_ids=(stop_id,),
            include_stop_str_in_output=include,
        )
        assert (text, last.stop_reason) == (expected, stop_id)
        assert last.num_output_tokens == 3, "the stop token was sampled, so it counts"


def test_eos_is_no_stop_reason(tokenizer):
    _, last = run(tokenizer, "ab", finish_reason="stop", stop_token_id=5)
    assert (last.finish_reason, last.stop_reason) == ("stop", None)


def test_counters_and_errors_pass_through(tokenizer):
    stream = TextStream(tokenizer, SamplingParams(), [0] * 17)
    first = stream.push(StepOutput(request_id="r", token_ids=[1, 2]))
    last = stream.push(StepOutput(request_id="r", finish_reason="error", error="broken"))
    assert (first.num_prompt_tokens, first.num_output_tokens, last.num_output_tokens) == (17, 2, 2)
    assert (last.finish_reason, last.error) == ("error", "broken")


def test_control_tokens_that_are_asked_for_are_shown_among_hidden_ones(tokenizer):
    end, user = (
        next(i for i in tokenizer.control_ids if tokenizer.token_text(i) == name) for name in ("<|end|>", "<|user|>")
    )
    ids = [*tokenizer.encode("é"), end, user, *tokenizer.encode(" ü"), end]
    shown = IncrementalDetokenizer(tokenizer, shown_ids=frozenset({end}))
    assert "".join(map(shown.push_one, ids)) + shown.flush() == "é<|end|> ü<|end|>"
    everything = IncrementalDetokenizer(tokenizer, skip_special_tokens=False, shown_ids=frozenset({end}))
    assert everything.push(ids) + everything.flush() == "é<|end|><|user|> ü<|end|>"


@given(
    num_scored=st.integers(0, 9),
    pieces=st.lists(st.text("ab", max_size=3), max_size=9),
    has_logprobs=st.booleans(),
    size=st.integers(1, 10),
)
def test_an_output_in_parts_is_the_output(num_scored, pieces, has_logprobs, size):
    entries = [TokenLogprobs.of(i, -1.0, [(i, -1.0), (7, -2.0)]) for i in range(len(pieces))]
    whole = RequestOutput(
        request_id="r",
        text="".join(pieces) if pieces else "flushed",
        pieces=pieces or ["flushed"],
        token_ids=list(range(len(pieces))),
        logprobs=entries if has_logprobs else None,
        prompt_logprobs=[None, *[TokenLogprobs.of(1, -1.0, [])] * (num_scored - 1)] if num_scored else None,
        finish_reason="length",
        num_prompt_tokens=5,
        num_output_tokens=20,
        queue_seconds=0.5,
        num_cached_tokens=0,
    )
    if not pieces:
        whole.logprobs = None
    parts = whole.cut(size)
    assert parts == [whole] or all(len(p.prompt_logprobs or []) + len(p.logprobs or []) <= size for p in parts)
    assert [p.num_output_tokens for p in parts] == [
        20 - sum(len(later.token_ids) for later in parts[i + 1 :]) for i in range(len(parts))
    ]
    assert sum(p.num_scores for p in parts) == whole.num_scores
    first, *rest = parts
    for part in rest:
        assert (first.finish_reason, part.queue_seconds, part.num_cached_tokens) == (None, None, None)
        first.extend(part)
        first.text += part.text
        first.pieces = [*first.pieces, *part.pieces]
    first.logprobs = first.logprobs or whole.logprobs
    first.num_output_tokens = 20
    assert first == whole


class AfterBar:
    """Stop strings count behind the first bar."""

    def __init__(self):
        self._has_come = False

    def push(self, text):
        if self._has_come:
            return "", text
        before, bar, after = text.partition("|")
        self._has_come = bool(bar)
        return before + bar, after

    def finish(self):
        return "", ""


@pytest.mark.parametrize("sizes", [(1,), (3,), (2, 5), (100,)])
@pytest.mark.parametrize(
    ("text", "shown", "num_tokens"),
    [("a.b|c.d", "a.b|c", 6), ("a.b", "a.b", 3), ("|.", "|", 2), (".", ".", 1), ("a.|..", "a.|", 4)],
)
def test_stop_strings_count_within_their_scope_alone(tokenizer, sizes, text, shown, num_tokens):
    stream = TextStream(tokenizer, SamplingParams(stop=(".",), max_tokens=None), [0] * 3, stop_scope=AfterBar())
    steps = [StepOutput(request_id="r", token_ids=piece) for piece in cut(tokenizer.encode(text), list(sizes))]
    steps[-1].finish_reason = "length"
    outputs = finish(stream, steps)
    assert "".join(output.text for output in outputs) == shown
    assert outputs[-1].num_output_tokens == sum(len(output.token_ids) for output in outputs) == num_tokens
    assert outputs[-1].finish_reason == ("stop" if shown != text else "length")
