"""Settings from given sources, for tests of `configs`."""

from __future__ import annotations

import pytest
from leyden.configs.schema import Settings
from leyden.configs.sources import SettingsError, load_settings


def load(flags=None, text=None, environ=None, *, folder=None) -> Settings:
    """The settings of `flags`, of `environ`, and of a file in `folder` that holds `text`."""
    path = None
    if text is not None:
        path = folder / "settings.yaml"
        path.write_text(text)
    return load_settings(flags or {}, path, environ or {})


def refused(*words: str, **sources) -> str:
    """The message with which `load(**sources)` fails, which must hold each of `words`."""
    with pytest.raises(SettingsError) as error:
        load(**sources)
    for word in words:
        assert word in str(error.value), str(error.value)
    return str(error.value)
