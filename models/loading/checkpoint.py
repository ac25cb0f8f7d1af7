"""Find a checkpoint (a folder, a hub id, or the embedded one) and read its JSON files. Runs no code from it, ever."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

DEMO_FOLDER = Path(__file__).parents[1] / "demo"
SMALL_FILES = ["*.json", "*.jinja", "additional_chat_templates/*.jinja", "tokenizer.model", "*.txt"]
WEIGHT_FILES = ["*.safetensors"]
# Files beside a model's weights: of an adapter, of an optimizer, or the same weights in another format.
OTHER_WEIGHTS = ["adapter*.safetensors", "optimizer*.safetensors", "consolidated*.safetensors"]
GENERATION_FILE = "generation_config.json"
POINTER_START = b"version https://git-lfs.github.com/spec/"


def resolve(model: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder of `model`: 'demo', a path, or a hub id, which is downloaded unless HF_HUB_OFFLINE is set.

    Without `weights` only configuration and tokenizer are fetched.
    Raises `CheckpointError` when there is no such folder and no such model.
    """
    if model == "demo":
        return DEMO_FOLDER
    folder = Path(model).expanduser()
    if model and folder.is_dir():
        _check_links(folder)
        return folder
    if folder.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise CheckpointError(f"{model!r} is neither a folder nor a hub id of the form owner/name")
    return _download(model, revision, SMALL_FILES + WEIGHT_FILES if weights else SMALL_FILES)


def _check_links(folder: Path) -> None:
    """Refuse a link that leads out of the folder or, in a hub's cache, out of the blobs beside its snapshots.

    Its target was not downloaded with the checkpoint, and may be any file of this machine. Raises `CheckpointError`.
    """
    root = folder.resolve()
    homes = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    for pattern in SMALL_FILES + WEIGHT_FILES:
        for path in folder.glob(pattern):
            target = path.resolve()
            if not any(target.is_relative_to(home) for home in homes):
                raise CheckpointError(f"{path} is a link out of its folder, to {target}; put the file itself there")
            if not target.is_file():
                raise CheckpointError(f"{path} is not a regular file")


def _download(model: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns, ignore_patterns=OTHER_WEIGHTS))
    except Exception as error:  # the hub client raises a wide family of errors, of one meaning to a user
        first_line = str(error).strip().partition("\n")[0] or type(error).__name__
        reason = first_line.removeprefix("Got: ").rstrip(".")
        remedy = "check the id and the network, or give the folder of a checkpoint that is on this machine"
        raise CheckpointError(f"cannot get {model!r} from the hub: {reason}; {remedy}") from error


def refuse_pointer(path: Path) -> None:
    """Raises `CheckpointError` when the file is a pointer that git-lfs left in place of the file itself."""
    with path.open("rb") as file:
        is_pointer = file.read(len(POINTER_START)) == POINTER_START
    if is_pointer:
        raise CheckpointError(
            f"{path} is not the file itself but a pointer of git-lfs; fetch the file by 'git lfs pull' in that folder"
        )


def read_text(path: Path) -> str:
    """The file's text. Raises `CheckpointError` when it is missing, unreadable, a pointer of git-lfs, or not UTF-8."""
    try:
        refuse_pointer(path)
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises `CheckpointError` when the file is missing, unreadable or holds no object."""
    text = read_text(path)
    try:
        loaded = json.loads(text)
    except (ValueError, RecursionError) as error:
        is_cut = not text.rstrip().endswith("}")
        remedy = "; it is cut off, perhaps by an incomplete download: fetch it again" if is_cut else ""
        raise CheckpointError(f"{path} is not valid JSON: {error}{remedy}") from None
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got a {type(loaded).__name__}")
    return loaded


def read_generation_config(folder: Path) -> dict[str, Any]:
    """The object in generation_config.json; empty when the checkpoint has none. Raises `CheckpointError`."""
    path = folder / GENERATION_FILE
    return read_json(path) if path.exists() else {}
