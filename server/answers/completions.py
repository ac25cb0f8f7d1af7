"""Engine outputs -> OpenAI's completion objects, whole and in chunks."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import UNSET, UnsetType

from ...engine.outputs import TokenLogprobs
from ..door.validation import Prepared
from ..state import ServerState
from ..wire.answers import Completion, CompletionChoice, CompletionLogprobs, Usage
from ..wire.requests import CompletionRequest
from .events import Event
from .logprobs import CompletionLogprobsWriter, splice_completion_logprobs
from .pieces import Splicer
from .writer import AnswerWriter


class CompletionWriter(AnswerWriter[CompletionRequest]):
    """Engine outputs -> OpenAI's completion objects, for one request."""

    def __init__(self, state: ServerState, prepared: Prepared[CompletionRequest]) -> None:
        super().__init__("cmpl-", state, prepared)
        self.prompts = prepared.prompts
        self.logprobs = [CompletionLogprobsWriter(state.token_names) for _ in prepared.choices]

    def render(self, event: Event) -> Iterator[Completion]:
        """The chunk of one output; no chunk for an output that has nothing to show."""
        choice, output = event
        chunk = self.choice(event)
        if chunk.text or chunk.logprobs or chunk.finish_reason or chunk.token_ids:
            yield self.envelope([chunk], self.usage.of_chunk(choice, output.num_output_tokens))

    def render_end(self) -> Iterator[Completion]:
        if (usage := self.usage.at_end()) is not None:
            yield self.envelope([], usage)

    def whole(self, outputs: list[Event]) -> list[bytes]:
        """The JSON of the answer in one object, from one merged output per choice."""
        splicer = Splicer()
        choices = [self.choice(output, splicer) for output in outputs]
        return splicer.encode(self.envelope(choices, self.usage.total()))

    def choice(self, event: Event, splicer: Splicer | None = None) -> CompletionChoice:
        """One output as its choice's next part. The first part begins with the prompt if the request has `echo`.

        With a `splicer` the log-probabilities are added there, and the part holds a stand-in for them.
        """
        choice, output = event
        prompt_token_ids = choice.request.prompt_token_ids
        self.usage.observe(choice, output)
        is_first = self.begins(choice.index)
        text = output.text
        entries: list[TokenLogprobs | None] = [*(output.prompt_logprobs or []), *(output.logprobs or [])]
        if is_first and self.request.echo:
            text = self.prompts[choice.prompt_index].text + text
        logprobs: CompletionLogprobs | None = None
        if self.request.logprobs is not None and (entries or splicer):
            writer, first_id = self.logprobs[choice.index], prompt_token_ids[0]
            if splicer is None:
                logprobs = writer.write(entries, first_id)
            else:
                logprobs = splice_completion_logprobs(splicer, writer, entries, first_id)
        reason = output.finish_reason
        written = CompletionChoice(choice.index, text, logprobs, reason if reason in ("stop", "length") else None)
        if self.request.return_token_ids:
            written.token_ids = output.token_ids
            written.prompt_token_ids = prompt_token_ids.tolist() if is_first else UNSET
        return written

    def envelope(self, choices: list[CompletionChoice], usage: Usage | UnsetType | None) -> Completion:
        return Completion(self.id, "text_completion", self.created, self.state.model_name, choices, usage)
