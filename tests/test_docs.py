"""What README.md and docs/ say holds: their code runs, their links lead somewhere, and the files they name exist.

Blocks of Python run in order in one namespace a page; `lfm` commands run in this process, on a tiny model under the
name of the published one, which lies in the cache of the Hub too; recipes are read. A block that is not run says why
in a comment above it.
"""

import io
import json
import re
import shlex
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jsonschema
import numpy as np
import pytest
import tokenizers
import transformers
import yaml
from flax import nnx
from huggingface_hub import constants
from safetensors.numpy import save_file

import lfm_jax as lfm
from lfm_jax.ablate.schedule import AblateConfig
from lfm_jax.cli import main
from lfm_jax.cli.verbs import find
from lfm_jax.post.config import TuneCommand, TuneConfig
from lfm_jax.pretrain.config import TrainConfig
from lfm_jax.recipe import load_recipe
from lfm_jax.serve.protocol import ChatBody
from lfm_jax.structured.grammar import grammar_tokenizer
from lfm_jax.testing import tiny_model, tiny_tokenizer
from lfm_jax.text.chat import turn_stop_ids

ROOT = Path(__file__).parent.parent
PAGES = sorted(page.relative_to(ROOT).as_posix() for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
CHECKPOINT = "LFM2.5-350M"
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<why>[^>]+) -->\n)?^```(?P<language>\S*)[^\n]*\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
RUN = ("python", "bash", "yaml")
"""Languages of blocks that run or are read, unless they say why not."""
SHORTER = {
    "train": ["--steps", "2", "--optimizer.warmup-steps", "0", "--optimizer.decay-steps", "1", "--model.vocab-size",
              "400", "--model.layer-types", "conv", "full_attention", "--data.seq-len", "64",
              "--data.heldout-fraction", "0.26"],
    "tune": ["--steps", "2", "--data.seq-len", "512"],
    "generate": ["--max-new-tokens", "4"],
    "chat": ["--max-new-tokens", "4"],
    "eval": ["--limit", "1", "--slots", "1"],
    "batch": ["--engine.slots", "1", "128", "--engine.chunk", "64", "--engine.max-logprobs", "0"],
}
"""Flags behind those of a command that make it quick; the command is otherwise as it stands."""


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    text: str
    why: str | None
    """Why it is not run."""


def blocks(page):
    found = [Block(m["language"], m["text"], m["why"]) for m in BLOCK.finditer((ROOT / page).read_text())]
    return [block for block in found if not block.language.startswith("{")]  # Directives of the site.


def commands(text):
    """The commands of a block, prompts and comments left out."""
    lines = [line.removeprefix("$ ") for line in text.replace("\\\n", "").splitlines()]
    return [found for line in lines if (found := shlex.split(line, comments=True))]


def holding(language):
    return [page for page in PAGES if any(block.language == language for block in blocks(page))]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A working directory with what the pages take for granted: weights, texts, recipes, requests, a finished run."""
    path = tmp_path_factory.mktemp("desk")
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=tokenizer.get_vocab_size(), layer_types=("conv", "full_attention"), init_std=0.05,
                       ffn_size=64)
    lfm.save_hf(model, path / CHECKPOINT, tokenizer=tokenizer)
    save_encoders(path)
    for subject in ("maths", "code"):
        (path / f"{CHECKPOINT}-{subject}").symlink_to(path / CHECKPOINT)
    cached = path / "hub" / f"models--LiquidAI--{CHECKPOINT}"
    for folder in ("refs", "snapshots"):
        (cached / folder).mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots" / ("0" * 40)).symlink_to(path / CHECKPOINT)
    (path / "configs").symlink_to(ROOT / "configs")
    (path / "my_texts").mkdir()
    for i in range(10):
        (path / "my_texts" / f"{i}.txt").write_text(f"Once upon a time there were {i} little pigs.\n" * 40)
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    request = {"custom_id": "1", "url": "/v1/chat/completions", "body": body}
    (path / "requests.jsonl").write_text(json.dumps(request))
    (path / "documents.txt").write_text("Paris is the capital of France.\nWhales are mammals.\n")
    (path / "person.json").write_text(json.dumps({"enum": ["Ada", "Alan"]}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setenv("XDG_CACHE_HOME", str(path))
        patch.setattr(constants, "HF_HUB_CACHE", str(path / "hub"))
        assert status(["train", "configs/demo.yaml", "--run-dir", "runs/mine", "--data.sources", "my_texts"]) == 0
        yield path


def save_encoders(path):
    """One with a vector for a text, one with a vector for each token."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([tokenizers.AddedToken(prefix, normalized=False) for prefix in ("[Q] ", "[D] ")])
    encoder = tiny_model(vocab_size=tokenizer.get_vocab_size(), causal=False)
    for name in ("Embedding", "ColBERT"):
        lfm.save_hf(encoder, path / f"LFM2.5-{name}-350M", tokenizer=tokenizer)
    (path / "LFM2.5-ColBERT-350M" / "1_Dense").mkdir()
    projection = np.random.default_rng(0).standard_normal((8, encoder.config.hidden_size)).astype(np.float32)
    save_file({"linear.weight": projection}, path / "LFM2.5-ColBERT-350M" / "1_Dense" / "model.safetensors")


@pytest.fixture(scope="module", autouse=True)
def one_program_a_call():
    """Compiles a call of a model as a whole: operation by operation, which is how the pages call it, takes four times
    as long the first time."""
    call = lfm.LFM.__call__

    @partial(jax.jit, static_argnames=("graphdef", "options"))
    def compiled(params, arrays, graphdef, options):
        return call(nnx.merge(graphdef, params), **arrays, **dict(options))

    def run(self, tokens_BT, *arguments, **options):
        if isinstance(tokens_BT, jax.core.Tracer):
            return call(self, tokens_BT, *arguments, **options)
        assert not arguments
        names = [name for name in ("segment_ids_BT", "positions_BT", "state") if name in options]
        arrays = {"tokens_BT": tokens_BT} | {name: options.pop(name) for name in names}
        graphdef, params = nnx.split(self, nnx.Param)
        return compiled(params, arrays, graphdef, tuple(options.items()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lfm.LFM, "__call__", run)
        yield


def status(args):
    """The exit status of `lfm ARGS`, made short."""
    with pytest.raises(SystemExit) as ended:
        main([*args, *SHORTER.get(args[0], [])])
    return ended.value.code


@pytest.mark.parametrize("page", [page for page in PAGES if {b.language for b in blocks(page)} & {"python", "bash"}])
def test_code_runs(desk, page, monkeypatch, capsys):
    namespace = {}
    for block in blocks(page):
        if block.why is not None:
            continue
        if block.language == "python":
            exec(compile(block.text, page, "exec"), namespace)
        elif block.language == "bash":
            for lfm_command, *args in commands(block.text):
                assert lfm_command == "lfm"
                monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n/exit\n"))
                assert (serve if args[0] == "serve" else status)(args) == 0, capsys.readouterr()
    check = CHECKS.get(page)
    if check is not None:
        check(desk, namespace)


def serve(args):
    """`lfm serve` up to the point where it would begin to listen."""
    from lfm_jax.serve import launch

    asked = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "open_service", lambda path, dtype, engine, mesh, **_: asked.update(slots=engine.slots))
        patch.setattr(launch, "serve", lambda service, name, *rest: asked.update(name=name))
        code = status(args)
    slots = ((16, 2048), (1, 32768)) if "--engine.slots" in args else ()
    assert asked == {"slots": slots, "name": CHECKPOINT}
    return code


def check_generate(desk, namespace):
    assert len(namespace["texts"]) == 2
    assert namespace["last_B1V"].shape == (2, 1, namespace["model"].config.vocab_size)


def check_network(desk, namespace):
    assert namespace["small"].num_layers == 3
    assert namespace["logits_B1V"].shape == (2, 1, 512)


def check_train(desk, namespace):
    assert (desk / "runs" / "mine" / "loss.png").exists()
    assert (desk / "datasets" / "mine" / "manifest.json").exists()


def check_export(desk, namespace):
    assert (desk / "LFM2.5-350M-copy" / "config.json").exists()
    assert (desk / "LFM2.5-350M-f16" / "model.safetensors").exists()
    exported = transformers.AutoTokenizer.from_pretrained(desk / "my-model-hf")
    assert exported.bos_token_id == 1
    assert exported.decode(exported("Once upon", add_special_tokens=False).input_ids) == "Once upon"


def check_constrained(desk, namespace):
    jsonschema.validate(namespace["person"], namespace["schema"])
    assert all(sum(mood.values()) == pytest.approx(1) for mood in namespace["moods"])
    for name in ("body", "date", "century", "season"):
        body = ChatBody.model_validate(namespace[name])
        assert body.grammar is not None
        assert not body.model_extra
    model, tokenizer = namespace["model"], namespace["tokenizer"]
    tokens = grammar_tokenizer(tokenizer, model.config.vocab_size, turn_stop_ids(tokenizer, model.config))
    for name, text in (("date", "1815-12-10"), ("century", "19th century"), ("season", "in the winter of 1815")):
        matcher = tokens.matcher(ChatBody.model_validate(namespace[name]).grammar)
        for token in tokenizer.encode(text, add_special_tokens=False).ids:
            assert not matcher.accepts_eos
            matcher.consume(token)
        assert matcher.accepts_eos


def check_embeddings(desk, namespace):
    assert namespace["scores"].shape == (1, 3)
    assert sorted(index for index, _ in namespace["ranking"]) == [0, 1, 2]
    assert namespace["query_QO"].shape == (32, 8)
    assert len(np.load(desk / "vectors.npy")) == 2


def check_engine(desk, namespace):
    assert all(1 <= len(tokens) <= 8 for tokens in namespace["tokens"])


def check_evaluate(desk, namespace):
    assert all(logprob < 0 for logprob, _ in namespace["scores"])


def check_batch(desk, namespace):
    [answer] = map(json.loads, (desk / "answers.jsonl").read_text().splitlines())
    assert answer["response"]["body"]["usage"]["completion_tokens"] >= 1


CHECKS = {
    "docs/tutorials/generate.md": check_generate, "docs/tutorials/change_the_network.md": check_network,
    "docs/tutorials/train.md": check_train, "docs/tutorials/export.md": check_export,
    "docs/how_to/constrained_output.md": check_constrained, "docs/explanation/engine.md": check_engine,
    "docs/how_to/offline_batches.md": check_batch, "docs/how_to/embeddings.md": check_embeddings,
    "docs/how_to/evaluate.md": check_evaluate,
}
"""What must be there after the code of a page; the other pages need only run."""


@pytest.mark.parametrize("page", holding("yaml"))
def test_recipes_are_read(page, desk, tmp_path):
    """Each block is a study, or a part of a recipe for training or tuning; what it leaves out is filled in."""
    needed = {"run_dir": "runs/x", "steps": 10, "data": {"sources": ["my_texts"], "seq_len": 64, "batch_size": 8},
              "optimizer": {"warmup_steps": 0}}
    for i, block in enumerate(blocks(page)):
        if block.language != "yaml":
            continue
        recipe, path = yaml.safe_load(block.text), tmp_path / f"{i}.yaml"
        study, tunes = "vary" in recipe, "epochs" in recipe
        path.write_text(block.text if study else yaml.safe_dump(needed | recipe))
        load_recipe(AblateConfig if study else TuneConfig if tunes else TrainConfig, path)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_blocks_that_are_not_run_say_why(page, monkeypatch):
    """And if they are commands that take a recipe, their flags are known."""
    monkeypatch.chdir(ROOT)
    for block in blocks(page):
        assert block.language in (*RUN, "console", "text"), f"{block.language!r}: {block.text}"
        if block.language == "console":
            assert block.why, block.text
            assert all(line.startswith("$ ") for line in block.text.splitlines()), block.text
            for program, *args in commands(block.text):
                if program == "lfm":
                    check_flags(args)


def check_flags(args):
    """That there is such a verb, and that it knows these flags, if it takes a recipe and the recipe is one of ours."""
    verb = find(args)
    assert verb is not None, args
    _, config = verb.resolve()
    files = [arg for arg in args if arg.endswith(".yaml")]
    if config is not None and all(Path(file).exists() for file in files):
        layers = ["--model.layer-types", "conv"] if config is TuneCommand else []  # Else those of the model, not here.
        load_recipe(config, files, [*(arg for arg in args[len(verb.name.split()) :] if arg not in files), *layers])


LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)


def anchors(page):
    """The anchors of a page's headings, as GitHub and the site make them."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", prose, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in filter(None, sum(LINK.findall(CODE.sub("", (ROOT / page).read_text())), ())):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = ((ROOT / page).parent / name) if name else ROOT / page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path), target


PATH = re.compile(r"(?<![\w/])(?:lfm_jax|tests|docs|configs|experiments)/[\w./-]*\w(?![\w*])")


def test_files_that_are_named_exist():
    """In the pages, and where code and recipes name a page."""
    named = {(page, path) for page in PAGES for path in PATH.findall((ROOT / page).read_text())}
    for directory in ("lfm_jax", "configs", "experiments"):
        for file in [*ROOT.glob(f"{directory}/**/*.py"), *ROOT.glob(f"{directory}/**/*.yaml")]:
            named |= {(file.relative_to(ROOT).as_posix(), path)
                      for path in re.findall(r"\bdocs/[\w./-]*\w", file.read_text())}
    missing = sorted(f"{where}: {path}" for where, path in named if not (ROOT / path).exists() and "NAME" not in path)
    assert not missing, "\n".join(missing)


def test_every_module_is_in_the_reference():
    pages = "".join((ROOT / page).read_text() for page in PAGES if page.startswith("docs/reference/modules/"))
    listed = set(" ".join(re.findall(r"^```{modules} (.+)$", pages, flags=re.MULTILINE)).split())
    there = {f"lfm_jax.{path.stem}" for path in (ROOT / "lfm_jax").iterdir() if not path.name.startswith("_")}
    assert listed == there
