"""safetensors -> parameters: complete or an error, which the headers tell before any data is read.

A module yields a `Target` for each checkpoint tensor that it wants: a canonical name and the view of a parameter that
the tensor fills. So fused parameters (q, k and v in one matrix, all experts in one tensor) are filled in place from the
pieces that a file holds, and no tensor is ever held twice. Family-specific spellings come in as `Names`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from ...kernels.bundles import Weight
from ..errors import CheckpointError
from .files import UNSAFE_SUFFIXES
from .formats.encoded import StoredMatrix
from .formats.published import Quantization
from .header import StoredTensor
from .names import Names
from .reader import Match, fill
from .stored import read_stored
from .target import Target

logger = logging.getLogger("leyden.models")


def load_weights(
    folder: Path, targets: Iterable[Target], names: Names, *, ignored: Iterable[str] = (), progress: bool = True
) -> None:
    """Fill every target from the folder's safetensors files, in place.

    `names`: the family's spellings. `ignored`: canonical names that may be present beside the targets'. Raises
    `CheckpointError` for a missing, unexpected, repeated or wrongly shaped tensor, naming the tensor, the file and both
    shapes.
    """
    matches = _match(folder, targets, names, set(ignored))
    device = matches[0].target.view.device
    num_bytes = sum(match.nbytes for match in matches)
    with tqdm(total=num_bytes, desc="weights", unit="B", unit_scale=True, disable=not progress, leave=False) as bar:
        fill(matches, device, bar.update)


def check_weights(folder: Path, targets: Iterable[Target], names: Names, *, ignored: Iterable[str] = ()) -> None:
    """Raise the errors of `load_weights` from the headers alone. Targets may lie on the meta device."""
    _match(folder, targets, names, set(ignored))


def has_weights(folder: Path) -> bool:
    """Whether the folder holds weight files of any format, safe or refused, beside its config.json."""
    return any(path.suffix in (".safetensors", *UNSAFE_SUFFIXES) for path in folder.iterdir())


def _match(folder: Path, targets: Iterable[Target], names: Names, ignored: set[str]) -> list[Match]:
    """Every stored tensor or matrix that is wanted, with its target. Reads headers alone."""
    wanted = {target.name: target for target in targets}
    stored = read_stored(folder, names, ignored)
    quantization = Quantization.of(folder) if stored.is_quantised else Quantization()
    found: dict[str, Path] = {}
    matches = []
    for matrix in stored.matrices:
        first = matrix.first
        target = wanted.get(matrix.name)
        if target is None:
            raise CheckpointError(f"{first.path}: unexpected tensor {first.name} of shape {list(first.shape)}")
        pieces = target.covers or (matrix.name,)
        _check_new(first, pieces, found)
        match = _fitting(matrix, target, quantization)
        found.update(dict.fromkeys(pieces, first.path))
        matches.append(match)
    missing = sorted({name for name, target in wanted.items() if not target.covers} - found.keys())
    if missing:
        present = stored.names
        shown = ", ".join(f"{names.as_spelt(name, present)} {list(wanted[name].stored_shape)}" for name in missing[:4])
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise CheckpointError(f"{folder}: missing tensors: {shown}{more}")
    stored.log_left_out()
    _log_dequantised(folder, matches)
    return matches


def _log_dequantised(folder: Path, matches: list[Match]) -> None:
    count = sum(match.is_dequantised for match in matches)
    if count:
        logger.info(
            "%s: dequantised, since no format in memory holds them as the model needs: %d matrices", folder, count
        )


def _fitting(matrix: StoredMatrix, target: Target, quantization: Quantization) -> Match:
    """The match, if the matrix fits its target. A plain tensor for a plain parameter is copied as it is. Raises
    `CheckpointError`."""
    first = matrix.first
    encoded = quantization.encode(matrix)
    if target.stored_shape != encoded.shape:
        told = "" if matrix.is_plain else f", as a matrix {list(encoded.shape)}"
        raise CheckpointError(
            f"{first.path}: tensor {first.name} has shape {list(first.shape)}{told}, "
            f"the config asks for {list(target.stored_shape)}"
        )
    if not matrix.is_plain and (len(encoded.shape) < 2 or target.plus):
        raise CheckpointError(f"{first.path}: tensor {first.name} of shape {list(first.shape)} must not be quantised")
    is_plain = matrix.is_plain and not any(isinstance(view, Weight) for view in target.views)
    return Match(first if is_plain else encoded, target)


def _check_new(stored: StoredTensor, pieces: tuple[str, ...], found: dict[str, Path]) -> None:
    for piece in pieces:
        if piece in found:
            raise CheckpointError(f"{stored.path}: tensor {stored.name} repeats what {found[piece].name} already gave")
