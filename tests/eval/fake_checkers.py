"""Small packages with the names and functions of those whose checkers `lfm eval` runs, and documents of their own."""

import json

from lfm_jax.eval.benchmarks.bfcl import CATEGORIES

PROMPTS = [
    {"key": "0", "prompt": "Say fox and dog.", "instruction_id_list": ["say", "say"],
     "kwargs": [{"word": "fox", "unused": None}, {"word": "dog", "unused": None}]},
    {"key": "1", "prompt": "Say fox, and raise.", "instruction_id_list": ["say", "raise"],
     "kwargs": [{"word": "fox"}, {}]},
    {"key": "2", "prompt": "Say dog below.", "instruction_id_list": ["say"], "kwargs": [{"word": "dog"}]},
]
IFBENCH = '''
import dataclasses
import os
import time

import nltk
from spacy.cli import download

download("a_model")
nltk.download("some_data")
print("what a package prints")


@dataclasses.dataclass
class InputExample:
    key: int
    instruction_id_list: list
    prompt: str
    kwargs: list


def _check(told, reply):
    (name,), (options,) = told.instruction_id_list, told.kwargs
    if name == "die":
        os._exit(3)
    if reply == "for ever":
        time.sleep(3600)
    if name == "raise":
        raise LookupError("no\\ndata")
    followed = reply.startswith(options["word"])
    return type("Output", (), {"follow_instruction_list": [followed]})


def test_instruction_following_strict(told, replies):
    return _check(told, replies[told.prompt])


def test_instruction_following_loose(told, replies):
    return _check(told, replies[told.prompt].partition("\\n")[2] or replies[told.prompt])
'''
BFCL = '''
import time

from bfcl_eval.constants.enums import Language
from bfcl_eval.constants.model_config import MODEL_CONFIG_MAPPING


def ast_checker(functions, calls, ground_truth, language, category, model):
    assert language is Language.PYTHON and MODEL_CONFIG_MAPPING[model].underscore_to_dot
    if any("animals_sleep" in call for call in calls):
        time.sleep(3600)
    if any("raises" in call for call in calls):
        raise TypeError("a fault of the checker")
    right = [{name.replace(".", "_"): value for name, value in call.items()} for call in ground_truth]
    return {"valid": calls == right, "error_type": "other_calls"}
'''
FUNCTION = {"name": "animals.jump", "description": "Jumps.", "parameters": {
    "type": "dict", "required": ["who"], "properties": {
        "who": {"type": "string", "enum": ["fox", "dog"]},
        "height": {"type": "float", "description": "In metres."},
        "more": {"type": "array", "items": {"type": "tuple", "items": {"type": "any"}}},
    }}}


def documents(category):
    """Two for each category."""
    return [{"id": f"{category}_{i}", "question": [[{"role": "user", "content": f"Let the {animal} jump."}]],
             "function": [FUNCTION]} for i, animal in enumerate(("fox", "dog"))]


def fake_packages(folder):
    """Writes the packages into a folder, for PYTHONPATH."""
    files = {
        "nltk.py": "def download(name): raise OSError('nothing may be fetched')",
        "ifbench/__init__.py": "",
        "ifbench/evaluation_lib.py": IFBENCH,
        "ifbench/data/IFBench_test.jsonl": lines(PROMPTS),
        "bfcl_eval/__init__.py": "",
        "bfcl_eval/constants/__init__.py": "",
        "bfcl_eval/constants/enums.py": "import enum\nclass Language(enum.Enum):\n    PYTHON = 1\n",
        "bfcl_eval/constants/model_config.py": "import the_clients_of_every_api",
        "bfcl_eval/constants/type_mappings.py": "GORILLA_TO_OPENAPI = " + repr({
            "dict": "object", "string": "string", "float": "number", "array": "array", "tuple": "array"}),
        "bfcl_eval/eval_checker/ast_eval/ast_checker.py": BFCL,
    }
    for category in CATEGORIES:
        name = f"BFCL_v4_{category}.json"
        files[f"bfcl_eval/data/{name}"] = lines(documents(category))
        if "relevance" not in category:
            files[f"bfcl_eval/data/possible_answer/{name}"] = lines([
                {"id": f"{category}_{i}", "ground_truth": [{"animals.jump": {"who": who}}]}
                for i, who in enumerate(("fox", "dog"))])
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)
