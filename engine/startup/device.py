"""The device, dtype and kernels that the settings `device`, `dtype` and `kernels` mean on this machine, and whether the
linear backend runs there."""

from __future__ import annotations

import importlib.util
import os
from typing import Literal

import torch

from ...kernels import KernelName, default_for
from ...models.specs import ModelSpec
from ..errors import ConfigError


def pick_device(name: str) -> torch.device:
    """The device that the setting names; `auto` is CUDA if the machine has a GPU. Raises `ConfigError`."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device("cuda:0" if name == "cuda" else name)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ConfigError(f"device = {name}: this machine has {count} CUDA devices; use cpu or auto")
    return device


def pick_kernels(name: Literal["auto", "torch", "triton"], device: torch.device) -> KernelName:
    """The kernels that run on the device. Raises `ConfigError` for Triton if it cannot compile for the device."""
    if name == "auto":
        return default_for(device)
    if name == "triton" and importlib.util.find_spec("triton") is None:
        raise ConfigError("kernels = triton: the package triton is not installed; use torch or auto")
    if name == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(
            "kernels = triton does not compile for a CPU; use torch or auto (TRITON_INTERPRET=1 interprets, to debug)"
        )
    return name


def check_linear_backend(name: str, device: torch.device) -> None:
    """Raises `ConfigError` if the linear backend `fla` cannot run: on a CPU, or without its package."""
    if name != "fla":
        return
    if device.type != "cuda":
        raise ConfigError(
            f"linear_backend = fla: the Triton kernels of fla-core need a GPU, and the device is {device.type}; take "
            "chunk, replay or auto"
        )
    try:
        from ...kernels.delta import fla

        fla.load()
    except ImportError as error:
        raise ConfigError(
            f"linear_backend = fla: fla-core cannot be used ({error}): pip install 'leyden[fla]', or take chunk, "
            "replay or auto"
        ) from None


def pick_dtype(name: str, config: ModelSpec, device: torch.device) -> torch.dtype:
    """The dtype that the setting names. `auto` is the checkpoint's own dtype on CUDA and float32 on a CPU, where half
    precision is slow. Raises `ConfigError`."""
    if name == "auto":
        name = (config.dtype or "bfloat16") if device.type == "cuda" else "float32"
    dtype = getattr(torch, name, None)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError(
            f"the checkpoint's dtype {name!r} is not supported; set dtype to float32, bfloat16 or float16"
        )
    return dtype
