"""Token ids as log-probabilities and /tokenize show them."""

from __future__ import annotations

from ...engine.text.tokenizer import Tokenizer

HALF_CHARACTER = "\N{REPLACEMENT CHARACTER}"


class TokenNames:
    """Token id -> its name in log-probabilities, remembered. As with OpenAI, bytes name a part of a character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._names: dict[int, str] = {}  # at most one entry per token of the vocabulary
        self._bytes: dict[int, list[int]] = {}  # likewise

    def __getitem__(self, token_id: int) -> str:
        name = self._names.get(token_id)
        if name is None:
            name = self._names[token_id] = self._make(token_id)
        return name

    def _make(self, token_id: int) -> str:
        text = self._tokenizer.token_text(token_id)
        if HALF_CHARACTER not in text:
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self._tokenizer.token_bytes(token_id))

    def at_start(self, token_id: int) -> str:
        """The name of a text's first token, whose leading blank a decoder may drop."""
        text = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return self[token_id] if HALF_CHARACTER in text else text

    def raw(self, token_id: int) -> list[int]:
        """The token's bytes. The list is shared: callers must not change it."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = list(self._tokenizer.token_bytes(token_id))
        return found
