"""Train the small hybrid model that ships in models/demo, from the rows in tools/demo_corpus and planned stories.

The model is Hugging Face's own `MiniMaxForCausalLM`: six lightning and two softmax attention layers, each with a
mixture of four experts, 11 million parameters. Anyone with a GPU can repeat it (five minutes on an H100):

    pip install torch transformers tokenizers matplotlib
    python tools/train_demo.py tokenizer     # 4,096-entry byte-level BPE and chat template -> models/demo
    python tools/train_demo.py train         # weights, configurations, training.json -> models/demo
    python tools/train_demo.py evaluate      # held-out perplexity of the shipped files
    python tools/train_demo.py plot          # loss curve -> models/demo/loss.png
    python tools/train_demo.py samples       # five prompts, five seeds, nothing selected, from `leyden serve demo`

A few steps also run on a CPU: `train --steps 3 --batch-tokens 512 --seq-len 256 --limit 50 --out /tmp/demo`.

The rows' stories ramble. Planned stories (demo_stories.py), new ones in every pass, take the place of more than half of
them, and of nearly all toward the end; explanations and talk stay. The tokenizer is trained on the rows alone.

A document is `<|startoftext|>`, turns or plain text, `<|endoftext|>`; a turn is its role token, the text, `<|end|>`.
Documents are packed end to end into rows. The recurrent state runs on from one document into the next: the model
learns from `<|startoftext|>` to leave the old one behind. While training, two pieces of the model run in equivalent
dense forms, for speed (`chunked_lightning`, `dense_experts`); tests/tools/test_train_demo.py compares them.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import lzma
import math
import multiprocessing
import random
import re
import shutil
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent))  # `python -P` leaves it out

import demo_stories

if TYPE_CHECKING:
    import torch
    from transformers import MiniMaxConfig, PreTrainedTokenizerBase

Row = dict[str, str]  # "kind" (story, planned, explain or talk), "user", "assistant"

ROOT = Path(__file__).resolve().parents[1]
CORPUS, MODEL = ROOT / "tools" / "demo_corpus", ROOT / "models" / "demo"
SPECIAL = ["<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
PAD, START, STOP, SYSTEM, USER, ASSISTANT, END = range(len(SPECIAL))
STORIES = ("story", "planned")
PROMPT_WEIGHT = 0.1  # loss weight of what the user says; what the model says weighs 1
HELD_OUT_SEED = "held out"  # of the planned stories that measure; the training's seeds are numbers
NUM_PARTS, NUM_WORKERS = 8, 5  # processes shuffle, vary and encode an eighth of the rows each, ahead of the training

CHAT_TEMPLATE = """{{- bos_token -}}
{%- if tools -%}<|system|>{{ 'You can call these functions:' }}
    {%- for tool in tools %}{{ '\\n' ~ (tool.function | tojson) }}{% endfor -%}
    {{- '\\nCall one so: <tool_call>\\n{"name": "...", "arguments": {...}}\\n</tool_call><|end|>' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role in ['system', 'developer'] -%}<|system|>
    {%- elif message.role in ['user', 'tool'] -%}<|user|>
    {%- elif message.role == 'assistant' -%}<|assistant|>
    {%- else -%}{{ raise_exception('unknown role: ' ~ message.role) }}
    {%- endif -%}
    {%- if message.content is string -%}{{ message.content }}
    {%- else -%}
        {%- for part in message.content or [] -%}
            {%- if part.type != 'text' -%}{{ raise_exception('only text parts are supported') }}{%- endif -%}
            {{- part.text -}}
        {%- endfor -%}
    {%- endif -%}
    {%- for call in message.tool_calls or [] -%}
        {{- '<tool_call>\\n{"name": ' ~ (call.function.name | tojson) ~ ', "arguments": ' -}}
        {{- (call.function.arguments | tojson) ~ '}\\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
"""

SYSTEM_LINES = """You are a helpful assistant.|You are a kind storyteller.|You tell short stories for children.
Be friendly and brief.|Answer in simple words.|You are Leyden, a small and friendly model.|Be kind."""
FIRST_ASKS = """Tell me a story.|Tell me a short story.|Can you tell me a story?|Please write a short story.
Write a story.|I would like a story, please.|Tell me a bedtime story.|Write a short story for a child.
story please|once upon a time"""
NEXT_ASKS = "Tell me another story.|Another one, please.|Can you tell me one more story?|One more story, please!"
ABOUT = "Tell me a story about {}.|Tell me a short story about {}.|Write a short story about {}.|A story about {}"
HERO = re.compile(r"\b(?:about|hero is) (an? [a-z ]{3,30}?) (?:named|called|who|that|and)\b")
NAME_IN_PROMPT = re.compile(r"(?<=[a-z,] )[A-Z][a-z]+")


def pick(choices: str, rng: random.Random) -> str:
    return rng.choice(re.split(r"[|\n]", choices))


def read_rows(path: Path, limit: int | None = None) -> list[Row]:
    """The rows of an xz-compressed JSON-lines file, or about `limit` of them, evenly spaced."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        lines = file.readlines()
    return [json.loads(line) for line in lines[:: max(1, len(lines) // limit) if limit else 1]]


def tidy_rows(rows: list[Row]) -> list[Row]:
    """The rows for the last part of the training: stories without the faults that can be counted, and all the rest."""
    stories = [set(re.findall(r"[a-z]+", r["assistant"].lower())) for r in rows if r["kind"] == "story"]
    counts = collections.Counter(word for story in stories for word in story)
    common = {word for word, count in counts.items() if count >= len(stories) // 520}
    stock = re.compile(r"surprise|guess what|so funny|laughed and laughed|the story|Title:")

    def is_tidy(user: str, text: str) -> bool:
        words = re.findall(r"[a-z]+", text.lower())
        names, named = set(NAME_IN_PROMPT.findall(user)), set(NAME_IN_PROMPT.findall(text))
        quads = collections.Counter(zip(words, words[1:], words[2:], words[3:], strict=False))
        sentences = re.split(r'(?<=[.!?])["\s]+', text)
        return (
            45 <= len(words) <= 160
            and not stock.search(text)
            and all(text.count(name) >= 2 for name in names)
            and len({name for name in named if name not in user}) <= (0 if names else 1)
            and (len(names) > 1 or {"he", "his"}.isdisjoint(words) or {"she", "her"}.isdisjoint(words))
            and sum(word not in common and word.capitalize() not in user for word in set(words)) <= 3
            and max(quads.values()) <= 3
            and len(set(words)) >= len(words) / 2
            and len(set(sentences)) == len(sentences)
        )

    return [r for r in rows if r["kind"] != "story" or is_tidy(r["user"], r["assistant"])]


@functools.cache
def other_names() -> tuple[list[str], list[str]]:
    """Girls' and boys' names, mostly ones that the corpus does not use."""
    girls, boys = (CORPUS / "names.txt").read_text().splitlines()
    return girls.split(), boys.split()


def plan_rows(rows: list[Row], share: float, seed: int) -> list[Row]:
    """The rows with about that share of the stories replaced by planned ones."""
    rng = random.Random(seed)
    kept = [row for row in rows if row["kind"] != "story" or rng.random() >= share]
    return kept + demo_stories.draw_rows(len(rows) - len(kept), seed)


def vary(row: Row, rng: random.Random) -> tuple[str, str]:
    """The row's user and assistant text; a row's story may get other names, its request another, shorter wording."""
    user, text = row["user"], row["assistant"]
    if row["kind"] == "story":
        names = set(NAME_IN_PROMPT.findall(user)) - {"Will"}  # "Will" also opens questions
        if names and rng.random() < 0.4:
            girls, boys = other_names()
            she, he = (re.search(rf"\b{pronoun}\b", text) for pronoun in ("she", "he"))
            pool = girls if she and not he else boys if he and not she else girls + boys
            other = dict(zip(sorted(names), rng.sample(pool, len(names)), strict=True))
            swap = re.compile(r"\b(" + "|".join(other) + r")\b")
            user, text = (swap.sub(lambda m: other[m[0]], s) for s in (user, text))
        draw, hero = rng.random(), HERO.search(user)
        if draw < 0.05:
            user = pick(FIRST_ASKS, rng)
        elif draw < 0.17 and hero:
            user = pick(ABOUT, rng).format(hero[1])
    if rng.random() < 0.1:
        user = user[0].lower() + user[1:].rstrip(".")
    return user, text


def compose(rows: list[Row], rng: random.Random) -> list[list[tuple[int, str]]]:
    """Documents, each a list of (role, text); the role STOP marks plain text.

    15 % of the documents that begin with a story are the bare story. Of the others, 8 % begin with a system line and
    20 % have two or three turns.
    """
    documents, i = [], 0
    while i < len(rows):
        if rows[i]["kind"] in STORIES and rng.random() < 0.15:
            documents.append([(STOP, vary(rows[i], rng)[1])])
            i += 1
            continue
        document = [(SYSTEM, pick(SYSTEM_LINES, rng))] if rng.random() < 0.08 else []
        num_turns = rng.choice((2, 3)) if rng.random() < 0.2 else 1
        for turn, row in enumerate(rows[i : i + num_turns]):
            user, text = vary(row, rng)
            if turn and row["kind"] in STORIES and rng.random() < 0.3:
                user = pick(NEXT_ASKS, rng)
            document += [(USER, user), (ASSISTANT, text)]
        documents.append(document)
        i += num_turns
    return documents


def build_stream(tokenizer_dir: Path, rows: list[Row], seed: int, planned: float) -> tuple[np.ndarray, np.ndarray]:
    """One pass over the rows as one long document stream: token ids [N] int32 and loss weights [N] float32.

    `planned` is the share of the stories that planned ones replace.
    """
    from tokenizers import Tokenizer

    bpe, rng = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json")), random.Random(seed)
    rows = plan_rows(rows, planned, seed)
    documents = compose(rng.sample(rows, len(rows)), rng)
    texts = [text for document in documents for _, text in document]
    encoded = iter(bpe.encode_batch_fast(texts, add_special_tokens=False))
    ids: list[int] = []
    weights: list[float] = []
    for document in documents:
        ids.append(START)
        weights.append(0.0)
        for role, _ in document:
            text_ids = next(encoded).ids
            said = 1.0 if role in (STOP, ASSISTANT) else PROMPT_WEIGHT
            if role == STOP:
                ids += text_ids
                weights += [said] * len(text_ids)
            else:  # the chat template writes the role token, the speaker writes the rest
                ids += [role, *text_ids, END]
                weights += [PROMPT_WEIGHT] + [said] * (len(text_ids) + 1)
        ids.append(STOP)
        weights.append(1.0 if document[0][0] == STOP else PROMPT_WEIGHT)
    return np.array(ids, np.int32), np.array(weights, np.float32)


def tokenizer(args: argparse.Namespace) -> None:
    """Train the byte-level BPE on the training rows; write the three tokenizer files."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    rows = read_rows(args.data / "train.jsonl.xz", args.limit)
    bpe.train_from_iterator((row[key] for row in rows for key in ("user", "assistant")), trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A", pair="<|startoftext|> $A $B", special_tokens=[("<|startoftext|>", START)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=SPECIAL[START],
        eos_token=SPECIAL[END],
        pad_token=SPECIAL[PAD],
        additional_special_tokens=[SPECIAL[i] for i in (STOP, SYSTEM, USER, ASSISTANT)],
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(str(args.out))


def model_config(vocab_size: int) -> MiniMaxConfig:
    """The architecture. Any block size computes the same function; 64 keeps the buffers that go into the file small."""
    from transformers import MiniMaxConfig

    return MiniMaxConfig(
        vocab_size=vocab_size, hidden_size=256, intermediate_size=320, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, hidden_act="silu", max_position_embeddings=2048, initializer_range=0.02,
        rms_norm_eps=1e-5, use_cache=True, tie_word_embeddings=True, sliding_window=None, attention_dropout=0.0,
        num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.01, router_jitter_noise=0.0,
        layer_types=(["linear_attention"] * 3 + ["full_attention"]) * 2, block_size=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        full_attn_alpha_factor=2.0, full_attn_beta_factor=1.0, linear_attn_alpha_factor=2.0,
        linear_attn_beta_factor=1.0, mlp_alpha_factor=2.0, mlp_beta_factor=1.0,
        pad_token_id=PAD, bos_token_id=START, eos_token_id=[END, STOP],
    )  # fmt: skip


def chunked_lightning(module: Any, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
    """`MiniMaxLightningAttention.forward` for whole rows without padding or cache; all blocks at once, states fp32.

    hidden_states [B, T, d], T a multiple of the block size m or shorter. S_n = sum_{j<n} e^{-s m (n-1-j)} K_j^T V_j.
    """
    import torch

    B, T, _ = hidden_states.shape
    H, D, m = module.num_attention_heads, module.head_dim, min(module.block_size, T)
    qkv = module.act_fn(module.qkv_proj(hidden_states)).view(B, T // m, m, H, 3 * D)
    q, k, v = qkv.permute(3, 0, 1, 2, 4).split(D, dim=-1)  # [H, B, N, m, D]
    slope = module.slope_rate[:, :, :, None, None]  # [H, 1, 1, 1, 1]
    position = torch.arange(1, m + 1, device=q.device, dtype=torch.float32)[:, None]
    intra = (q @ k.transpose(-1, -2)) * module.diagonal_decay[0, :, None, None, :m, :m]
    intra = intra.to(v.dtype) @ v
    states = (k * torch.exp(-slope * (m - position))).to(v.dtype).transpose(-1, -2) @ v  # [H, B, N, D, D]
    n = torch.arange(T // m, device=q.device)
    gap = (n[:, None] - 1 - n[None, :]).float()
    carry = torch.where(gap >= 0, torch.exp(-module.slope_rate * m * gap.clamp(min=0)), 0.0)  # [H, N, N]
    with torch.autocast(q.device.type, enabled=False):
        before = torch.einsum("hnj,hbjkv->hbnkv", carry, states.float())
    inter = (q * torch.exp(-slope * position)).to(v.dtype) @ before.to(v.dtype)
    out = (intra + inter).permute(1, 2, 3, 0, 4).reshape(B, T, H * D)
    gate = torch.sigmoid(module.output_gate(hidden_states))
    return module.out_proj(gate * module.norm(out)), None


def dense_experts(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """`MiniMaxExperts.forward` as two plain matrix products over all experts; those not chosen get weight 0."""
    import torch

    E, F, d = module.num_experts, module.intermediate_dim, module.hidden_dim
    gates = torch.zeros(hidden_states.shape[0], E, device=top_k_weights.device, dtype=top_k_weights.dtype)
    gates = gates.scatter(1, top_k_index, top_k_weights)
    gate, up = (hidden_states @ module.gate_up_proj.view(E * 2 * F, d).T).view(-1, E, 2, F).unbind(2)
    hidden = module.act_fn(gate) * up * gates[:, :, None].to(gate.dtype)
    return hidden.reshape(-1, E * F) @ module.down_proj.transpose(1, 2).reshape(E * F, d)


def prepare_for_training(model: Any) -> list[torch.Tensor]:
    """Put in the dense forms; return the list to which each forward pass adds its routers' logits [B*T, E]."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register("dense", dense_experts)
    model.config._experts_implementation = "dense"
    router_logits: list[torch.Tensor] = []
    for layer in model.model.layers:
        if layer.block_type == "linear_attention":
            layer.self_attn.forward = functools.partial(chunked_lightning, layer.self_attn)
        layer.mlp.gate.register_forward_hook(lambda _module, _args, output: router_logits.append(output[0]))
    return router_logits


def weighted_loss(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats; logits [B, T, V], targets and weights [B, T]."""
    from torch.nn.functional import cross_entropy

    losses = cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


def balance_loss(router_logits: list[torch.Tensor], top_k: int) -> torch.Tensor:
    """Switch Transformer's load-balancing loss (arXiv 2101.03961, equations 4 to 6), layer by layer; 1 is balance."""
    import torch

    total = router_logits[0].new_zeros((), dtype=torch.float32)
    for logits in router_logits:
        probs = logits.float().softmax(-1)
        chosen = torch.zeros_like(probs).scatter(1, probs.topk(top_k).indices, 1.0 / top_k)
        total = total + probs.shape[-1] * (chosen.mean(0) * probs.mean(0)).sum()
    return total / len(router_logits)


def save_model(parameters: dict[str, torch.Tensor], config: MiniMaxConfig, out: Path) -> None:
    """Write bf16 weights and both configurations. The decay buffers stay float32: a float32 load needs them exact."""
    import torch
    from transformers import GenerationConfig, MiniMaxForCausalLM

    model = MiniMaxForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(parameters[name])
    for layer in model.model.layers:
        if layer.block_type == "linear_attention":
            attention = layer.self_attn
            attention.slope_rate = attention.get_slope_rate()
            factors = attention.decay_factors(attention.slope_rate)
            attention.query_decay, attention.key_decay, attention.diagonal_decay = factors
    ids = {"bos_token_id": START, "eos_token_id": [END, STOP], "pad_token_id": PAD}
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.7, top_p=0.9, **ids)
    model.save_pretrained(str(out))


class Feed:
    """Packed batches without end. Worker processes shuffle, vary and encode the next parts while a part is read."""

    def __init__(self, args: argparse.Namespace, device: str, first_part: int) -> None:
        self.args, self.device, self.next_part = args, device, first_part
        self.rows, self.held_out = (read_rows(args.data / f"{s}.jsonl.xz", args.limit) for s in ("train", "heldout"))
        self.workers = ProcessPoolExecutor(NUM_WORKERS, multiprocessing.get_context("spawn"))
        self.tidy = self.workers.submit(tidy_rows, self.rows)
        self.pending: collections.deque[Future[tuple[np.ndarray, np.ndarray]]] = collections.deque()

    def part(self, progress: float) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches of the next eighth of the rows; late in the run, the parts then begun are of tidier rows."""
        args, late = self.args, progress > self.args.tidy_from
        rows, planned = (self.tidy.result(), args.planned_late) if late else (self.rows, args.planned)
        while len(self.pending) < NUM_WORKERS:
            number = self.next_part + len(self.pending)
            some, seed = rows[number % NUM_PARTS :: NUM_PARTS], args.seed * 1000 + number
            self.pending.append(self.workers.submit(build_stream, args.tokenizer, some, seed, planned))
        stream = self.pending.popleft().result()
        self.next_part += 1
        return self.batches(stream, np.random.default_rng([args.seed, self.next_part]))

    def batches(
        self, stream: tuple[np.ndarray, np.ndarray], order: np.random.Generator
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Token ids and loss weights, both [B, T + 1]: each row's last token is the next row's first."""
        import torch

        ids, weights = (torch.from_numpy(array).to(self.device) for array in stream)
        T, B = self.args.seq_len, self.args.batch_tokens // self.args.seq_len
        starts = order.permutation((len(ids) - 1) // T)
        for i in range(0, max(len(starts) - B + 1, 1), B):
            index = torch.from_numpy(starts[i : i + B, None] * T + np.arange(T + 1)).to(self.device)
            yield ids[index].long(), weights[index]

    def held_out_batches(self, rows: list[Row], num_batches: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        batches = self.batches(build_stream(self.args.tokenizer, rows, 0, 0.0), np.random.default_rng(0))
        return [batch for batch, _ in zip(batches, range(num_batches), strict=False)]


def train(args: argparse.Namespace) -> None:
    """Train for a number of steps or minutes; write the model, its tokenizer's files and training.json."""
    import torch
    from tokenizers import Tokenizer
    from transformers import MiniMaxForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    args.out.mkdir(parents=True, exist_ok=True)
    config = model_config(Tokenizer.from_file(str(args.tokenizer / "tokenizer.json")).get_vocab_size())
    model = MiniMaxForCausalLM(config).to(device).train()
    router_logits = prepare_for_training(model)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=device == "cuda")
    step, part, earlier, curve, checkpoint = 0, 0, 0.0, [], args.out / "checkpoint.pt"
    if args.resume:
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step, part, earlier, curve = (saved[key] for key in ("step", "part", "seconds", "curve"))
    feed = Feed(args, device, part)
    planned = demo_stories.draw_rows(len(feed.held_out), HELD_OUT_SEED)
    held_out = {"held_out": feed.held_out_batches(feed.held_out, 4), "planned": feed.held_out_batches(planned, 4)}
    start = last_save = time.time()

    def loss_on(ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        router_logits.clear()
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
            loss = weighted_loss(model.lm_head(hidden), ids[:, 1:], weights[:, 1:])
        return loss, balance_loss(router_logits, config.num_experts_per_tok)

    def progress() -> float:
        return step / args.steps if args.steps else (time.time() - start + earlier) / (60 * args.minutes)

    while progress() < 1:
        for batch in feed.part(progress()):
            if (done := progress()) >= 1:
                break
            for group in optimizer.param_groups:  # warm-up, then straight down to zero
                group["lr"] = args.lr * min(1.0, (step + 1) / args.warmup) * (1 - done)
            loss, balance = loss_on(*batch)
            (loss + config.router_aux_loss_coef * balance).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            seconds = time.time() - start + earlier
            if step % args.log_every == 0:
                with torch.no_grad():
                    held = {k: sum(loss_on(*b)[0].item() for b in some) / len(some) for k, some in held_out.items()}
                point = {"step": step, "train": loss.item(), **held, "balance": balance.item()}
                curve.append(point | {"seconds": round(seconds, 1)})
                print(f"part {feed.next_part} {curve[-1]}", flush=True)
            if time.time() - last_save > 120:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                torch.save(state | {"part": feed.next_part, "seconds": seconds, "curve": curve}, checkpoint)
                last_save = time.time()
    seconds, tokens = time.time() - start + earlier, step * args.batch_tokens
    feed.workers.shutdown(wait=False, cancel_futures=True)
    save_model(dict(model.named_parameters()), config, args.out)
    if args.out.resolve() != args.tokenizer.resolve():
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copyfile(args.tokenizer / name, args.out / name)
    summary = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "options": {k: v for k, v in vars(args).items() if k != "run" and not isinstance(v, Path)},
        "rows": len(feed.rows),
        "tidy_rows": len(feed.tidy.result()),
        "steps": step,
        "tokens": tokens,
        "parts": feed.next_part,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(tokens / seconds),
        "curve": curve,
    }
    (args.out / "training.json").write_text(json.dumps(summary, indent=1) + "\n")
    print({k: v for k, v in summary.items() if k != "curve"}, flush=True)


def load(model_dir: Path) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model in float32 and its tokenizer, as anyone would load them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).to(device).eval()
    return model, AutoTokenizer.from_pretrained(model_dir)


def evaluate(args: argparse.Namespace) -> None:
    """Held-out perplexity of what the assistant says, `<|end|>` included, one conversation at a time from its start.

    The held-out rows, and 500 planned stories (or as many as there are rows, if fewer) that are in no training.
    """
    import torch

    model, bpe = load(args.model)
    rows = read_rows(args.data / "heldout.jsonl.xz", args.limit)
    planned = demo_stories.draw_rows(min(len(rows), 500), HELD_OUT_SEED)
    sums: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0, 0])
    for row in rows + planned:
        user = {"role": "user", "content": row["user"]}
        prompt = bpe.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
        prompt_ids, answer_ids = (
            bpe(text, add_special_tokens=False)["input_ids"] for text in (prompt, row["assistant"] + SPECIAL[END])
        )
        ids = torch.tensor([prompt_ids + answer_ids], device=model.device)
        with torch.inference_mode():
            logits = model(ids[:, :-1], use_cache=False).logits[0, len(prompt_ids) - 1 :]
        nats = torch.nn.functional.cross_entropy(logits, ids[0, len(prompt_ids) :], reduction="sum").item()
        for kind in ("planned",) if row["kind"] == "planned" else ("all rows", row["kind"]):
            for i, value in enumerate((nats, len(answer_ids), len(row["assistant"]))):
                sums[kind][i] += value
    for kind, (nats, tokens, num_bytes) in sums.items():
        mean, bits = nats / tokens, nats / num_bytes / math.log(2)
        print(f"{kind}: {tokens} tokens, loss {mean:.4f}, perplexity {math.exp(mean):.3f}, {bits:.4f} bits per byte")


def plot(args: argparse.Namespace) -> None:
    """Draw the loss curve of training.json into loss.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curve = json.loads((args.model / "training.json").read_text())["curve"]
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for key, label in (("train", "training batch"), ("held_out", "held-out rows"), ("planned", "planned")):
        axes.plot([p["step"] for p in curve], [p[key] for p in curve], label=label, linewidth=1)
    axes.set(xlabel="step", ylabel="loss (nats per token)", ylim=(0, 3))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(args.model / "loss.png", dpi=110, bbox_inches="tight")


SAMPLE_PROMPTS = [
    "Tell me a short story about a brave little fox.",
    "Tell me a story.",
    "Write a short story for a child about a kind robot named Zara who finds a lost puppy in the park.",
    "Write a bedtime story about a sleepy bear who lives in a small village.",
    "Write a short story in which Tom and Lily meet at the beach. Tom is a pirate and Lily is a turtle.",
]


def samples(args: argparse.Namespace) -> None:
    """Five fixed prompts with seeds 1 to 5 at temperature 0.7, from a running server's chat endpoint, as Markdown."""
    for seed, prompt in enumerate(SAMPLE_PROMPTS, start=1):
        body = {"messages": [{"role": "user", "content": prompt}], "seed": seed, "temperature": 0.7, "max_tokens": 400}
        request = urllib.request.Request(
            f"{args.url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as response:
            answer = json.load(response)
        choice = answer["choices"][0]
        finish = "ended its turn" if choice["finish_reason"] == "stop" else "cut"
        print(f"**{prompt}** (seed {seed}, {answer['usage']['completion_tokens']} tokens, {finish})\n")
        print("\n".join(f"> {line}".rstrip() for line in choice["message"]["content"].split("\n")) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    def command(run: Any, **defaults: Any) -> Any:
        sub = commands.add_parser(run.__name__, help=run.__doc__, description=run.__doc__)
        sub.set_defaults(run=run)
        sub.add_argument("--data", type=Path, default=CORPUS, help="folder of train.jsonl.xz and heldout.jsonl.xz")
        sub.add_argument("--limit", type=int, help="use about this many rows")
        for name, default in defaults.items():
            sub.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
        return sub

    command(tokenizer, out=MODEL, vocab_size=4096)
    sub = command(
        train, out=MODEL, tokenizer=MODEL, seed=1, batch_tokens=32768, seq_len=2048, lr=3e-3, warmup=200, log_every=100
    )
    sub.add_argument("--minutes", type=float, default=5.0, help="time budget; the learning rate falls to 0 over it")
    sub.add_argument("--steps", type=int, help="a number of steps instead of a time budget")
    sub.add_argument("--tidy-from", type=float, default=0.45, help="share of the run after which rows must be tidy")
    sub.add_argument("--planned", type=float, default=0.6, help="share of planned stories among the stories")
    sub.add_argument("--planned-late", type=float, default=0.95, help="the same after --tidy-from")
    sub.add_argument("--resume", action="store_true", help="go on from OUT/checkpoint.pt, written every two minutes")
    for run in (evaluate, plot):
        command(run, model=MODEL)
    command(samples, url="http://127.0.0.1:8000")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
