"""Where settings come from: a YAML file < LEYDEN_* environment variables < command-line flags.

An error names the setting, its value, its source and the values that are allowed.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from .kubernetes import injected_names
from .other_names import hint_for
from .schema import Settings

ENV_PREFIX = "LEYDEN_"


class SettingsError(Exception):
    """A setting is unknown, or its value is not allowed. The message names the setting and the allowed values."""


def load_settings(
    flags: dict[str, Any], yaml_path: Path | None = None, environ: dict[str, str] | None = None
) -> Settings:
    """Merge the sources, of which a later one overrides an earlier one, and validate the result.

    `flags`: the flags that were given, by the setting's name; `environ`: by default the process's own environment.
    Raises `SettingsError`, with one line for each wrong setting.
    """
    environ = dict(os.environ) if environ is None else environ
    merged: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for source, values in (
        (f"{yaml_path}", _read_yaml(yaml_path) if yaml_path else {}),
        ("environment", _read_environment(environ)),
        ("command line", flags),
    ):
        for key, value in values.items():
            if key not in Settings.model_fields:
                raise SettingsError(f"unknown setting {key!r} ({source}); {what_was_meant(key, Settings.model_fields)}")
            merged[key] = value
            sources[key] = source
    try:
        return Settings(**merged)
    except ValidationError as error:
        # A default that depends on a wrong setting is no error of its own.
        wrong = [each for each in error.errors() if each["type"] != "default_factory_not_called"]
        raise SettingsError("\n".join(_describe(each, sources) for each in wrong)) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        loaded = yaml.safe_load(text)
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path} is not UTF-8 text: {error.reason}") from None
    except yaml.YAMLError as error:
        raise SettingsError(f"{path} is not valid YAML: {_yaml_problem(error)}") from None
    except RecursionError:
        raise SettingsError(f"{path} is not valid YAML: it nests too deeply") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict) or not isinstance(root, yaml.MappingNode):
        raise SettingsError(f"{path} must hold one mapping of settings, got a {type(loaded).__name__}")
    _refuse_repeated_keys(path, root)
    return {str(key).replace("-", "_"): value for key, value in loaded.items()}


def _refuse_repeated_keys(path: Path, root: yaml.MappingNode) -> None:
    """Raise `SettingsError` for a key that the file gives twice: PyYAML would keep the last one without a word."""
    lines: dict[str, int] = {}
    for node, _ in root.value:
        line, key = node.start_mark.line + 1, str(node.value).replace("-", "_")
        if key in lines:
            raise SettingsError(f"{path} gives {key} twice, in lines {lines[key]} and {line}; keep one of them")
        lines[key] = line


def _yaml_problem(error: yaml.YAMLError) -> str:
    """The error's place and cause in one line. PyYAML's own text quotes the file over several lines."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "it cannot be read"
    where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
    return f"{where}{problem}; a setting is written as 'name: value'"


def _read_environment(environ: dict[str, str]) -> dict[str, Any]:
    """The settings in `environ`, by name: LEYDEN_MAX_NUM_SEQS=8 gives max_num_seqs.

    A list's items are separated by commas. An optional setting that is empty or null gets its default None back; an
    empty `api_key_file` is refused, because the server would be open to everyone. Variables that Kubernetes adds are
    skipped.
    """
    found: dict[str, Any] = {}
    foreign = injected_names(environ)
    for name, text in environ.items():
        if name.startswith(ENV_PREFIX) and name not in foreign:
            key = name.removeprefix(ENV_PREFIX).lower()
            field = Settings.model_fields.get(key)
            if key == "api_key_file" and not text:
                raise SettingsError(f"{name} is empty; name a file with keys, or unset it to serve everyone")
            if text in ("", "null") and field is not None and field.default is None:
                found[key] = None
            else:
                found[key] = text
    return found


def what_was_meant(key: str, known: Iterable[str]) -> str:
    """The hint for the unknown setting `key`: another engine's name for one, the nearest known name, or all of them."""
    near = nearest(key, known)
    return hint_for(key) or (f"did you mean {near!r}?" if near else f"known settings: {', '.join(sorted(known))}")


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The name in `known` that `word` most likely means: one spelled alike, else the shortest with all its words."""
    names = list(known)
    alike = difflib.get_close_matches(word.lower(), names, n=1, cutoff=0.75)
    if alike:
        return alike[0]
    parts = set(re.split(r"[-_]+", word.lower().strip("-_")))
    holding = [name for name in names if parts <= set(re.split(r"[-_]+", name.strip("-")))]
    return min(holding, key=len) if holding else next(iter(difflib.get_close_matches(word.lower(), names, n=1)), None)


def _describe(error: Any, sources: dict[str, str]) -> str:
    key = str(error["loc"][0]) if error["loc"] else "?"
    name = key if error["loc"][-1:] == ("[key]",) else ".".join(map(str, error["loc"])) or key
    allowed = _allowed_values(key)
    tail = f"; allowed: {allowed}" if allowed else ""
    message = error["msg"].removeprefix("Value error, ")
    value = "(hidden)" if key == "api_key" else repr(error["input"])
    return f"{name} = {value} ({sources.get(key, 'default')}): {message}{tail}"


def _allowed_values(key: str) -> str:
    field = Settings.model_fields.get(key)
    values = get_args(field.annotation) if field else ()
    return ", ".join(map(str, values)) if values and all(isinstance(v, str) for v in values) else ""
