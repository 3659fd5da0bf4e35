"""Compiled programs on disk: the place the verbs use, a second start that compiles nothing, limits, `lfm cache`."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache
from running import run

import lfm_jax as lfm
from lfm_jax import compile_cache

SETTINGS = ("jax_compilation_cache_dir", "jax_compilation_cache_max_size", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The verbs' own place, empty, and no other one."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    monkeypatch.setenv("LFM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield tmp_path / "cache" / "compiled"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def names(place):
    return {file.name for file in place.glob("*-cache")}


def test_the_place(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LFM_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert compile_cache.directory() == tmp_path / ".cache" / "lfm_jax" / "compiled"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert str(compile_cache.directory()) == "/xdg/lfm_jax/compiled"
    monkeypatch.setenv("LFM_CACHE_DIR", "/mine")
    assert str(compile_cache.directory()) == "/mine/compiled"
    monkeypatch.setenv("LFM_CACHE_DIR", "")
    assert compile_cache.directory() is None


def test_without_a_home_there_is_no_place(monkeypatch):
    monkeypatch.delenv("LFM_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 5)
    assert compile_cache.directory() is None


def test_loading_compiles_nothing(place, checkpoint):
    jax.clear_caches()
    compile_cache.enable()
    lfm.load(checkpoint)
    assert names(place) == set()


def test_a_second_start_compiles_nothing(place, checkpoint, capsys):
    jax.clear_caches()  # What this process has compiled already would not be written.
    command = ["generate", str(checkpoint), "the quick", "--max-new-tokens", "6", "--temperature", "1"]
    assert run(*command) == 0
    text, first = capsys.readouterr().out, names(place)
    assert len(first) >= 3
    precision = {"JAX_DEFAULT_MATMUL_PRECISION": "highest", "PYTHONHASHSEED": "7"}  # The former as in conftest.py.
    code = ("import sys; from lfm_jax.cli import main\n"
            "try: main(sys.argv[1:])\n"
            "finally: print(sorted({'orbax', 'grain', 'torch', 'transformers'} & set(sys.modules)), file=sys.stderr)")
    done = subprocess.run([sys.executable, "-c", code, *command], env=os.environ | precision, capture_output=True,
                          text=True)
    assert (done.stdout, done.stderr) == (text, "[]\n")
    assert names(place) == first


def test_a_place_that_jax_was_told_stays(place, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    before = [getattr(jax.config, name) for name in SETTINGS]
    compile_cache.enable()
    assert [getattr(jax.config, name) for name in SETTINGS] == before
    assert not place.exists()


def test_nothing_is_kept_where_it_is_switched_off(place, monkeypatch):
    monkeypatch.setenv("LFM_CACHE_DIR", "")
    compile_cache.enable()
    assert jax.config.jax_compilation_cache_dir is None


def test_a_place_that_cannot_be_used_is_one_warning(place, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LFM_CACHE_DIR", str(tmp_path / "file"))
    compile_cache.enable()
    assert jax.config.jax_compilation_cache_dir is None
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("lfm: compiled programs are not kept")
    assert "LFM_CACHE_DIR" in line


def test_the_least_recently_used_go_when_it_is_full(place, monkeypatch):
    monkeypatch.setattr(compile_cache, "MAX_BYTES", 20_000)
    compile_cache.enable()
    seen = []
    for n in range(3, 15):
        jax.jit(lambda x: jnp.sin(x).sum())(jnp.arange(n, dtype=jnp.float32))
        seen.append(names(place))
        assert sum((place / name).stat().st_size for name in seen[-1]) <= 20_000
    assert not seen[0] & seen[-1]


def test_the_verb_reports_and_clears(place, capsys, monkeypatch):
    compile_cache.enable()
    assert run("cache") == 0
    assert capsys.readouterr().out == f"{place}: 0 programs, 0.0 MiB of at most 1024 MiB\n"
    jax.jit(lambda x: x + 0.125)(jnp.arange(17.0))
    assert names(place)
    assert run("cache") == 0
    assert capsys.readouterr().out.startswith(f"{place}: {len(names(place))} programs, ")
    assert run("cache", "--clear") == 0
    assert capsys.readouterr().out == f"{place}: 0 programs, 0.0 MiB of at most 1024 MiB\n"
    assert not names(place)
    monkeypatch.setenv("LFM_CACHE_DIR", "")
    assert run("cache") == 0
    assert "not kept" in capsys.readouterr().out


def test_the_verb_leaves_the_place_of_another_alone(place, tmp_path, monkeypatch, capsys):
    (tmp_path / "program-cache").touch()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    assert run("cache") == 0
    assert str(tmp_path) in capsys.readouterr().out
    assert run("cache", "--clear") == 2
    assert "lfm does not remove its files" in capsys.readouterr().err
    assert (tmp_path / "program-cache").exists()
