"""Measure speculative decoding by prompt lookup, on answers that repeat their prompts and on one that does not.

    python -P benchmarks/prompt_lookup.py --model benchmarks/configs/dense --load-format dummy

Random weights say nothing that repeats a prompt, so the answers are scripted: the logits of the token that is to come
are raised, within the model, and everything else is computed as ever. So steps cost what they cost, and drafts are
right as often as prompt lookup is right on these texts:

- edit: the prompt is a source file of this project, the answer the same file with a name changed throughout;
- extract: the answer is every line of it that defines something;
- random: random tokens, where no draft is ever right, and what trying costs shows.

One stream, greedy, each task with drafts and without in the same run. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from leyden.benchmarks.load.machine import hardware, software
from leyden.configs.sources import load_settings
from leyden.engine.core import EngineCore
from leyden.engine.messages import AddRequest
from leyden.engine.sampling_params import SamplingParams
from leyden.engine.text.tokenizer import Tokenizer
from leyden.models.decoder import Decoder
from leyden.models.forward_batch import ForwardBatch
from leyden.models.loading.checkpoint import resolve
from leyden.models.mixers.cache import LayerCache
from torch import Tensor

SOURCE = Path(__file__).resolve().parent.parent / "engine" / "scheduling" / "scheduler.py"
RAISED = 1e4  # by which the scripted token's logit exceeds all others
MAX_LENGTH = 16384
script = torch.zeros(0, dtype=torch.int64)  # [MAX_LENGTH] on the device: the token at each position


def install_script() -> None:
    """Let every model raise the logits of `script`, in graphs too."""
    forward, compute_logits = Decoder.forward, Decoder.compute_logits
    positions: list[Tensor] = []

    def scripted_forward(self: Decoder, batch: ForwardBatch, caches: list[LayerCache]) -> Tensor:
        positions[:] = [batch.positions[batch.logits_indices] if batch.num_prefills else batch.positions]
        return forward(self, batch, caches)

    def scripted_logits(self: Decoder, h: Tensor) -> Tensor:
        logits = compute_logits(self, h)
        after = script.to(logits.device)[positions[0] + 1]
        return logits.scatter_add_(1, after[:, None], torch.full_like(logits[:, :1], RAISED))

    Decoder.forward = scripted_forward  # type: ignore[method-assign]
    Decoder.compute_logits = scripted_logits  # type: ignore[method-assign]


def main() -> int:
    arguments = parse_arguments()
    global script
    device = "cuda" if torch.cuda.is_available() else "cpu"
    script = torch.zeros(MAX_LENGTH, dtype=torch.int64, device=device)
    install_script()
    tasks = make_tasks(arguments.answer_tokens)
    results: dict[str, dict[str, Any]] = {name: {} for name in tasks}
    for label, drafts in (("off", 0), ("on", arguments.speculative_tokens)):
        core = make_core(arguments, drafts)
        for name, (prompt, answer) in tasks.items():
            results[name][label] = measure(core, prompt, answer, arguments.repeats)
        del core
        gc.collect()
    report = {
        "model": str(arguments.model),
        "hardware": hardware(),
        "software": software(),
        "speculative_tokens": arguments.speculative_tokens,
        "linear_backend": arguments.linear_backend,
        "tasks": results,
    }
    show(report)
    if arguments.out:
        arguments.out.write_text(json.dumps(report) + "\n")
    print(json.dumps(report))
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="folder, hub id or demo")
    parser.add_argument("--load-format", default="auto", help="dummy = random weights")
    parser.add_argument("--linear-backend", default="auto", help="as for the server")
    parser.add_argument("--speculative-tokens", type=int, default=7, help="most drafts in a step")
    parser.add_argument("--answer-tokens", type=int, default=1024, help="of each task, at most")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each; the median counts")
    parser.add_argument("--out", type=Path, default=None, help="also write the JSON here")
    return parser.parse_args()


def make_tasks(length: int) -> dict[str, tuple[list[int], list[int]]]:
    """(prompt, answer) of each task in token ids, of the embedded model's tokenizer."""
    tokenizer = Tokenizer(resolve("demo"))
    source = SOURCE.read_text()
    edited = source.replace("sequence", "stream").replace("Sequence", "Stream")
    lines = [line for line in source.splitlines(keepends=True) if line.lstrip().startswith(("def ", "class "))]
    prompt = tokenizer.encode(source)[: MAX_LENGTH // 2]
    rng = random.Random(0)
    answers = {
        "edit": tokenizer.encode(edited)[:length],
        "extract": tokenizer.encode("".join(lines))[:length],
        "random": [rng.randrange(max(prompt)) for _ in range(length)],
    }
    return {name: (prompt, answer) for name, answer in answers.items()}


def make_core(arguments: argparse.Namespace, drafts: int) -> EngineCore:
    settings = {
        "model": arguments.model,
        "load_format": arguments.load_format,
        "linear_backend": arguments.linear_backend,
        "max_num_seqs": "1",
        "max_num_batched_tokens": "8192",
        "prefix_cache": "false",
        "speculative_tokens": str(drafts),
    }
    core = EngineCore(load_settings(settings).engine())
    gc.collect()
    gc.freeze()
    return core


def measure(core: EngineCore, prompt: list[int], answer: list[int], repeats: int) -> dict[str, Any]:
    """Answer tokens per second from the first token on, median of the runs."""
    prompt = prompt[: core.max_model_len - len(answer)]
    script[: len(prompt) + len(answer)] = torch.tensor(prompt + answer, device=script.device)
    before = core.stats()
    rates = [run(core, prompt, answer) for _ in range(repeats + 1)][1:]
    after = core.stats()
    drafted = after.draft_tokens_total - before.draft_tokens_total
    accepted = after.accepted_tokens_total - before.accepted_tokens_total
    return {
        "prompt_tokens": len(prompt),
        "answer_tokens": len(answer),
        "tokens_per_s": round(statistics.median(rates), 1),
        "all_tokens_per_s": [round(rate, 1) for rate in rates],
        "tokens_per_step": round((repeats + 1) * len(answer) / (after.steps_total - before.steps_total), 2),
        "accepted_share": round(accepted / drafted, 3) if drafted else None,
    }


def run(core: EngineCore, prompt: list[int], answer: list[int]) -> float:
    params = SamplingParams(temperature=0.0, max_tokens=len(answer), ignore_eos=True)
    core.add_request(AddRequest(request_id="task", prompt_token_ids=prompt, sampling_params=params))
    said: list[int] = []
    first = 0.0
    while core.has_work:
        for output in core.step():
            first = first or time.perf_counter()
            said += output.token_ids
    seconds = time.perf_counter() - first
    if said != answer:
        raise SystemExit("the model did not keep to its script")
    return (len(answer) - 1) / seconds


def show(report: dict[str, Any]) -> None:
    print(f"\n{report['model']} on {report['hardware']}, one stream, {report['linear_backend']}")
    for name, task in report["tasks"].items():
        on, off = task["on"], task["off"]
        print(
            f"{name:8} {off['tokens_per_s']:8.1f} -> {on['tokens_per_s']:8.1f} tokens/s, "
            f"{on['tokens_per_s'] / off['tokens_per_s']:.2f}x; {on['tokens_per_step']} tokens per step, "
            f"accepted {on['accepted_share']}"
        )


if __name__ == "__main__":
    sys.exit(main())
