"""Measure how fast a checkpoint's weights reach the device, from the page cache.

    python -P benchmarks/loading.py --config benchmarks/configs/dense --folder /tmp/checkpoint
    python -P benchmarks/loading.py --config benchmarks/configs/dense --layers 8 --device cpu

Writes random weights of the config's shapes in its own dtype to --folder, in shards with an index, unless they are
there already; a folder of its own is made and removed when none is given. `--layers` keeps only the first ones, which
sets the size. Each round loads all of it into the same model: the first may wait for the disk, the others are bound by
copying. Growth of host memory is what a round adds at its peak to what the process held before, which is its own
weights too on a CPU. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from leyden.engine.startup.device import pick_device
from leyden.kernels import load
from leyden.models.decoder import Decoder
from leyden.models.families.registry import names_of, read_config
from leyden.models.layers.build import Build
from leyden.models.loading.files import INDEX_FILE
from leyden.models.loading.weights import load_weights
from leyden.models.mixers.backends import build_backends
from safetensors.torch import save_file

NOISE_ITEMS = 1 << 24


def main() -> int:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="leyden-") as temporary:
        folder = arguments.folder or Path(temporary)
        if not (folder / INDEX_FILE).exists():
            write_checkpoint(arguments.config, folder, arguments.layers, int(arguments.shard_gb * 1e9))
        report = {"config": str(arguments.config), **measure(folder, pick_device(arguments.device), arguments.rounds)}
    print(json.dumps(report))
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="folder with a config.json")
    parser.add_argument("--layers", type=int, default=None, help="keep only the first layers")
    parser.add_argument("--folder", type=Path, default=None, help="where the checkpoint is, or is to be")
    parser.add_argument("--shard-gb", type=float, default=2.0, help="size of a file")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--rounds", type=int, default=3, help="times to load")
    return parser.parse_args()


def write_checkpoint(config: Path, folder: Path, layers: int | None, shard_bytes: int) -> None:
    """A complete checkpoint of random weights. Holds one shard in memory at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = json.loads((config / "config.json").read_text())
    if layers is not None:
        fields["num_hidden_layers"] = layers
        if "attn_type_list" in fields:  # other families derive the kinds of layers from their number
            fields["attn_type_list"] = fields["attn_type_list"][:layers]
    (folder / "config.json").write_text(json.dumps(fields))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards(build(folder, torch.device("meta")), shard_bytes), start=1):
        name = f"model-{number:05d}.safetensors"
        save_file(shard, folder / name)
        weight_map |= dict.fromkeys(shard, name)
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))


def shards(model: Decoder, shard_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
    """Tensors of noise for every target, the same over and over, in groups of about so many bytes."""
    noise = torch.empty(NOISE_ITEMS).uniform_(-0.05, 0.05)
    shard: dict[str, torch.Tensor] = {}
    for target in model.targets():
        if not target.covers:
            num_items = math.prod(target.stored_shape)
            items = noise.to(target.view.dtype).repeat(-(-num_items // NOISE_ITEMS))[:num_items]
            shard[target.name] = items.view(target.stored_shape).clone()
        if sum(tensor.nbytes for tensor in shard.values()) >= shard_bytes:
            yield shard
            shard = {}
    if shard:
        yield shard


def build(folder: Path, device: torch.device) -> Decoder:
    """The folder's model in its own dtype, without weights."""
    config, kernels = read_config(folder), load("torch")
    dtype = getattr(torch, config.dtype or "bfloat16")
    return Decoder(config, Build(kernels, device, dtype), build_backends("auto", config, kernels))


def measure(folder: Path, device: torch.device, rounds: int) -> dict[str, Any]:
    """Every round's speed, and the most that host memory grew in one."""
    model = build(folder, device)
    for parameter in model.parameters():
        parameter.zero_()  # so that it is memory of the process before the first round
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    print(f"{num_bytes / 1e9:.2f} GB onto {name}")
    speeds, growth = [], 0
    for i in range(rounds):
        with watched_memory() as resident:
            started = time.perf_counter()
            load_weights(folder, model.targets(), names_of(model.spec), ignored=model.ignored_names(), progress=False)
            seconds = time.perf_counter() - started
        speeds.append(round(num_bytes / seconds / 1e9, 3))
        growth = max(growth, max(resident) - resident[0])
        print(f"round {i + 1}: {seconds:.2f} s, {speeds[-1]:.2f} GB/s")
    print(f"host memory grew by at most {growth / 1e6:.0f} MB")
    return {"device": name, "gb": round(num_bytes / 1e9, 3), "gb_per_s": speeds, "host_growth_mb": round(growth / 1e6)}


@contextlib.contextmanager
def watched_memory() -> Iterator[list[int]]:
    """Bytes that this process has in memory, before and every few milliseconds while the block runs."""
    statm = Path("/proc/self/statm")
    samples: list[int] = []
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(0.005):
            sample()

    def sample() -> None:
        samples.append(int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))

    sample()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield samples
    finally:
        is_over.set()
        watcher.join()


if __name__ == "__main__":
    sys.exit(main())
