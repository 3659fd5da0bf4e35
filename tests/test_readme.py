"""The README's code runs: Python blocks in order in one namespace, and its `lfm` commands."""

import io
import re
import shlex
from pathlib import Path

import pytest
import transformers

import lfm_jax as lfm
from lfm_jax.cli import main
from lfm_jax.testing import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CHECKPOINT = "LFM2.5-350M"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A working directory with what the README takes for granted: a checkpoint, recipes, some texts."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=tokenizer.get_vocab_size(), init_std=0.05)
    lfm.save_hf(model, tmp_path / CHECKPOINT, tokenizer=tokenizer)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "my_texts").mkdir()
    for i in range(10):
        (tmp_path / "my_texts" / f"{i}.txt").write_text(f"Once upon a time there were {i} little pigs.\n" * 40)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_python_blocks_run_in_order(desk, capsys):
    found = blocks("python")
    assert len(found) >= 4
    namespace = {}
    for block in found:
        exec(compile(block, "README.md", "exec"), namespace)
    assert len(namespace["texts"]) == 2
    assert namespace["last_B1V"].shape == (2, 1, namespace["same"].config.vocab_size)
    assert namespace["small"].num_layers == 3
    assert namespace["logits_B1V"].shape == (2, 1, 512)
    assert (desk / "LFM2.5-350M-copy" / "config.json").exists()


@pytest.mark.slow
def test_lfm_commands_run(desk, capsys, monkeypatch):
    lines = [line for block in blocks("bash") for line in block.strip().splitlines()]
    assert lines
    assert all(line.startswith(".venv/bin/lfm ") for line in lines)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n/exit\n"))
    for line in lines:
        args = shlex.split(line)[1:]
        if args[0] == "train":  # The recipe as it is, only shorter and narrower.
            args += ["--steps", "2", "--optimizer.warmup-steps", "0", "--optimizer.decay-steps", "1",
                     "--model.vocab-size", "400", "--model.layer-types", "conv", "full_attention",
                     "--data.seq-len", "64", "--data.heldout-fraction", "0.26"]
        if args[0] == "chat":
            args += ["--max-new-tokens", "4"]
        with pytest.raises(SystemExit) as status:
            main(args)
        assert status.value.code == 0, f"{line}\n{capsys.readouterr()}"
    assert (desk / "runs" / "mine" / "loss.png").exists()
    assert (desk / "LFM2.5-350M-f16" / "model.safetensors").exists()
    exported = transformers.AutoTokenizer.from_pretrained(desk / "my-model-hf")
    assert exported.bos_token_id == 1
    assert exported.decode(exported("Once upon", add_special_tokens=False).input_ids) == "Once upon"
