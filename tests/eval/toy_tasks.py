"""Small tasks of lm-eval over files on disk, one of each kind of request."""

import json

TASKS = {
    "toy_choice": """
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list:
  - metric: acc
  - metric: acc_norm
""",
    "toy_text": """
output_type: generate_until
doc_to_text: "{{question}}\\n"
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["\\n", "o"], max_gen_toks: 8}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
""",
    "toy_perplexity": """
output_type: loglikelihood_rolling
num_fewshot: 0
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
""",
}
DATA = """
test_split: test
fewshot_split: test
dataset_path: json
"""


def rows(count=8):
    animals = ["fox", "dog", "é dog", "lazy fox"]
    return [{"question": f"What jumps over the {animals[i % 4]} number {i}?", "label": i % 3,
             "choices": [f"the {animals[i % 4]}", "brown", "the quick 漢字"]} for i in range(count)]


def toy_tasks(folder, data="test.jsonl"):
    """The directory of the tasks, with their data beside them."""
    path = folder / data
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\n{DATA.strip()}\ndataset_kwargs: {{data_files: {{test: {path}}}}}{text}")
    return folder
