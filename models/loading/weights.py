"""safetensors -> parameters: complete or an error, which the headers tell before any data is read.

A module yields a `Target` for each checkpoint tensor that it wants: a canonical name and the view of a parameter that
the tensor fills. So fused parameters (q, k and v in one matrix, all experts in one tensor) are filled in place from the
pieces that a file holds, and no tensor is ever held twice. Family-specific spellings come in as `Names`.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import CheckpointError
from .checkpoint import OTHER_WEIGHTS, read_json
from .names import Names
from .reader import StoredTensor, fill, read_bytes, read_header
from .target import Target

logger = logging.getLogger("leyden.models")

INDEX_FILE = "model.safetensors.index.json"
UNSAFE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
MAIN_FILE = "model.safetensors"


def fill_with_noise(parameters: Iterable[Tensor], std: float = 0.02) -> None:
    """Random weights in place, the same each time, for measurements: matrices N(0, std), vectors (norms) 1."""
    for seed, parameter in enumerate(parameters):
        if parameter.ndim > 1:
            parameter.normal_(0.0, std, generator=torch.Generator(parameter.device).manual_seed(seed))
        else:
            parameter.fill_(1.0)


def load_weights(
    folder: Path, targets: Iterable[Target], names: Names, *, ignored: Iterable[str] = (), progress: bool = True
) -> None:
    """Fill every target from the folder's safetensors files, in place.

    `names`: the family's spellings. `ignored`: canonical names that may be present beside the targets'. Raises
    `CheckpointError` for a missing, unexpected, repeated or wrongly shaped tensor, naming the tensor, the file and both
    shapes.
    """
    pairs = _match(folder, targets, names, set(ignored))
    device = pairs[0][1].view.device
    num_bytes = sum(read_bytes(stored, target) for stored, target in pairs)
    with tqdm(total=num_bytes, desc="weights", unit="B", unit_scale=True, disable=not progress, leave=False) as bar:
        fill(pairs, device, bar.update)


def check_weights(folder: Path, targets: Iterable[Target], names: Names, *, ignored: Iterable[str] = ()) -> None:
    """Raise the errors of `load_weights` from the headers alone. Targets may lie on the meta device."""
    _match(folder, targets, names, set(ignored))


def has_weights(folder: Path) -> bool:
    """Whether the folder holds weight files of any format, safe or refused, beside its config.json."""
    return any(path.suffix in (".safetensors", *UNSAFE_SUFFIXES) for path in folder.iterdir())


def _match(
    folder: Path, targets: Iterable[Target], names: Names, ignored: set[str]
) -> list[tuple[StoredTensor, Target]]:
    """Every stored tensor that is wanted, with its target. Reads headers alone."""
    wanted = {target.name: target for target in targets}
    found: dict[str, Path] = {}
    pairs = []
    present = []
    left_out: Counter[str] = Counter()
    for stored in (stored for path in find_files(folder) for stored in read_header(path)):
        present.append(stored.name)
        canonical = names.canonical(stored.name)
        if names.is_ignored(canonical) or canonical in ignored:
            continue
        if part := names.part_left_out(canonical):
            left_out[part] += 1
            continue
        target = wanted.get(canonical)
        if target is None:
            raise CheckpointError(f"{stored.path}: unexpected tensor {stored.name} of shape {list(stored.shape)}")
        pieces = target.covers or (canonical,)
        _check_new(stored, pieces, found)
        _check_fits(stored, target)
        found.update(dict.fromkeys(pieces, stored.path))
        pairs.append((stored, target))
    missing = sorted({name for name, target in wanted.items() if not target.covers} - found.keys())
    if missing:
        shown = ", ".join(f"{names.as_spelt(name, present)} {list(wanted[name].stored_shape)}" for name in missing[:4])
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise CheckpointError(f"{folder}: missing tensors: {shown}{more}")
    if left_out:
        counts = ", ".join(f"{count} of {part}" for part, count in left_out.items())
        logger.info("%s: tensors left out, whose parts are not served: %s", folder, counts)
    return pairs


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


def _check_new(stored: StoredTensor, pieces: tuple[str, ...], found: dict[str, Path]) -> None:
    for piece in pieces:
        if piece in found:
            raise CheckpointError(f"{stored.path}: tensor {stored.name} repeats what {found[piece].name} already gave")


def _check_fits(stored: StoredTensor, target: Target) -> None:
    if target.stored_shape != stored.shape:
        raise CheckpointError(
            f"{stored.path}: tensor {stored.name} has shape {list(stored.shape)}, "
            f"the config asks for {list(target.stored_shape)}"
        )
    if not stored.dtype.is_floating_point or stored.dtype.itemsize < 2:
        raise CheckpointError(
            f"{stored.path}: tensor {stored.name} is {stored.dtype}; quantised weights are not supported, "
            "use float32, bfloat16 or float16"
        )
