"""Makes the model that the settings name, on the device that they name, and loads its weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from ...configs.schema import EngineConfig
from ...kernels import Kernels, use_device
from ...kernels import load as load_kernels
from ...models.decoder import Decoder
from ...models.families.registry import names_of, read_config
from ...models.layers.build import Build, matrices_of
from ...models.loading.checkpoint import resolve
from ...models.loading.formats.choice import Formats
from ...models.loading.names import Names
from ...models.loading.noise import fill_quantised_with_noise, fill_with_noise
from ...models.loading.weights import check_weights, has_weights, load_weights
from ...models.mixers.backends import LinearBackends, backend_names, build_backends, linear_kinds
from ...models.specs import ModelSpec
from ..errors import ConfigError
from ..execution.served_model import ServedModel
from ..memory.pools import DTypes
from ..memory.ring import RingRule
from ..text.tokenizer_files import ids_without_token
from .cores import num_cores
from .device import check_linear_backend, pick_device, pick_dtype, pick_kernels
from .device_memory import refuse_out_of_memory
from .quantization import check_quantization, wanted_formats


def load_model(config: EngineConfig, *, progress: bool) -> ServedModel:
    """The model with its weights. Its device becomes the calling thread's current one; any other thread must call
    `use_device` before it launches a step.

    Raises `CheckpointError`, or `ConfigError` if a setting does not fit the model, the machine or another setting.
    """
    use_device(pick_device(config.device))
    # A step waits for its slowest thread, so a core that HTTP uses too would slow it: one core is left out.
    torch.set_num_threads(config.num_threads or max(1, num_cores() - 1))
    with refuse_out_of_memory("the weights", "take a device with more memory, or a smaller dtype"):
        served = place_model(config)
        if config.load_format == "dummy":
            fill_with_noise(served.model.parameters())
            for _, weight in matrices_of(served.model):
                fill_quantised_with_noise(weight)
        else:
            model = served.model
            names, ignored = names_of(served.spec), model.ignored_names()
            load_weights(served.folder, model.targets(), names, ignored=ignored, progress=progress)
        unnamed = ids_without_token(config.tokenizer or served.folder, served.spec.vocab_size)
        return replace(served, unnamed=torch.tensor(unnamed, device=served.device)) if unnamed else served


def place_model(config: EngineConfig, *, on_meta: bool = False) -> ServedModel:
    """The model without its weights. `on_meta`: place it on the device `meta`, which takes no memory, needs no Triton,
    and reads only config.json of the checkpoint. Raises `CheckpointError` or `ConfigError`."""
    folder = resolve(config.model, config.revision, weights=not on_meta)
    spec = read_config(folder)
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, spec, device)
    kernel_name = "torch" if on_meta else pick_kernels(config.kernels, device)
    kernels = load_kernels(kernel_name)
    backends = _linear_backends(config, spec, kernels)
    if not on_meta:
        check_linear_backend(backends.name, device)
    formats = _formats(config, folder, names_of(spec))
    model = Decoder(spec, Build(kernels, torch.device("meta") if on_meta else device, dtype, formats=formats), backends)
    check_quantization(config, model)
    return ServedModel(
        folder=folder,
        model=model,
        device=device,
        dtype=dtype,
        dtypes=DTypes(getattr(torch, config.state_dtype), dtype),
        snapshot_dtypes=DTypes(getattr(torch, config.saved_state_dtype), dtype),
        kernels=kernels,
        kernel_name=kernel_name,
        linear_backend=backends.name,
        ring=RingRule(backends.ring_size, backends.replays),
        prompts_in_graphs=backends.prompts_in_graphs,
    )


def _formats(config: EngineConfig, folder: Path, names: Names) -> Formats:
    """The format of each matrix: by the headers of the weights, or by config.json where none are read."""
    wanted = wanted_formats(config)
    if config.load_format == "dummy" or not has_weights(folder):
        return Formats.of_config(folder, names, wanted)
    return Formats.of_files(folder, names, wanted)


def _linear_backends(config: EngineConfig, spec: ModelSpec, kernels: Kernels) -> LinearBackends:
    """The backends that the setting `linear_backend` names for this model. Raises `ConfigError`."""
    names, kinds = backend_names(spec), " and ".join(linear_kinds(spec))
    if config.linear_backend not in names:
        raise ConfigError(
            f"linear_backend = {config.linear_backend}: the model's {kinds} layers are computed by "
            f"{', '.join(names[:-1])} or {names[-1]}"
        )
    backends = build_backends(config.linear_backend, spec, kernels, speculative=config.speculative_tokens > 0)
    most_drafts = RingRule(backends.ring_size, backends.replays).most_drafts
    if config.speculative_tokens > most_drafts:
        raise ConfigError(
            f"speculative_tokens = {config.speculative_tokens}: linear_backend {backends.name} keeps "
            f"{backends.ring_size} tokens beside a state, and drafts need {config.speculative_tokens + 2}; set "
            "speculative_tokens to 0 or take another linear_backend"
        )
    return backends


def check_checkpoint(config: EngineConfig, served: ServedModel) -> None:
    """Check the headers of the weights, if the files exist, without loading any. Raises `CheckpointError` for a tensor
    that is missing, unknown, or of another shape."""
    if config.load_format != "dummy" and has_weights(served.folder):
        model = served.model
        check_weights(served.folder, model.targets(), names_of(served.spec), ignored=model.ignored_names())
