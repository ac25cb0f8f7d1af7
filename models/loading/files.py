"""The files of a checkpoint that hold its weights."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from ..errors import CheckpointError
from .checkpoint import OTHER_WEIGHTS, read_json

logger = logging.getLogger("leyden.models")

INDEX_FILE = "model.safetensors.index.json"
UNSAFE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
MAIN_FILE = "model.safetensors"


def find_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, sharded or not. Pickle checkpoints are refused."""
    index = folder / INDEX_FILE
    present = sorted(folder.glob("*.safetensors"))
    if index.exists():
        files, reason = _files_of_index(folder, index), f"{INDEX_FILE} does not name them"
    elif (folder / MAIN_FILE) in present:
        files, reason = [folder / MAIN_FILE], f"the weights are in {MAIN_FILE}"
    else:
        files = [path for path in present if not any(path.match(pattern) for pattern in OTHER_WEIGHTS)]
        reason = "they are of an adapter or an optimizer, or another format of the weights"
    if not files:
        raise CheckpointError(_no_files(folder, present))
    unread = [path.name for path in present if path not in files]
    if unread:
        logger.info("%s: not read, since %s: %s", folder, reason, ", ".join(unread))
    return files


def _no_files(folder: Path, present: list[Path]) -> str:
    """Why a folder has no weights."""
    unsafe = sorted(path.name for path in folder.glob("*") if path.suffix in UNSAFE_SUFFIXES)
    if present:
        return (
            f"{folder} holds no weights of a whole model, but {present[0].name}; merge an adapter into its model first"
        )
    if unsafe:
        return (
            f"{folder} holds only pickle weights ({unsafe[0]}), which can run code when loaded and are refused; "
            "convert them to safetensors"
        )
    return f"{folder} holds no .safetensors file"


def _files_of_index(folder: Path, index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is missing or empty")
    for name in weight_map.values():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise CheckpointError(f"{index}: {name!r} is not a plain .safetensors file name")
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{index} names {name}, which is not in {folder}: an incomplete download, perhaps; fetch it"
            )
    return [folder / name for name in sorted(set(weight_map.values()))]
