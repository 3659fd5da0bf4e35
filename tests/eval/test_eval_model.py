"""`EvalModel` answers what lm-eval's own `hf` backend answers on the same weights."""

import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from hf_backend import OPTIONS, instances, scored_pairs, text
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from toy_tasks import TASKS, toy_tasks

import lfm_jax as lfm
from lfm_jax.eval import EvalModel
from lfm_jax.eval.answers import keep_answers, model_hash


@pytest.mark.parametrize("count", [60, pytest.param(500, marks=pytest.mark.long)])
def test_log_probabilities_and_greedy_flags(count, ours, theirs):
    pairs = scored_pairs(count)
    assert max(len(theirs.tok_encode(context)) for context, _ in pairs) > theirs.max_length
    requests = instances("loglikelihood", pairs)
    found, wanted = ours.loglikelihood(requests), theirs.loglikelihood(requests, disable_tqdm=True)
    np.testing.assert_allclose([x for x, _ in found], [x for x, _ in wanted], atol=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]


def test_greedy_continuations_and_nearly_greedy_ones(ours, theirs):
    requests = []
    for seed in range(6):
        context = theirs.tok_encode(text(random.Random(seed), 3, 9))
        out = theirs.model.generate(torch.tensor([context]), do_sample=False, max_new_tokens=1 + seed)
        greedy = out[0, len(context) :].tolist()
        requests += [(None, context, greedy), (None, context, [*greedy[:-1], greedy[-1] - 1])]
    found = ours._loglikelihood_tokens(requests)
    wanted = theirs._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted] == [True, False] * 6
    np.testing.assert_allclose([x for x, _ in found], [x for x, _ in wanted], atol=1e-4)


@pytest.mark.parametrize("count", [6, pytest.param(50, marks=pytest.mark.long)])
def test_whole_texts_in_windows(count, ours, theirs):
    draw = random.Random(1)
    texts = ["", "fox", *(text(draw, 20 * i, 40 * i) for i in range(1, count))]
    assert len(theirs.tok_encode(texts[-1])) > 2 * theirs.max_length
    requests = instances("loglikelihood_rolling", [(each,) for each in texts])
    found, wanted = ours.loglikelihood_rolling(requests), theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=1e-6)


@pytest.mark.parametrize("count", [12, pytest.param(100, marks=pytest.mark.long)])
def test_generated_texts(count, ours, theirs):
    draw = random.Random(2)
    # `hf` also stops at a letter in the name of a special token, which it then leaves out of the text: avoid those.
    stops = [[], ["z"], ["\n", "U"], ["�"], ["<|im_end|>"], ["\x0e", "Q"], "k", ["<|fim_pre|>"]]
    args = []
    for i in range(count):
        options = {"until": draw.choice(stops), "max_gen_toks": draw.choice([1, 7, 30]), "do_sample": False}
        args.append((text(draw, 1, 40 if i % 4 else 80), options))
    args[0] = (args[0][0], {"until": ["x"], "max_new_tokens": 9})
    requests = instances("generate_until", args)
    found, wanted = ours.generate_until(requests), theirs.generate_until(requests, disable_tqdm=True)
    assert found == wanted
    assert len({len(each) for each in found}) > 3


def test_chat_templates(ours, theirs):
    chats = [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi "}],
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The fox"}],
    ]
    for chat in chats:
        for opened in (True, False):
            rendered = ours.apply_chat_template(chat, add_generation_prompt=opened)
            assert rendered == theirs.apply_chat_template(chat, add_generation_prompt=opened)
            assert ours.tok_encode(rendered) == theirs.tok_encode(rendered)
            assert ours.tok_encode(rendered).count(ours.prefix_token_id) == 1
    assert ours.chat_template(True) == theirs.chat_template(True)
    assert ours.chat_template(False) is None
    with pytest.raises(ValueError, match="no chat template 'rag'"):
        ours.chat_template("rag")


def test_a_template_without_system_messages_is_tried_without_them(loaded, ours, caplog):
    template = ("{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
                "{{ messages[-1].content }}")
    model = EvalModel(*loaded, template, max_length=64)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert model.apply_chat_template(chat) == "Hi"
    assert "without the system message" in caplog.text
    with pytest.raises(ValueError, match="template"):
        EvalModel(*loaded, "{{ raise_exception('never') }}", max_length=64).apply_chat_template(chat)
    assert model.tokenizer_name != ours.tokenizer_name


@pytest.mark.parametrize("chat", [False, True])
def test_whole_tasks(chat, ours, theirs, tmp_path):
    """Scores, standard errors and samples of tasks over local files."""
    folder = toy_tasks(tmp_path)
    found, wanted = (simple_evaluate(
        model, tasks=list(TASKS), task_manager=TaskManager(include_path=folder, include_defaults=False), num_fewshot=2,
        apply_chat_template=chat, system_instruction="Think of foxes." if chat else None, bootstrap_iters=100, limit=6,
    ) for model in (ours, theirs))
    assert found["results"].keys() == set(TASKS)
    for task, metrics in wanted["results"].items():
        for name, value in metrics.items():
            same = pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
            assert found["results"][task][name] == same, (task, name)
        for one, other in zip(found["samples"][task], wanted["samples"][task], strict=True):
            assert one["prompt_hash"] == other["prompt_hash"]
            assert one["metrics"] == other["metrics"]


def test_answers_are_given_to_lm_evals_cache_too(ours):
    kept = {}

    class Hook:
        def add_partial(self, kind, request, answer):
            kept[kind, str(request)] = answer

    old = ours.cache_hook
    ours.set_cache_hook(Hook())
    try:
        [score] = ours.loglikelihood(instances("loglikelihood", [("the", " fox")]))
        [total] = ours.loglikelihood_rolling(instances("loglikelihood_rolling", [("the fox",)]))
        args = ("the fox", {"until": [], "max_gen_toks": 3})
        [reply] = ours.generate_until(instances("generate_until", [args]))
    finally:
        ours.set_cache_hook(old)
    assert kept == {("loglikelihood", "('the', ' fox')"): score, ("loglikelihood_rolling", "('the fox',)"): total,
                    ("generate_until", str(args)): reply}


def test_what_was_answered_before_is_not_asked_again(loaded, tmp_path, monkeypatch):
    pairs = instances("loglikelihood", scored_pairs(9))
    texts = instances("generate_until", [("the", {"until": ["x"], "max_gen_toks": 5}),
                                         ("fox", {"do_sample": True, "temperature": 3.0, "max_gen_toks": 8})] * 2)
    of = {"model": model_hash(loaded[0])}
    with keep_answers(tmp_path / "answers.jsonl", of) as answers:
        model = EvalModel(*loaded, **OPTIONS, answers=answers)
        first = model.loglikelihood(pairs[:5]), model.generate_until(texts[:2])
    lines = (tmp_path / "answers.jsonl").read_bytes()
    (tmp_path / "answers.jsonl").write_bytes(lines[:-9])  # Killed while it wrote.
    with keep_answers(tmp_path / "answers.jsonl", of) as answers:
        model = EvalModel(*loaded, **OPTIONS, answers=answers)
        second = model.loglikelihood(pairs), model.generate_until(texts)
    assert second[0][:5] == first[0]
    assert second[1][:2] == first[1]
    assert second[1][0] == second[1][2]
    assert second[1][1] != second[1][3]  # Asked for twice, drawn twice.
    with keep_answers(tmp_path / "answers.jsonl", of) as answers:
        model = EvalModel(*loaded, **OPTIONS, answers=answers)
        monkeypatch.setattr(model._scorer, "_on_copy",
                            lambda _, batches: pytest.fail("asked again") if batches else iter(()))
        assert (model.loglikelihood(pairs), model.generate_until(texts)) == second


def test_one_hash_for_a_model_in_any_process(loaded, directory):
    model, _ = loaded
    found = [model_hash(each) for each in (model, lfm.quantize(model, "int8"), lfm.quantize(model, "w8a8"))]
    assert len(set(found)) == 3
    code = (f"import lfm_jax as lfm\nfrom lfm_jax.eval.answers import model_hash\n"
            f"print(model_hash(lfm.load({str(directory)!r}, quantize='w8a8')[0]))")
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == found[2:]


@pytest.mark.parametrize(("options", "message"), [
    ({"max_gen_toks": 64}, "max_gen_toks is 64, which leaves no room"),
    ({"num_beams": 4}, r"generation kwargs \{'num_beams': 4\} are not supported"),
    ({"do_sample": True, "temperature": 1.0, "top_p": 2.0, "max_gen_toks": 4}, "top_p is 2.0"),
])
def test_generation_kwargs_that_cannot_run(options, message, ours):
    with pytest.raises(ValueError, match=message):
        ours.generate_until(instances("generate_until", [("fox", options)]))


def test_nothing_needs_torch(directory):
    code = ("import sys\n"
            "for name in ('torch', 'transformers', 'accelerate'): sys.modules[name] = None\n"
            "import lfm_jax as lfm\n"
            "from lfm_jax.eval import EvalModel\n"
            "from lm_eval.api.instance import Instance\n"
            f"model = EvalModel(*lfm.load({str(directory)!r}), max_length=64, batch_tokens=256)\n"
            "print(model.loglikelihood([Instance('loglikelihood', {}, ('the', ' fox'), 0)])[0][1])\n"
            "sys.modules['lm_eval'] = None\n"
            "import lfm_jax.eval\n"
            "del lfm_jax.eval.EvalModel\n"
            "sys.modules.pop('lm_eval.api.model')\n"
            "try: lfm_jax.eval.EvalModel\n"
            "except ImportError as error: print(error)\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith("is not installed: pip install 'lfm_jax[eval]'")
    assert done.stdout.splitlines()[0] in ("True", "False")
