"""Scores texts by lm-eval's `local-completions`. Run by the Python of the foreign clients; prints one JSON object."""

import json
import sys
from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

url, model, tokenizer, folder = sys.argv[1:]
documents = [
    {"context": "Once upon a time there was a fox", "choices": [" who lived in the forest.", " lantern lantern."]},
    {"context": "The owl gave the lantern to the", "choices": [" fox.", " badger, and the badger was glad."]},
]
data = Path(folder) / "documents.jsonl"
data.write_text("".join(json.dumps(document) + "\n" for document in documents))
task = {
    "task": "attendant_choices",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": str(data)}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{context}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": 0,
    "target_delimiter": "",
    "metric_list": [{"metric": "acc"}],
}
results = simple_evaluate(
    model="local-completions",
    model_args={
        "model": model,
        "base_url": f"{url}/v1/completions",
        "tokenizer": tokenizer,
        "tokenizer_backend": "huggingface",
        "num_concurrent": 2,
        "max_length": 1024,
    },
    tasks=[task],
    task_manager=TaskManager(),
    bootstrap_iters=0,
    log_samples=True,
)
samples = results["samples"]["attendant_choices"]
print(
    json.dumps(
        [
            {"context": sample["doc"]["context"], "choice": choice, "logprob": float(resp[0][0])}
            for sample in samples
            for choice, resp in zip(sample["doc"]["choices"], sample["resps"], strict=True)
        ]
    )
)
