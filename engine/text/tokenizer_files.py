"""Loads a fast tokenizer with its chat template from tokenizer.json and the config files beside it. Runs no code of the
checkpoint.

tokenizer.json decides every id. `tokenizer_class` in tokenizer_config.json is ignored: transformers 5 would rebuild the
pre-tokenizer and normalizer from that class, which gives other ids than the file.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError

from ...models.loading.checkpoint import read_json, read_text, refuse_pointer
from ..errors import CheckpointError

logger = logging.getLogger("leyden.engine")

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"
LEGACY_FILES = ("special_tokens_map.json", "added_tokens.json")


def load_tokenizer(folder: Path, chat_template: Path | None = None) -> Any:
    """transformers' `PreTrainedTokenizerFast` of the folder's tokenizer.json, with the special tokens, added tokens and
    chat template of the folder's config files.

    chat_template: a file that replaces the folder's template. Raises `CheckpointError`, which names the file at fault.
    """
    path = folder / TOKENIZER_FILE
    if not path.exists():
        raise CheckpointError(
            f"{folder} has no {TOKENIZER_FILE}; copy the checkpoint's there, or give a folder with one by --tokenizer"
        )
    config = _read_configs(folder)
    refuse_pointer(path)
    from transformers import PreTrainedTokenizerFast

    try:
        hf: Any = PreTrainedTokenizerFast.from_pretrained(str(folder), tokenizer_file=str(path), local_files_only=True)
    except Exception as error:  # of many types; all mean that the folder has no usable tokenizer
        read_json(path)  # raises a better message if the file is no JSON
        cause = str(error).partition("\n")[0]
        raise CheckpointError(f"{folder}: cannot load a tokenizer: {cause}") from error
    hf.backend_tokenizer.no_truncation()
    hf.backend_tokenizer.no_padding()
    _compare(folder, config, hf)
    if chat_template is not None:
        hf.chat_template = read_text(chat_template)
    _check_templates(folder, hf, chat_template)
    return hf


def ids_without_token(folder: Path, vocab_size: int) -> list[int]:
    """The ids below `vocab_size` that have no token, increasing. A model may have more logits than its tokenizer has
    tokens. Empty if the folder has no tokenizer.json. Raises `CheckpointError` for a file without a vocabulary."""
    path = folder / TOKENIZER_FILE
    if not path.exists():
        return []
    file = read_json(path)  # six times as fast as loading the tokenizer
    try:
        vocab = file["model"]["vocab"]  # token -> id, or a list of tokens by id
        ids = set(vocab.values()) if isinstance(vocab, dict) else set(range(len(vocab)))
        ids |= {token["id"] for token in file.get("added_tokens") or ()}
    except (KeyError, TypeError):
        raise CheckpointError(f"{path} has no vocabulary (model.vocab) that can be read") from None
    return sorted(set(range(vocab_size)) - ids)


def _read_configs(folder: Path) -> dict[str, Any]:
    """The content of tokenizer_config.json; empty if it is missing. Reads all files that transformers will read: its
    own errors do not name the file."""
    for path in [folder / TEMPLATE_FILE, *folder.glob(f"{MORE_TEMPLATES}/*.jinja")]:
        if path.exists():
            read_text(path)
    configs = {path.name: read_json(path) for name in (CONFIG_FILE, *LEGACY_FILES) if (path := folder / name).exists()}
    return configs.get(CONFIG_FILE, {})


def _compare(folder: Path, config: dict[str, Any], hf: Any) -> None:
    """Log a warning for each contradiction between tokenizer_config.json and tokenizer.json. The latter is followed."""
    around = set(hf.backend_tokenizer.encode("").ids)
    for flag, token_id in (("add_bos_token", hf.bos_token_id), ("add_eos_token", hf.eos_token_id)):
        asked = config.get(flag)
        if asked is not None and bool(asked) != (token_id in around):
            logger.warning(
                "%s: %s says %s = %s, but %s %s that token; %s is followed",
                *(folder, CONFIG_FILE, flag, str(asked).lower(), TOKENIZER_FILE),
                *("does not add" if asked else "adds", TOKENIZER_FILE),
            )
    for number, token in (config.get("added_tokens_decoder") or {}).items():
        content = token.get("content") if isinstance(token, dict) else token
        token_id = hf.backend_tokenizer.token_to_id(str(content))
        if str(token_id) != number:
            logger.warning("%s: %s gives %r the id %s, its id is %s", folder, CONFIG_FILE, content, number, token_id)


def _check_templates(folder: Path, hf: Any, given: Path | None) -> None:
    """Compile every template, so that a broken one fails at start, not at each request."""
    templates = hf.chat_template if isinstance(hf.chat_template, dict) else {"default": hf.chat_template}
    if "default" not in templates:
        raise CheckpointError(
            f"{folder} has chat templates ({', '.join(templates)}) but none of the name default; "
            "give the one to use by --chat-template FILE"
        )
    for name, template in templates.items():
        if template is None:
            continue
        source = given or _source(folder, name)
        if not isinstance(template, str):
            raise CheckpointError(f"{source}: chat_template must be a string, got {template!r:.80}")
        try:
            hf.apply_chat_template([{"role": "user", "content": "probe"}], chat_template=template, tokenize=False)
        except TemplateSyntaxError as error:
            raise CheckpointError(
                f"{source}: the chat template is broken at line {error.lineno}: {error.message}; repair it, or give "
                "another one by --chat-template FILE"
            ) from error
        except Exception:
            continue


def _source(folder: Path, name: str) -> Path:
    """The file of a template."""
    own = folder / TEMPLATE_FILE if name == "default" else folder / MORE_TEMPLATES / f"{name}.jinja"
    return own if own.exists() else folder / CONFIG_FILE
