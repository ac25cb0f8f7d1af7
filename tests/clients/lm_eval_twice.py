"""Three tasks by lm-eval, over HTTP and by transformers itself. Run by the clients' Python: URL MODEL TASKS.

Prints one JSON object: {task: {"http": {metric: value}, "transformers": {..}}}.
"""

from __future__ import annotations

import json
import os
import sys

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import lm_eval
from lm_eval.tasks import TaskManager

TASKS = ["leyden_choice", "leyden_perplexity", "leyden_generation"]


def main() -> None:
    url, folder, tasks = sys.argv[1:]
    served = {
        "model": "local-completions",
        "model_args": {
            "model": "demo",
            "base_url": f"{url}/v1/completions",
            "tokenizer": folder,
            "tokenizer_backend": "huggingface",
            "num_concurrent": 4,
            "add_bos_token": True,
            "max_length": 512,
        },
    }
    own = {
        "model": "hf",
        "model_args": {
            "pretrained": folder,
            "dtype": "float32",
            "device": "cpu",
            "add_bos_token": True,
            "max_length": 512,
        },
    }
    report: dict[str, dict[str, object]] = {task: {} for task in TASKS}
    for name, how in (("http", served), ("transformers", own)):
        manager = TaskManager(include_path=tasks, include_defaults=False)
        result = lm_eval.simple_evaluate(**how, tasks=TASKS, task_manager=manager, batch_size=1, log_samples=True)
        for task in TASKS:
            metrics = {key: value for key, value in result["results"][task].items() if isinstance(value, float)}
            answers = [sample["filtered_resps"] for sample in result["samples"][task]]
            report[task][name] = {"metrics": metrics, "answers": answers}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
