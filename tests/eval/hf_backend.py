"""lm-eval's own `hf` backend, and requests, for comparisons on the same weights."""

import importlib.util
import random
import sys
import types

import torch
from lm_eval.api.instance import Instance
from transformers import AutoModelForCausalLM, AutoTokenizer

if importlib.util.find_spec("accelerate") is None:
    # It is imported there for models given by name; ours are given as objects.
    names = {"accelerate": ("Accelerator", "InitProcessGroupKwargs", "find_executable_batch_size"),
             "accelerate.utils": ("get_max_memory",)}
    for module, members in names.items():
        sys.modules[module] = types.SimpleNamespace(**dict.fromkeys(members))
    from lm_eval.models.huggingface import HFLM

    for module in names:
        del sys.modules[module]
else:
    from lm_eval.models.huggingface import HFLM

torch.set_num_threads(1)

MAX_LENGTH = 64
"""Of both backends, short so that texts are cut."""
OPTIONS = dict(max_length=MAX_LENGTH, batch_tokens=256, slots=2)
"""Of ours: shapes that compile fast."""


def hf_backend(path, **options):
    """The backend on the weights of a directory, float32, on the CPU."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return HFLM(model, tokenizer=AutoTokenizer.from_pretrained(path), **options)


def instances(kind, args):
    return [Instance(kind, {}, arg, i) for i, arg in enumerate(args)]


WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "é", "漢字", "🦊", "naïve", "42", "Paris"]


def text(draw, least, most):
    return " ".join(draw.choice(WORDS) for _ in range(draw.randint(least, most)))


def scored_pairs(count, seed=0):
    """(context, continuation): multiple choice, one-token answers, empty and long contexts, spaces at the seam, bos
    written out, requests that come twice."""
    draw = random.Random(seed)
    pairs = []
    while len(pairs) < count:
        kind = draw.randrange(7)
        context = text(draw, 1, 12)
        answers = [" " + text(draw, 1, 5) for _ in range(draw.randint(1, 5))]
        match kind:
            case 0:
                context = ""
                answers = [answers[0].strip(), answers[0], "<|startoftext|>" + answers[0]]
            case 1:
                context = text(draw, 20, 60)
            case 2:
                context += draw.choice([" ", "  ", "\n", " \n "])
                answers = [answer.strip() for answer in answers]
            case 3:
                context = "<|startoftext|>" + context
            case 4:
                answers = [" the", " fox", " dog", " over", " the"]
            case 5:
                answers = [" " + text(draw, 8, 12)]
        pairs += [(context, answer) for answer in answers]
    return pairs[:count]
