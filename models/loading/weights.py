"""safetensors -> parameters: complete or an error, which the headers tell before any data is read.

A module says which checkpoint tensors it wants by yielding `Target`s: a canonical name and the view of a parameter
that the tensor fills. So fused parameters (q, k and v in one matrix, all experts in one tensor) are filled in place
from whatever pieces a file holds, and nothing is ever held twice.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import CheckpointError
from .checkpoint import OTHER_WEIGHTS, read_json
from .reader import StoredTensor, fill, read_header

logger = logging.getLogger("leyden.models")

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
_IGNORED = re.compile(r"(^|\.)(slope_rate|query_decay|key_decay|diagonal_decay|rotary_emb\.inv_freq)$")
# Canonical names as the released checkpoints spell them, unless the files at hand have names of the other spelling.
_RELEASED = (
    (re.compile(r"(\.experts\.\d+)\.gate_proj\."), r"\1.w1.", re.compile(r"\.experts\.\d+\.gate_proj\.")),
    (re.compile(r"(\.experts\.\d+)\.up_proj\."), r"\1.w3.", re.compile(r"\.experts\.\d+\.up_proj\.")),
    (re.compile(r"(\.experts\.\d+)\.down_proj\."), r"\1.w2.", re.compile(r"\.experts\.\d+\.down_proj\.")),
    (re.compile(r"\.mlp\.(experts|gate)\."), r".block_sparse_moe.\1.", re.compile(r"\.mlp\.(experts|gate)\.")),
    (re.compile(r"^(?!lm_head\.)"), "model.", re.compile(r"^(?!model\.|lm_head\.)")),
)
MAIN_FILE = "model.safetensors"


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
    pairs = _match(folder, wanted, set(ignored))
    num_bytes = sum(stored.nbytes for stored, _ in pairs)
    device = next(iter(wanted.values())).view.device
    with tqdm(total=num_bytes, desc="weights", unit="B", unit_scale=True, disable=not progress, leave=False) as bar:
        fill(pairs, device, bar.update)


def check_weights(folder: Path, targets: Iterable[Target], *, ignored: Iterable[str] = ()) -> None:
    """What `load_weights` would refuse, from the headers alone. Targets may lie on the meta device."""
    _match(folder, {target.name: target for target in targets}, set(ignored))


def has_weights(folder: Path) -> bool:
    """Whether the folder holds weights at all, in files that are taken or refused; a config.json may come alone."""
    return any(path.suffix in (".safetensors", *UNSAFE_SUFFIXES) for path in folder.iterdir())


def _match(folder: Path, wanted: dict[str, Target], ignored: set[str]) -> list[tuple[StoredTensor, Tensor]]:
    """Every stored tensor that is wanted, with the view it fills. Reads headers alone."""
    required = {name for name, target in wanted.items() if not target.covers}
    found: dict[str, Path] = {}
    pairs = []
    names = []
    for stored in (stored for path in find_files(folder) for stored in read_header(path)):
        names.append(stored.name)
        canonical = canonical_name(stored.name)
        if _IGNORED.search(canonical) or canonical in ignored:
            continue
        target = wanted.get(canonical)
        if target is None:
            raise CheckpointError(f"{stored.path}: unexpected tensor {stored.name} of shape {list(stored.shape)}")
        pieces = target.covers or (canonical,)
        _check_new(stored, pieces, found)
        _check_fits(stored, target.view)
        found.update(dict.fromkeys(pieces, stored.path))
        pairs.append((stored, target.view))
    missing = sorted(required - found.keys())
    if missing:
        shown = ", ".join(f"{_as_spelt(name, names)} {list(wanted[name].view.shape)}" for name in missing[:4])
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise CheckpointError(f"{folder}: missing tensors: {shown}{more}")
    return pairs


def _as_spelt(name: str, names: list[str]) -> str:
    """A canonical name in the spelling of files that hold tensors of these names."""
    for pattern, released, is_other in _RELEASED:
        if not any(map(is_other.search, names)):
            name = pattern.sub(released, name)
    return name


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


def _check_fits(stored: StoredTensor, view: Tensor) -> None:
    if view.shape != stored.shape:
        raise CheckpointError(
            f"{stored.path}: tensor {stored.name} has shape {list(stored.shape)}, "
            f"the config asks for {list(view.shape)}"
        )
    if not stored.dtype.is_floating_point or stored.dtype.itemsize < 2:
        raise CheckpointError(
            f"{stored.path}: tensor {stored.name} is {stored.dtype}; quantised weights are not supported, "
            "use float32, bfloat16 or float16"
        )
