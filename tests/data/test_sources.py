"""Files are found once and in order, split stably, and read lazily; what cannot be used is named."""

import json
from pathlib import Path

import pytest
from grain.sources import RandomAccessDataSource
from hypothesis import given
from hypothesis import strategies as st

from lfm_jax.data.heldout import split_files
from lfm_jax.data.sources import Documents, SourceFile, find_files, read_stretch, stretches


def write(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.fixture
def tree(tmp_path):
    write(tmp_path, {
        "a.txt": "A", "b.md": "B", "lib/c.py": "C", "lib/old/d.PY": "D", "lib/tests/e.py": "E",
        "lib/data.bin": b"\xff", ".git/f.txt": "F", "lib/.hidden.txt": "H", "rows.jsonl": '{"text": "R"}\n',
    })
    return tmp_path


def names(files):
    return [file.name for file in files]


def test_directory_is_read_recursively_and_in_order(tree):
    files = find_files([str(tree)])
    assert names(files) == ["a.txt", "b.md", "lib/c.py", "lib/old/d.PY", "lib/tests/e.py", "rows.jsonl"]
    assert all(file.path == (tree / file.name).resolve() for file in files)


def test_globs_and_files(tree):
    assert names(find_files([f"{tree}/*"])) == ["a.txt", "b.md", "rows.jsonl"]
    assert names(find_files([f"{tree}/lib/**/*.py"])) == ["c.py", "tests/e.py"]
    assert names(find_files([f"{tree}/l*b/**"])) == ["lib/c.py", "lib/old/d.PY", "lib/tests/e.py"]
    assert names(find_files([f"{tree}/lib/c.py"])) == ["c.py"]


def test_relative_patterns(tree, monkeypatch):
    monkeypatch.chdir(tree)
    assert names(find_files(["*.txt", "lib"])) == ["a.txt", "c.py", "old/d.PY", "tests/e.py"]
    assert find_files(["lib/c.py"]) == [SourceFile((tree / "lib/c.py").resolve(), "c.py")]


def test_a_file_found_twice_is_taken_once(tree):
    twice = find_files([str(tree / "lib"), str(tree), f"{tree}/lib/*.py"])
    assert sorted(file.path for file in twice) == sorted(file.path for file in find_files([str(tree)]))


@pytest.mark.parametrize(("exclude", "left"), [
    (["tests"], ["a.txt", "b.md", "lib/c.py", "lib/old/d.PY", "rows.jsonl"]),
    (["lib/old", "*.jsonl"], ["a.txt", "b.md", "lib/c.py", "lib/tests/e.py"]),
    (["lib"], ["a.txt", "b.md", "rows.jsonl"]),
    (["old/*", "c*"], ["a.txt", "b.md", "lib/old/d.PY", "lib/tests/e.py", "rows.jsonl"]),
])
def test_exclude(tree, exclude, left):
    assert names(find_files([str(tree)], exclude)) == left
    assert names(find_files([f"{tree}/**"], exclude)) == left


def test_what_cannot_be_used_is_listed_together(tree):
    patterns = [str(tree / "lib/data.bin"), str(tree / "nope.txt"), f"{tree}/*.rst", str(tree / ".git/f.txt")]
    with pytest.raises(ValueError, match="source files cannot be used") as error:
        find_files([*patterns, str(tree / "lib/tests")], exclude=["*.py"])
    message = str(error.value)
    assert "data.bin: type not known; expected one of .txt, .md, .py, .jsonl" in message
    assert "nope.txt: there is no such file" in message
    assert "*.rst: it matches no" in message
    assert "lib/tests: it matches no .txt, .md, .py, .jsonl file outside exclude ['*.py']" in message
    assert "f.txt" not in message


FILES = st.lists(st.text("abc/", min_size=1, max_size=8), min_size=2, max_size=60, unique=True).map(
    lambda chosen: [SourceFile(Path("/", name), name) for name in chosen]
)


@given(FILES, st.data())
def test_split_is_stable_when_other_files_go(files, data):
    try:
        train, heldout = split_files(files, 0.4)
    except ValueError:
        return
    assert sorted(train + heldout) == sorted(files)
    kept = data.draw(st.lists(st.sampled_from(files), unique=True, min_size=2))
    try:
        some_train, some_heldout = split_files(kept, 0.4)
    except ValueError:
        return
    assert set(some_train) <= set(train)
    assert set(some_heldout) <= set(heldout)


def test_split_holds_out_about_the_fraction():
    files = [SourceFile(Path(f"/{i}.txt"), f"{i}.txt") for i in range(2000)]
    _, heldout = split_files(files, 0.1)
    assert 140 <= len(heldout) <= 260
    # For good: a run that goes on must not learn from what it was measured on.
    assert [file.name for file in heldout[:4]] == ["10.txt", "12.txt", "15.txt", "19.txt"]
    assert split_files(files, 0.0) == (files, [])


def test_split_that_leaves_a_side_empty_is_refused_with_advice_that_works():
    files = [SourceFile(Path(f"/{i}.txt"), f"{i}.txt") for i in range(5)]
    with pytest.raises(ValueError, match=r"leaves no held-out file; name the held-out files in `heldout`") as error:
        split_files(files, 1e-9)
    advice = float(str(error.value).split("or to ")[1].split()[0])
    assert [len(side) for side in split_files(files, advice)] == [4, 1]
    with pytest.raises(ValueError, match="leaves no training file"):
        split_files(files, 0.999999)
    with pytest.raises(ValueError, match=r"of 1 file\(s\) leaves no held-out file.*hold out none$"):
        split_files(files[:1], 0.02)


def test_documents_are_one_per_text_file_and_one_per_jsonl_line(tmp_path):
    write(tmp_path, {
        "a.py": "x = 'é'\r\n", "b.txt": "",
        "c.jsonl": '{"text": "one\\n"}\n\n{"id": 1, "text": "zwölf"}\n{"text": ""}\n',
        "d.jsonl": '{"text": "no line end"}',
    })
    documents = Documents(find_files([str(tmp_path)]))
    assert list(documents) == ["x = 'é'\r\n", "one\n", "zwölf", "no line end"]
    assert [documents[i] for i in (3, 0)] == ["no line end", "x = 'é'\r\n"]
    assert documents.num_bytes == sum(len(text.encode()) for text in documents)
    assert isinstance(documents, RandomAccessDataSource)
    with pytest.raises(IndexError):
        documents[4]


def test_a_byte_order_mark_is_no_part_of_a_document(tmp_path):
    mark = b"\xef\xbb\xbf"
    stored = {"a.txt": b"one", "b.py": b"", "c.jsonl": b'{"text": "two"}\n{"text": "three"}\n', "d.jsonl": b"\n"}
    write(tmp_path / "plain", stored)
    write(tmp_path / "marked", {name: mark + content for name, content in stored.items()})
    plain, marked = (Documents(find_files([str(tmp_path / name)])) for name in ("plain", "marked"))
    assert list(marked) == list(plain) == ["one", "two", "three"]
    assert marked.num_bytes == plain.num_bytes == 11
    for file in marked.files:
        size = file.path.stat().st_size
        for longest in range(1, size + 1):  # However a file is cut, and be it inside the mark.
            problems = []
            found = [document for stretch in stretches(file.path, size, longest)
                     for document in read_stretch(stretch, "text", problems)]
            whole = file.path.read_bytes()[3:]
            lines = whole.splitlines(keepends=True) if file.name.endswith(".jsonl") else [whole]
            assert [raw for raw, _ in found] == [line for line in lines if line.strip()]
            assert problems == []
    inner = tmp_path / "inner.txt"
    inner.write_bytes(b"a" + mark)  # Elsewhere it is a character like any other.
    assert list(Documents([SourceFile(inner, "inner.txt")])) == ["a\ufeff"]


def test_documents_are_read_when_asked_for(tmp_path):
    write(tmp_path, {"a.txt": "first", "b.jsonl": '{"text": "row"}\n'})
    documents = Documents(find_files([str(tmp_path)]))
    (tmp_path / "a.txt").write_text("other")
    assert documents[0] == "other"


@given(st.lists(st.text(), max_size=8))
def test_jsonl_gives_back_every_text(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("jsonl") / "rows.jsonl"
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    documents = Documents([SourceFile(path, "rows.jsonl")], text_field="body")
    assert list(documents) == [text for text in texts if text]


def test_bad_files_and_lines_are_listed_with_their_place(tmp_path):
    write(tmp_path, {
        "latin.txt": b"fine\ncaf\xe9\n",
        "rows.jsonl": b'{"text": "ok"}\n{"text": \n{"body": "x"}\n[1]\n{"text": 3}\n"\xff"\n{"text": "\\ud800"}\n'
                      b'{"text": null}\n',
    })
    with pytest.raises(ValueError, match="documents cannot be read") as error:
        Documents(find_files([str(tmp_path)]))
    lines = str(error.value).splitlines()[1:]
    for line, expected in zip(lines, [
        "latin.txt, line 2: not UTF-8 (byte 0xe9); convert the file with iconv or exclude it",
        "rows.jsonl, line 2: not JSON (Expecting value, column",
        "rows.jsonl, line 3: expected a JSON object with a string under 'text', but its keys are 'body'",
        "rows.jsonl, line 4: expected a JSON object with a string under 'text', but it is not an object",
        "rows.jsonl, line 5: expected a JSON object with a string under 'text', but that is a number",
        "rows.jsonl, line 6: not UTF-8 (byte 0xff)",
        "rows.jsonl, line 7: 'text' holds half a surrogate pair",
        "rows.jsonl, line 8: expected a JSON object with a string under 'text', but that is null",
    ], strict=True):
        assert expected in line


def test_a_long_list_of_bad_lines_is_cut_short(tmp_path):
    write(tmp_path, {"rows.jsonl": "x\n" * 100})
    with pytest.raises(ValueError, match=r"line 20: .*\n  \.\.\. and 80 more$"):
        Documents(find_files([str(tmp_path)]))
