"""Tiny random Qwen checkpoints, saved by transformers itself, in every form in which they are released."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB, full_tokenizer
from torch import Tensor
from torch.nn.functional import rms_norm

NEXT, DENSE, MOE = "Qwen3NextForCausalLM", "Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM"
CONFIGS = {
    NEXT: transformers.Qwen3NextConfig,
    DENSE: transformers.Qwen3_5TextConfig,
    MOE: transformers.Qwen3_5MoeTextConfig,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
MROPE = {"mrope_section": [2, 1, 1], "mrope_interleaved": True}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
TINY: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def make_model(architecture: str, seed: int = 0, **changes: Any) -> Any:
    """A random model whose greedy text wanders."""
    rope = ROPE if architecture == NEXT else ROPE | MROPE
    experts = {} if architecture == DENSE else EXPERTS | {"shared_expert_intermediate_size": 32}
    torch.manual_seed(seed)
    config = CONFIGS[architecture](**TINY | experts | {"rope_parameters": rope} | changes)
    model = getattr(transformers, architecture)(config).eval()
    if changes.get("output_gate_type") == "sigmoid":
        for layer in model.model.layers:
            if hasattr(layer, "linear_attn"):
                layer.linear_attn.norm.forward = functools.partial(_gate_by_sigmoid, layer.linear_attn.norm)
    for name, parameter in model.named_parameters():
        if name.endswith("conv1d.weight"):
            torch.nn.init.normal_(parameter, std=0.6)
        elif name.endswith("A_log"):  # states that last, of 2 to 200 tokens or so; as made they would forget at once
            torch.nn.init.uniform_(parameter, -6.0, -1.0)
        elif parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.2 / parameter.shape[-1] ** 0.5)
        else:
            parameter.data += 0.2 * torch.randn_like(parameter)
        parameter.requires_grad_(False)
        assert parameter.isfinite().all(), name
    return model


def _gate_by_sigmoid(norm: Any, x: Tensor, gate: Tensor) -> Tensor:
    """Transformers' gated norm, whose class has silu whatever output_gate_type says."""
    return rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon) * gate.sigmoid()


def save_model(folder: Path, model: Any) -> None:
    """As transformers saves it: the text model's config alone, experts one by one."""
    model.save_pretrained(folder)
    full_tokenizer().save_pretrained(folder)


def fuse_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The experts of a layer in one tensor each, as in the official files."""
    fused = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for mlp in {name.partition("experts.")[0] for name in tensors.keys() - fused.keys()}:
        of_kind = {
            kind: [tensors[f"{mlp}experts.{e}.{kind}_proj.weight"] for e in range(EXPERTS["num_experts"])]
            for kind in ("gate", "up", "down")
        }
        pairs = zip(of_kind["gate"], of_kind["up"], strict=True)
        fused[f"{mlp}experts.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in pairs])
        fused[f"{mlp}experts.down_proj"] = torch.stack(of_kind["down"])
    return fused


def wrap(folder: Path) -> None:
    """Rewrite a saved text model as the official checkpoints are: inside a vision model, with the names of its tensors,
    parts that a text needs none of, fused experts, and shards of odd names that the index alone knows."""
    config = json.loads((folder / "config.json").read_text())
    architecture = config.pop("architectures")[0].replace("ForCausalLM", "ForConditionalGeneration")
    tied = {"tie_word_embeddings": config["tie_word_embeddings"]}
    kind = config["model_type"].removesuffix("_text")
    wrapper = {"architectures": [architecture], "model_type": kind, "text_config": config, "vision_config": {}, **tied}
    (folder / "config.json").write_text(json.dumps(wrapper))
    tensors = fuse_experts(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    shards: dict[str, dict[str, Tensor]] = {
        "outside.safetensors": {},
        "vision.safetensors": {f"model.visual.blocks.{i}.norm1.weight": torch.ones(3) for i in range(5)},
        "mtp.safetensors": {f"mtp.{name}.weight": torch.ones(2, 2) for name in ("fc", "layers.0.mlp.gate_proj")},
    }
    for name, tensor in tensors.items():
        parts = name.split(".")
        shard = f"layers-{parts[2]}.safetensors" if parts[1] == "layers" else "outside.safetensors"
        wrapped = name if name == "lm_head.weight" else name.replace("model.", "model.language_model.", 1)
        shards.setdefault(shard, {})[wrapped] = tensor
    for shard, held in shards.items():
        save_file(held, folder / shard)
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
