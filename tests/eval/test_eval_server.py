"""`lfm eval --url`: a server with OpenAI's API measures as the model that it serves."""

import http.server
import json
import shutil
import socket
import threading
import time

import httpx
import pytest
import uvicorn
from running import run
from toy_tasks import TASKS, toy_tasks

import lfm_jax as lfm
from lfm_jax.engine.config import EngineConfig
from lfm_jax.engine.service import Service
from lfm_jax.eval import server as servers
from lfm_jax.sampling import PUBLISHED
from lfm_jax.serve.app import make_app
from lfm_jax.serve.limits import Limits
from lfm_jax.text.chat import DEFAULT_TEMPLATE

LENGTH = ["--max-length", 250]


def read(directory):
    return json.loads((directory / "results.json").read_text())


def samples(directory, task):
    return [json.loads(line) for line in (directory / f"samples_{task}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def url(directory):
    """Our own server, whose defaults have a penalty that a greedy text must not get."""
    model, tokenizer = lfm.load(directory)
    service = Service(model, tokenizer, DEFAULT_TEMPLATE, EngineConfig(slots=((2, 256),), chunk=64, max_logprobs=1))
    app = make_app(service, "tiny", api_key=None, sampling=PUBLISHED, limits=Limits())
    address = socket.create_server(("127.0.0.1", 0))
    served = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=served.run, args=([address],))
    thread.start()
    while not served.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{address.getsockname()[1]}/v1"
    served.should_exit = True
    thread.join()
    service.engine.close(drain=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return toy_tasks(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def measure(data):
    def measured(output, model, tasks, *args):
        return run("eval", *model, "--tasks", ",".join(tasks), "--data", data, "--output", output, "--limit", "6",
                   *args)

    return measured


def leaves(answer):
    """What is in the answers of a sample: log-probabilities as numbers, flags and texts."""
    if isinstance(answer, list):
        return [leaf for each in answer for leaf in leaves(each)]
    try:
        return [float(answer)]
    except ValueError:
        return [answer]


def assert_alike(one, other, tasks):
    for task in tasks:
        found, wanted = (leaves([sample["resps"] for sample in samples(each, task)]) for each in (one, other))
        assert len(found) == len(wanted)
        assert all(x == pytest.approx(y, abs=1e-4) for x, y in zip(found, wanted, strict=True)), (found, wanted)
        for name, value in read(other)["results"][task].items():
            same = pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
            assert read(one)["results"][task][name] == same, (task, name)


def flags(chat):
    return ["--apply-chat-template", "--num-fewshot", "1"] if chat else []


@pytest.fixture(scope="module", params=[False, True], ids=["texts", "chats"])
def local(request, measure, directory, tmp_path_factory):
    """(whether prompts are conversations, the evaluation of the model itself)."""
    output = tmp_path_factory.mktemp("local") / "out"
    quick = ["--slots", "2", "--batch-tokens", "512"]
    assert measure(output, [directory], list(TASKS), *LENGTH, *flags(request.param), *quick) == 0
    return request.param, output


def test_with_tokens_as_the_model_itself(url, measure, directory, tmp_path, local, monkeypatch, capsys):
    chat, expected = local
    output, there = tmp_path / "out", ["--url", url, "--model", "tiny", "--tokenizer", directory]
    assert measure(output, there, list(TASKS), *LENGTH, *flags(chat)) == 0
    assert_alike(output, expected, list(TASKS))
    about = read(output)["lfm_jax"]
    assert about["model_hash"] is None
    assert about["server"] == {"url": url, "model": "tiny", "says": {
        "id": "tiny", "object": "model", "owned_by": "lfm_jax", "max_model_len": 256, "root": "tiny", "parent": None}}
    page = (output / "report.md").read_text()
    assert "| model hash (SHA-256) | not known of a server |" in page
    assert '| the server says | {"id": "tiny", "max_model_len": 256,' in page
    capsys.readouterr()
    assert run("eval", "compare", expected, output) == 0
    assert "nothing can be told apart" in capsys.readouterr().out
    # What was answered is not asked again, and another model gets no place in the directory.
    monkeypatch.setattr(servers.Server, "ask", lambda *_: pytest.fail("asked again"))
    assert measure(output, there, list(TASKS), *LENGTH, *flags(chat)) == 0
    assert measure(output, [directory], list(TASKS), *LENGTH, *flags(chat)) == 2


def test_with_texts_as_with_tokens(url, measure, tmp_path, local, capsys):
    chat, expected = local
    assert measure(tmp_path / "out", ["--url", url], ["toy_text"], *flags(chat)) == 0
    assert_alike(tmp_path / "out", expected, ["toy_text"])
    assert len({sample["resps"][0][0] for sample in samples(tmp_path / "out", "toy_text")}) > 1
    assert measure(tmp_path / "choice", ["--url", url], ["toy_choice"], *LENGTH) == 2
    assert "max_length goes with a tokenizer" in capsys.readouterr().err
    assert measure(tmp_path / "choice", ["--url", url], ["needle_1024"]) == 2
    assert "name its Hugging Face directory with --tokenizer" in capsys.readouterr().err
    assert measure(tmp_path / "choice", ["--url", url], ["toy_choice"]) == 2
    assert "name its Hugging Face directory with --tokenizer" in capsys.readouterr().err


class Scripted:
    """What `TokenServer` needs of a server that says one text."""

    url, model, longest, _at_once = "http://x/v1", "m", None, 2
    ask_all = servers.Server.ask_all

    def __init__(self, text=""):
        self.text, self.bodies = text, []

    def ask(self, path, body):
        self.bodies.append(body)
        return {"text": self.text}


@pytest.mark.parametrize(("text", "answer"), [
    ("<think>First,\nI guess.</think>\n\nThe fox.\nMore", "The fox."), ("<think>First,\nI", ""),
    ("The fox.\nMore", "The fox."), ("The fox.<|im_end|>", "The fox."),
])
def test_thoughts_are_no_answers_and_end_nothing(directory, tmp_path, text, answer):
    server = Scripted(text)
    shutil.copytree(directory, tmp_path / "thinking")
    (tmp_path / "thinking" / "chat_template.jinja").write_text(DEFAULT_TEMPLATE + "{# </think> #}")
    lm = servers.TokenServer(server, tmp_path / "thinking", max_length=250)
    asked = lm._wanted("the", {"until": ["\n"], "max_gen_toks": 8}, 0)
    assert list(lm._generate([asked])) == [(0, answer)]
    [body] = server.bodies
    assert (body["stop"], body["skip_special_tokens"]) == (None, False)
    assert body["repeat_penalty"] == body["repetition_penalty"] == 1.0
    # Behind the thought a stop string may end the reply where it is written.
    asked = lm._wanted("<|im_start|>assistant\n<think>x</think>The", {"until": ["\n"], "max_gen_toks": 8}, 0)
    assert asked.text(server) == text.partition("\n")[0].removesuffix("<|im_end|>")
    assert server.bodies[-1]["stop"][0] == "\n"


def test_the_tokenizer_of_a_gguf_file(directory, tmp_path):
    assert run("export", directory, tmp_path / "model.gguf") == 0
    ours, theirs = (servers.TokenServer(Scripted(), path, max_length=10)
                    for path in (tmp_path / "model.gguf", directory))
    assert ours.tok_encode("the fox") == theirs.tok_encode("the fox")
    chat = [{"role": "user", "content": "hi"}]
    assert ours.apply_chat_template(chat) == theirs.apply_chat_template(chat)
    assert (ours.prefix_token_id, ours.eot_token_id) == (theirs.prefix_token_id, theirs.eot_token_id)


def test_a_continuation_that_is_too_long_is_refused(directory):
    lm = servers.TokenServer(Scripted(), directory, max_length=10)
    with pytest.raises(ValueError, match="cannot score a continuation of 11 tokens; the model reads 10"):
        lm._score([([1, 2], list(range(5, 16)))])


def test_an_empty_continuation_is_refused(directory):
    lm = servers.TokenServer(Scripted(), directory, max_length=10)
    with pytest.raises(ValueError, match="pair 1 has no continuation"):
        lm._score([([1], [2]), ([1], [])])


def test_answers_under_way_beside_a_failure_are_kept():
    failed, begun, found = threading.Event(), [], []

    def ask(task):
        begun.append(task)
        if task == 0:
            failed.set()
            raise ValueError("no answer")
        failed.wait(10)
        time.sleep(0.2)
        return task

    with pytest.raises(ValueError, match="no answer"):
        found.extend(Scripted().ask_all([1, 0, *range(2, 9)], ask))
    assert (found, begun) == ([(0, 1)], [1, 0])


class Other(http.server.BaseHTTPRequestHandler):
    """A server that gives no log-probabilities of prompts, and now and then has no time."""

    busy, bodies = 1, []

    def log_message(self, *_):
        pass

    def _send(self, status, content):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def do_GET(self):
        self._send(200, {"data": [{"id": "a", "created": 1, "meta": {"n_params": 5}}, {"id": "b"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).bodies.append(body)
        if body.get("echo"):
            self._send(400, {"error": {"message": "Only no echo is supported"}})
        elif type(self).busy:
            type(self).busy -= 1
            self._send(503, {"error": "loading"})
        else:
            self._send(200, {"choices": [{"message": {"content": None if "number 1" in str(body) else "the fox"}}]})


@pytest.fixture
def other():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other) as served:
        threading.Thread(target=served.serve_forever).start()
        yield f"http://127.0.0.1:{served.server_port}/v1"
        served.shutdown()


def test_a_server_that_is_gone_is_not_said_to_have_no_scores(other, directory, monkeypatch):
    def gone(request):
        raise httpx.ConnectError("refused")

    server = servers.Server(other, "a")
    server._client = httpx.Client(transport=httpx.MockTransport(gone))
    monkeypatch.setattr(servers.time, "sleep", lambda seconds: None)
    lm = servers.TokenServer(server, directory, max_length=64)
    with pytest.raises(ValueError, match=r"the same command goes on from there$"):
        list(lm._score([([1], [2])]))


def test_what_a_server_cannot_do(other, measure, directory, tmp_path, capsys):
    assert measure(tmp_path / "out", ["--url", other], ["toy_text"]) == 2
    assert f"model is None; the server at {other} has a, b" in capsys.readouterr().err
    there = ["--url", other, "--model", "a"]
    assert measure(tmp_path / "out", [*there, "--tokenizer", directory], ["toy_choice"]) == 2
    assert "does not say how many tokens its model reads" in capsys.readouterr().err
    assert measure(tmp_path / "out", [*there, "--tokenizer", directory, "--max-length", 64], ["toy_choice"]) == 2
    assert "Only no echo is supported" in (said := capsys.readouterr().err)
    assert "does not give the log-probabilities of a prompt" in said
    assert measure(tmp_path / "text", there, ["toy_text"], "--apply-chat-template") == 0
    texts = [sample["resps"][0][0] for sample in samples(tmp_path / "text", "toy_text")]
    assert texts == ["the f", "", *["the f"] * 4]  # Cut here at a stop string that the server passed over.
    assert read(tmp_path / "text")["lfm_jax"]["server"]["says"] == {"id": "a", "meta": {"n_params": 5}}
    assert {body["repetition_penalty"] for body in Other.bodies if "messages" in body} == {1.0}
    assert measure(tmp_path / "gone", ["--url", "http://127.0.0.1:9/v1"], ["toy_text"]) == 2
    assert "is not that of a server with OpenAI's API" in capsys.readouterr().err
    assert measure(tmp_path / "gone", [directory, "--url", other], ["toy_text"]) == 2
    assert measure(tmp_path / "gone", [], ["toy_text"]) == 2
    assert "name a model" in capsys.readouterr().err
