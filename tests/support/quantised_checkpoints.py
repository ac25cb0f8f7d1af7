"""Writers of quantised checkpoints, from the published layouts, item by item where a layout is not obvious.

Each makes the tensors of one matrix [N, K], by what follows the module's name, and the matrix that they are worth in
float32.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FP8 = torch.float8_e4m3fn
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
Written = tuple[dict[str, Tensor], Tensor]


def as_words(items: np.ndarray, bits: int) -> Tensor:
    """items [R, C] -> int32 words [R, C * bits / 32]; the first item of a word is in its lowest bits."""
    per_word = 32 // bits
    padded = np.pad(items.astype(np.uint32), ((0, 0), (0, -items.shape[1] % per_word)))
    words = np.zeros((padded.shape[0], padded.shape[1] // per_word), np.uint32)
    for column in range(padded.shape[1]):
        words[:, column // per_word] |= padded[:, column] << np.uint32(bits * (column % per_word))
    return torch.from_numpy(words.view(np.int32))


def grouped(matrix: Tensor, group: int) -> Tensor:
    return matrix.reshape(matrix.shape[0], -1, group)


def fp8_block(matrix: Tensor, scale_dtype: torch.dtype = torch.bfloat16, name: str = ".weight_scale_inv") -> Written:
    rows, columns = matrix.shape
    scale = torch.zeros(-(-rows // 128), -(-columns // 128), dtype=torch.float32)
    data, worth = torch.zeros(rows, columns, dtype=FP8), torch.zeros(rows, columns)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            here = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            exact = matrix[here].abs().max() / 448
            if scale_dtype in (torch.uint8, torch.float8_e8m0fnu):
                exact = 2.0 ** torch.ceil(torch.log2(exact))
            scale[i, j] = exact.to(torch.bfloat16 if scale_dtype == torch.bfloat16 else torch.float32)
            data[here] = (matrix[here] / scale[i, j]).clamp(-448, 448).to(FP8)
            worth[here] = data[here].float() * scale[i, j]
    if scale_dtype == torch.uint8:
        stored = (torch.log2(scale) + 127).to(torch.uint8)
    else:
        stored = scale.to(scale_dtype)
    return {".weight": data, name: stored}, worth


def eight_bits(matrix: Tensor, dtype: torch.dtype, scale_dtype: torch.dtype, per: str = "channel") -> Written:
    """compressed-tensors' and ModelOpt's: a scale of a channel, of groups of 32, or of all."""
    largest = {FP8: 448.0, torch.int8: 127.0}[dtype]
    parts = {"channel": matrix[:, None, :], "group": grouped(matrix, 32), "tensor": matrix.reshape(1, 1, -1)}[per]
    scale = (parts.abs().amax(dim=-1, keepdim=True) / largest).to(scale_dtype)
    values = parts / scale.float()
    data = (values.round() if dtype == torch.int8 else values).clamp(-largest, largest).to(dtype)
    stored = scale.reshape(()) if per == "tensor" else scale[..., 0]
    worth = (data.float() * scale.float()).reshape(matrix.shape)
    return {".weight": data.reshape(matrix.shape), ".weight_scale": stored}, worth


def integers(
    matrix: Tensor, bits: int, group: int, *, symmetric: bool, scale_dtype: torch.dtype, order: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Signed items [N, K], scales [N, K / group], signed zero points, and the worth. `order`: the group of each
    column."""
    groups = torch.arange(matrix.shape[1]) // group if order is None else order
    num_groups = -(-matrix.shape[1] // group)
    low, high = torch.zeros(2, matrix.shape[0], num_groups)
    for g in range(num_groups):
        own = matrix[:, groups == g]
        low[:, g], high[:, g] = own.amin(dim=1), own.amax(dim=1)
    smallest, largest = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    if symmetric:
        scale = torch.maximum(-low, high) / largest
        zero = torch.zeros_like(scale)
    else:
        scale = (high.clamp(min=0) - low.clamp(max=0)) / (largest - smallest)
        zero = (smallest - low.clamp(max=0) / scale).round().clamp(smallest + 1, largest)
    scale = scale.to(scale_dtype)
    wide, offset = scale.float()[:, groups], zero[:, groups]
    items = (matrix / wide + offset).round().clamp(smallest, largest)
    return items.to(torch.int32), scale, zero.to(torch.int32), (items - offset) * wide


def compressed_integers(
    matrix: Tensor, bits: int, group: int, *, symmetric: bool = True, ordered: bool = False
) -> Written:
    order = None
    if ordered:
        order = torch.randperm(matrix.shape[1], generator=torch.Generator().manual_seed(5)) // group
    items, scale, zero, worth = integers(
        matrix, bits, group, symmetric=symmetric, scale_dtype=torch.bfloat16, order=order
    )
    offset = 1 << (bits - 1)
    tensors = {
        ".weight_packed": as_words((items + offset).numpy(), bits),
        ".weight_scale": scale,
        ".weight_shape": torch.tensor(matrix.shape),
    }
    if not symmetric:
        tensors[".weight_zero_point"] = as_words((zero + offset).numpy().T, bits).T.contiguous()
    if order is not None:
        tensors[".weight_g_idx"] = order.to(torch.int32)
    return tensors, worth


def gptq(
    matrix: Tensor, bits: int, group: int, *, symmetric: bool = True, ordered: bool = False, version: int = 1
) -> Written:
    order = torch.arange(matrix.shape[1]) // group
    if ordered:
        order = order[torch.randperm(matrix.shape[1], generator=torch.Generator().manual_seed(5))]
    items, scale, zero, worth = integers(
        matrix, bits, group, symmetric=symmetric, scale_dtype=torch.float16, order=order
    )
    offset = 1 << (bits - 1)
    return {
        ".qweight": as_words((items + offset).numpy(), bits).T.contiguous(),
        ".qzeros": as_words((zero + offset).numpy().T - (1 if version == 1 else 0), bits),
        ".scales": scale.T.contiguous(),
        ".g_idx": order.to(torch.int32),
    }, worth


def awq(matrix: Tensor, group: int) -> Written:
    items, scale, zero, worth = integers(matrix, 4, group, symmetric=False, scale_dtype=torch.float16)
    columns = [0, 2, 4, 6, 1, 3, 5, 7]  # nibble i of a word holds this column of its group of eight

    def packed(values: Tensor) -> Tensor:
        unsigned = (values + 8).numpy().T
        mixed = np.empty_like(unsigned)
        for start in range(0, unsigned.shape[1], 8):
            for nibble, column in enumerate(columns):
                mixed[:, start + nibble] = unsigned[:, start + column]
        return as_words(mixed, 4)

    return {".qweight": packed(items), ".qzeros": packed(zero), ".scales": scale.T.contiguous()}, worth


def floats4(matrix: Tensor, kind: str) -> Written:
    """kind: "nvfp4" of compressed-tensors, "modelopt" nvfp4, "mxfp4", or "ling" mxfp4."""
    group = 16 if kind in ("nvfp4", "modelopt") else 32
    parts = grouped(matrix, group)
    largest = parts.abs().amax(dim=-1) / 6
    if group == 16:
        total = (matrix.abs().max() / (6 * 448)).float()
        stored = (largest / total).to(FP8)
        if kind == "nvfp4":
            total = 1 / total
            scale = stored.float() / total
        else:
            scale = stored.float() * total
    else:
        exponent = torch.ceil(torch.log2(largest)).clamp(-127, 127)
        stored, scale = (exponent + 127).to(torch.uint8), 2.0**exponent
    wanted = (parts / scale[..., None].clamp(min=1e-30)).numpy()
    codes = np.abs(wanted[..., None] - E2M1).argmin(axis=-1)
    worth = torch.from_numpy(E2M1[codes]) * scale[..., None]
    flat = codes.reshape(matrix.shape).astype(np.uint8)
    packed = torch.from_numpy(flat[:, 0::2] | flat[:, 1::2] << 4)
    names = {
        "nvfp4": (".weight_packed", ".weight_scale", ".weight_global_scale"),
        "modelopt": (".weight", ".weight_scale", ".weight_scale_2"),
        "mxfp4": (".weight_packed", ".weight_scale", None),
        "ling": (".weight", ".weight_scale_inv", None),
    }[kind]
    tensors = {names[0]: packed, names[1]: stored}
    if names[2] is not None:
        tensors[names[2]] = total.reshape(1) if kind == "nvfp4" else total
    return tensors, worth.reshape(matrix.shape)


def compressed(**weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": ["lm_head"]}


def int_group(bits: int, size: int | None, symmetric: bool = True) -> dict[str, Any]:
    strategy = "group" if size else "channel"
    fields = {"num_bits": bits, "type": "int", "strategy": strategy, "group_size": size, "symmetric": symmetric}
    return compressed(**fields)


def gptq_config(bits: int, group: int, **changes: Any) -> dict[str, Any]:
    fields = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False, "sym": True}
    return fields | {"checkpoint_format": "gptq"} | changes


FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
FINE = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


@dataclass(frozen=True)
class Published:
    write: Callable[[Tensor], Written]
    config: dict[str, Any]
    held: str  # the format in memory of a matrix that is not cut


FORMATS = {
    "fp8, bf16 scales": Published(fp8_block, FINE, "fp8"),
    "fp8, float32 scales": Published(lambda m: fp8_block(m, torch.float32), FINE, "fp8"),
    "fp8, exponents": Published(lambda m: fp8_block(m, torch.uint8), FINE | {"scale_fmt": "ue8m0"}, "fp8"),
    "fp8, e8m0": Published(lambda m: fp8_block(m, torch.float8_e8m0fnu), FINE | {"scale_fmt": "ue8m0"}, "fp8"),
    "mxfp4 of Ling": Published(lambda m: floats4(m, "ling"), FINE | {"routed_experts_quant_method": "mxfp4"}, "plain"),
    "ct fp8 by channel": Published(
        lambda m: eight_bits(m, FP8, torch.bfloat16), compressed(**FLOAT8, strategy="channel"), "fp8"
    ),
    "ct fp8 by tensor": Published(
        lambda m: eight_bits(m, FP8, torch.float32, "tensor"), compressed(**FLOAT8, strategy="tensor"), "fp8"
    ),
    "ct fp8 by block": Published(
        lambda m: fp8_block(m, torch.bfloat16, ".weight_scale"), compressed(**FLOAT8, strategy="block"), "fp8"
    ),
    "ct int8 by channel": Published(lambda m: eight_bits(m, torch.int8, torch.bfloat16), int_group(8, None), "int8"),
    "ct int8 by group": Published(
        lambda m: eight_bits(m, torch.int8, torch.float32, "group"), int_group(8, 32), "int8"
    ),
    "ct int4": Published(lambda m: compressed_integers(m, 4, 32), int_group(4, 32), "int4"),
    "ct int4 with zeros": Published(
        lambda m: compressed_integers(m, 4, 64, symmetric=False), int_group(4, 64, symmetric=False), "int4"
    ),
    "ct int4 by channel": Published(lambda m: compressed_integers(m, 4, m.shape[1]), int_group(4, None), "int4"),
    "ct int4 in order": Published(lambda m: compressed_integers(m, 4, 32, ordered=True), int_group(4, 32), "plain"),
    "ct int8 packed": Published(lambda m: compressed_integers(m, 8, 64), int_group(8, 64), "int8"),
    "ct int8 packed, zeros": Published(
        lambda m: compressed_integers(m, 8, 64, symmetric=False), int_group(8, 64, symmetric=False), "plain"
    ),
    "ct nvfp4": Published(
        lambda m: floats4(m, "nvfp4"), compressed(num_bits=4, type="float", strategy="tensor_group"), "plain"
    ),
    "ct mxfp4": Published(
        lambda m: floats4(m, "mxfp4"), compressed(num_bits=4, type="float", strategy="group", group_size=32), "plain"
    ),
    "gptq": Published(lambda m: gptq(m, 4, 32), gptq_config(4, 32), "int4"),
    "gptq by channel": Published(lambda m: gptq(m, 4, m.shape[1]), gptq_config(4, -1), "int4"),
    "gptq v2": Published(lambda m: gptq(m, 4, 32, version=2), gptq_config(4, 32, checkpoint_format="gptq_v2"), "int4"),
    "gptq with zeros": Published(lambda m: gptq(m, 4, 32, symmetric=False), gptq_config(4, 32, sym=False), "int4"),
    "gptq in order": Published(lambda m: gptq(m, 4, 32, ordered=True), gptq_config(4, 32, desc_act=True), "plain"),
    "gptq 8 bits": Published(lambda m: gptq(m, 8, 32), gptq_config(8, 32), "int8"),
    "awq": Published(lambda m: awq(m, 32), AWQ, "int4"),
    "modelopt nvfp4": Published(lambda m: floats4(m, "modelopt"), MODELOPT, "plain"),
    "modelopt fp8": Published(
        lambda m: eight_bits(m, FP8, torch.float32, "tensor"), MODELOPT | {"quant_algo": "FP8"}, "fp8"
    ),
    "modelopt fp8 by block": Published(
        lambda m: _four_dims(fp8_block(m, torch.float32, ".weight_scale")),
        MODELOPT | {"quant_algo": "FP8_PB_WO"},
        "fp8",
    ),
}


def _four_dims(written: Written) -> Written:
    tensors, worth = written
    return tensors | {".weight_scale": tensors[".weight_scale"][:, None, :, None]}, worth


def quantise_folder(
    folder: Path, twin: Path, published: Published, modules: str, config: dict[str, Any] | None = None
) -> set[str]:
    """Rewrite a plain checkpoint, and write its dequantised twin in float32 beside it. modules: a pattern of the names
    to quantise. Returns them."""
    twin.mkdir()
    quantised, plain, names = {}, {}, set()
    for path in folder.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            module = name.removesuffix(".weight")
            if name.endswith(".weight") and tensor.ndim == 2 and re.search(modules, module):
                tensors, worth = published.write(tensor.float())
                quantised |= {module + end: part.contiguous() for end, part in tensors.items()}
                plain[name] = worth
                names.add(module)
            else:
                quantised[name] = plain[name] = tensor
        path.unlink()
    for index in folder.glob("*.index.json"):
        index.unlink()
    for path in folder.iterdir():
        (twin / path.name).write_bytes(path.read_bytes())
    fields = json.loads((folder / "config.json").read_text())
    fields["quantization_config"] = published.config if config is None else config
    (folder / "config.json").write_text(json.dumps(fields))
    save_file(quantised, folder / "model.safetensors")
    save_file(plain, twin / "model.safetensors")
    return names
