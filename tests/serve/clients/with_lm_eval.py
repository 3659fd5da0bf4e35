"""lm-evaluation-harness: `local-completions` scores and generates, `local-chat-completions` generates."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from ways import BASE, KEY, MODEL, run

HOME = Path(tempfile.mkdtemp())
os.environ |= {"OPENAI_API_KEY": KEY, "HF_HOME": str(HOME / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
TASK = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(HOME / "rows.jsonl")}},
        "test_split": "test", "doc_to_text": "{{question}}", "num_fewshot": 0}
TASKS = {
    "choose": {"output_type": "multiple_choice", "doc_to_choice": [" quick brown fox", " lazy dog"],
               "doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc"}]},
    "roll": {"output_type": "loglikelihood_rolling", "doc_to_target": "{{question}}",
             "metric_list": [{"metric": "word_perplexity"}]},
    "say": {"output_type": "generate_until", "doc_to_target": "the quick brown fox",
            "generation_kwargs": {"until": [" jumps"], "max_gen_toks": 16}, "metric_list": [{"metric": "exact_match"}]},
}
(HOME / "rows.jsonl").write_text("".join(
    json.dumps({"question": question, "answer": 0}) + "\n" for question in ("Say the", "Once more: the", "the")))
for name, task in TASKS.items():
    (HOME / f"{name}.yaml").write_text(json.dumps(TASK | task | {"task": name}))  # JSON is YAML.


def measured(kind, path, task, *more):
    """The task's metrics."""
    arguments = f"model={MODEL},base_url={BASE}{path},max_retries=1,max_length=1024"
    if kind == "local-completions":
        arguments += f",tokenizer={os.environ['LFM_TOKENIZER']}"
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", "--model", kind, "--model_args", arguments, "--tasks", task, "--include_path",
         str(HOME), "--output_path", str(HOME / "out.json"), *more], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]
    [path] = HOME.rglob("out*.json")
    found = json.loads(path.read_text())["results"][task]
    path.unlink()
    return found


def loglikelihood():
    assert measured("local-completions", "/completions", "choose")["acc,none"] == 1
    assert measured("local-completions", "/completions", "choose", "--batch_size", "4")["acc,none"] == 1


def loglikelihood_rolling():
    assert measured("local-completions", "/completions", "roll")["word_perplexity,none"] > 1


def generate_until():
    assert "exact_match,none" in measured("local-completions", "/completions", "say")


def chat_generate_until():
    found = measured("local-chat-completions", "/chat/completions", "say", "--apply_chat_template")
    assert found["exact_match,none"] == 1


run(loglikelihood, loglikelihood_rolling, generate_until, chat_generate_until)
