"""Reads the outputs of one choice by its parser, and counts the tokens of its thought."""

from __future__ import annotations

from ...engine.outputs import RequestOutput
from ..parsers.answer import AnswerParser
from ..parsers.deltas import Delta, Reasoning, merged


class AnswerReader:
    """`num_reasoning_tokens` counts the tokens up to the end of the thought so far, its marker included."""

    def __init__(self, parser: AnswerParser) -> None:
        self.parser = parser
        self.num_reasoning_tokens = 0

    def read(self, output: RequestOutput) -> list[Delta]:
        """The deltas that one output, or the merged output of a whole answer, adds."""
        deltas: list[Delta] = []
        # What may be a thought is read token by token, the rest at once.
        num_before, num_read = output.num_output_tokens - len(output.token_ids), 0
        while num_read < len(output.pieces) and self.parser.may_think:
            was_thinking = self.parser.is_thinking
            read = self.parser.push(output.pieces[num_read])
            num_read += 1
            if was_thinking or self.parser.is_thinking or any(isinstance(delta, Reasoning) for delta in read):
                self.num_reasoning_tokens = min(num_before + num_read, output.num_output_tokens)
            deltas += read
        deltas += self.parser.push("".join(output.pieces[num_read:]))
        return merged(deltas if output.finish_reason is None else [*deltas, *self.parser.finish()])
