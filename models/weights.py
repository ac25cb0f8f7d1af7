"""safetensors -> parameters: streamed tensor by tensor, complete or an error.

A module says which checkpoint tensors it wants by yielding `Target`s: a canonical name and the view of a parameter
that the tensor fills. So fused parameters (q, k and v in one matrix, all experts in one tensor) are filled in place
from whatever pieces a file holds, and nothing is ever held twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from .checkpoint import read_json
from .errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
UNSAFE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")

# Spellings of the same tensor, rewritten to the left-hand names of Hugging Face's in-memory models.
_RENAMES = (
    (re.compile(r"^model\."), ""),
    (re.compile(r"\.block_sparse_moe\."), ".mlp."),
    (re.compile(r"(\.experts\.\d+)\.w1\."), r"\1.gate_proj."),
    (re.compile(r"(\.experts\.\d+)\.w3\."), r"\1.up_proj."),
    (re.compile(r"(\.experts\.\d+)\.w2\."), r"\1.down_proj."),
)
# Buffers that Hugging Face's class used to save, and that follow from the config.
_IGNORED = re.compile(r"\.(slope_rate|query_decay|key_decay|diagonal_decay|rotary_emb\.inv_freq)$")


@dataclass(frozen=True)
class Target:
    """Where a checkpoint tensor goes. `covers` names the pieces that a fused tensor stands for."""

    name: str
    view: Tensor
    covers: tuple[str, ...] = ()


def canonical_name(name: str) -> str:
    """The project's spelling of a tensor name."""
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    return name


def fill_with_noise(parameters: Iterable[Tensor], std: float = 0.02) -> None:
    """Random weights in place, the same each time: matrices N(0, std), vectors (norms) 1. To measure, not to read."""
    for seed, parameter in enumerate(parameters):
        if parameter.ndim > 1:
            parameter.normal_(0.0, std, generator=torch.Generator(parameter.device).manual_seed(seed))
        else:
            parameter.fill_(1.0)


def load_weights(
    folder: Path, targets: Iterable[Target], *, ignored: Iterable[str] = (), progress: bool = True
) -> None:
    """Fill every target from the folder's safetensors files, in place.

    `ignored` holds canonical names that may be present and are not wanted. Raises `CheckpointError` for a missing,
    unexpected, repeated or wrongly shaped tensor, naming the tensor, the file and both shapes.
    """
    wanted = {target.name: target for target in targets}
    required = {name for name, target in wanted.items() if not target.covers}
    skipped = set(ignored)
    loaded: dict[str, Path] = {}
    with tqdm(total=len(required), desc="weights", unit="tensor", disable=not progress, leave=False) as bar:
        for path, name, tensor in _stream(find_files(folder)):
            canonical = canonical_name(name)
            if _IGNORED.search(canonical) or canonical in skipped:
                continue
            target = wanted.get(canonical)
            if target is None:
                raise CheckpointError(f"{path}: unexpected tensor {name} of shape {list(tensor.shape)}")
            pieces = target.covers or (canonical,)
            _check_new(name, path, pieces, loaded)
            _fill(target.view, tensor, name, path)
            loaded.update(dict.fromkeys(pieces, path))
            bar.update(len(pieces))
    missing = sorted(required - loaded.keys())
    if missing:
        shown = ", ".join(f"{name} {list(wanted[name].view.shape)}" for name in missing[:4])
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise CheckpointError(f"{folder}: missing tensors: {shown}{more}")


def find_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, sharded or not. Pickle checkpoints are refused."""
    index = folder / INDEX_FILE
    if index.exists():
        return _files_of_index(folder, index)
    single = sorted(folder.glob("*.safetensors"))
    if single:
        return single
    unsafe = sorted(path.name for path in folder.glob("*") if path.suffix in UNSAFE_SUFFIXES)
    if unsafe:
        raise CheckpointError(
            f"{folder} holds only pickle weights ({unsafe[0]}), which can run code when loaded and are refused; "
            "convert them to safetensors"
        )
    raise CheckpointError(f"{folder} holds no .safetensors file")


def _files_of_index(folder: Path, index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is missing or empty")
    for name in weight_map.values():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise CheckpointError(f"{index}: {name!r} is not a plain .safetensors file name")
        if not (folder / name).is_file():
            raise CheckpointError(f"{index} names {name}, which is not in {folder}")
    return [folder / name for name in sorted(set(weight_map.values()))]


def _stream(files: list[Path]) -> Iterator[tuple[Path, str, Tensor]]:
    for path in files:
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    yield path, name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from None


def _check_new(name: str, path: Path, pieces: tuple[str, ...], loaded: dict[str, Path]) -> None:
    for piece in pieces:
        if piece in loaded:
            raise CheckpointError(f"{path}: tensor {name} repeats what {loaded[piece].name} already gave")


def _fill(view: Tensor, tensor: Tensor, name: str, path: Path) -> None:
    if view.shape != tensor.shape:
        raise CheckpointError(
            f"{path}: tensor {name} has shape {list(tensor.shape)}, the config asks for {list(view.shape)}"
        )
    if not tensor.dtype.is_floating_point or tensor.element_size() < 2:
        raise CheckpointError(
            f"{path}: tensor {name} is {tensor.dtype}; quantised weights are not supported, "
            "use float32, bfloat16 or float16"
        )
    with torch.no_grad():
        view.copy_(tensor)
