"""Tensors in, tensors out: the operations of a hybrid linear-attention model.

`Kernels` has them in groups. The folder of a group holds its contract, a reference in plain PyTorch (any device, no
compiler; a CPU serves with it), and Triton kernels (CUDA, or CPU tensors under `TRITON_INTERPRET=1`). A model receives
one `Kernels` and never asks which. Nothing here knows of layers, requests or configuration.

Shapes use the letters of the field: T tokens on the flat axis, B rows (one per sequence in the step), H heads, K and V
the head dims of keys and values, D the head dim of softmax attention, d the hidden size, F the MLP width, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from .attention.contract import Attention
from .delta.contract import Delta
from .dense.contract import Dense
from .experts.contract import Experts
from .lightning.contract import Lightning
from .sampling.contract import Sample

KernelName = Literal["torch", "triton"]


@dataclass(frozen=True, slots=True)
class Kernels:
    """One implementation of every operation.

    The last dim of every tensor is contiguous; leading strides are free. Triton's operations read no device value on
    the host, so none synchronises; sizes that a launch needs (`Rows.max_len`) come in as ints. The references read
    small index tensors to choose the cheaper path, which is free on a CPU alone.
    """

    lightning: Lightning
    delta: Delta
    attention: Attention
    experts: Experts
    dense: Dense
    sample: Sample


def load(name: KernelName) -> Kernels:
    """The implementation called `name`. Triton is imported only when asked for."""
    return _load_triton() if name == "triton" else _load_torch()


def _load_torch() -> Kernels:
    from .attention import reference as attention
    from .delta import reference as delta
    from .dense import reference as dense
    from .experts import reference as experts
    from .lightning import reference as lightning
    from .sampling.reference import sample

    return Kernels(lightning, delta, attention, experts, dense, sample)


def _load_triton() -> Kernels:
    from .attention import compiled as attention
    from .delta import compiled as delta
    from .dense import compiled as dense
    from .experts import compiled as experts
    from .lightning import compiled as lightning
    from .sampling.draw import sample

    return Kernels(lightning, delta, attention, experts, dense, sample)


def default_for(device: torch.device) -> KernelName:
    """Triton where it compiles for the device, PyTorch elsewhere."""
    return "triton" if device.type == "cuda" else "torch"


def use_device(device: torch.device) -> None:
    """Make `device` the current one of this thread. Called at the start of every thread that computes or copies.

    Triton launches on the current device, and `torch.cuda.Event().record()` takes its stream, whatever device the
    tensors are on. A thread starts with device 0. `cuda` without an index is the current one already.
    """
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
