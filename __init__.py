"""Leyden: a miniature inference server for hybrid linear-attention language models.

>>> from leyden import LLM, SamplingParams
>>> llm = LLM("path/to/checkpoint")
>>> llm.generate(["Once upon a time"], SamplingParams(max_tokens=32))[0].text

The two names are loaded on first use, so that `import leyden` and `leyden --help` never wait for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine.llm import LLM
    from .engine.sampling_params import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from .engine.llm import LLM

        return LLM
    if name == "SamplingParams":
        from .engine.sampling_params import SamplingParams

        return SamplingParams
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
