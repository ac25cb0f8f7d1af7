"""The model of the benchmarks of one long prompt: random weights of a config's shapes, and a context that is long
enough."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

CONFIG = Path(__file__).parent / "configs" / "dense"
SMALL = {
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rotary_dim": 32,
    "intermediate_size": 512,
}


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that knows the arguments of `write_config`, and the device."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG, help="folder with a config.json")
    parser.add_argument(
        "--small", action="store_true", help="keep its layers' order, but make it small enough for a CPU"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser


def write_config(arguments: argparse.Namespace, folder: Path, num_tokens: int) -> None:
    """Write the config.json, with a context of at least so many tokens, into the folder, which must exist."""
    config = json.loads((arguments.config / "config.json").read_text())
    fields = config.get("text_config", config)  # the text's part of a model that sees
    if arguments.small:
        fields |= SMALL
        for kinds in {"attn_type_list", "layer_types"} & fields.keys():  # others derive them from the number of layers
            fields[kinds] = fields[kinds][: SMALL["num_hidden_layers"]]
    fields["max_position_embeddings"] = max(fields["max_position_embeddings"], num_tokens)
    (folder / "config.json").write_text(json.dumps(config))
