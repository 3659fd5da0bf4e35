"""Models of the Hugging Face Hub: the files that we read, in the cache of `huggingface_hub`.

The library fetches, resumes after a broken connection, locks, and reports progress. It is imported when an id is named.
What can be refused is refused before any weights come.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from lfm_jax.convert import safetensors_io as files
from lfm_jax.convert import sidecars
from lfm_jax.convert.families import config_from_hf

ID = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>\S+))?", re.ASCII)
CONFIG = "config.json"
READ = (CONFIG, "model*.safetensors", files.INDEX, *sidecars.TOKENIZER_FILES, *sidecars.OTHER_FILES,
        f"{sidecars.MORE_TEMPLATES}/*.jinja")
"""Patterns of what is fetched."""
ANSWER_SECONDS = 10
"""How long the Hub may take to say what a repository holds; after that, the cache must do."""


def is_id(name: str) -> bool:
    """Returns whether a name has the form of an id: `OWNER/NAME` or `OWNER/NAME@REVISION`."""
    return ID.fullmatch(name) is not None


def fetch(name: str) -> Path:
    """Brings a model of the Hub into the cache, unless it is there, and returns its directory.

    Where the Hub cannot be asked, or refuses, what the cache holds of the revision is taken if it is a whole model.

    Args:
      name: an id (`is_id`); its revision is a branch, a tag or a commit, `main` if left out.

    Raises:
      ValueError: the repository is gated, it or the revision does not exist, it is no model that we read, or the Hub
        cannot be reached and the cache does not have all of it; one line that says what to do.
    """
    import huggingface_hub as hub
    from huggingface_hub.errors import HTTPError

    named = ID.fullmatch(name)
    assert named is not None
    repository, revision = named["repository"], named["revision"] or "main"
    refusal: Exception | None = None
    try:
        # One request that is not tried again, unlike those for files: without a network, this ends at once.
        listing = hub.HfApi().model_info(repository, revision=revision, timeout=ANSWER_SECONDS).siblings
    except (HTTPError, OSError) as error:
        refusal = error
    else:
        _check_files(name, {file.rfilename for file in listing or ()})
    cached = refusal is not None
    try:
        config = Path(hub.hf_hub_download(repository, CONFIG, revision=revision, local_files_only=cached))
        _check_config(name, config.parent)
        # A cache names a directory after its commit, so that all files are of one commit, even if the branch moves.
        directory = Path(hub.snapshot_download(repository, revision=config.parent.name, allow_patterns=list(READ),
                                               local_files_only=cached))
    except (HTTPError, OSError) as error:
        raise ValueError(_why(name, repository, revision, refusal or error)) from None
    # Of what it did not fetch as a whole, the library does not know what is missing.
    problems = files.open_directory(directory)[1] if cached else []
    if problems:
        why = _why(name, repository, revision, refusal)
        raise ValueError(f"{why}; the cache has a part of it: {'; '.join(problems[:3])}")
    return directory


def _check_files(name: str, found: Collection[str]) -> None:
    """Raises ValueError if a repository with these files has no model for us."""
    if CONFIG not in found:
        raise ValueError(f"{name} has no {CONFIG}; name the repository of the original weights, in safetensors")
    if not {files.SINGLE, files.INDEX} & set(found):
        pickles = sorted(file for file in found if file.endswith(files.PICKLES))
        others = f", but {', '.join(pickles[:3])}: pickle files are not read, because opening one runs the code in it"
        raise ValueError(f"{name} has neither {files.SINGLE} nor {files.INDEX}{others if pickles else ''}")


def _check_config(name: str, directory: Path) -> None:
    """Raises ValueError if the config is not that of a family that we have."""
    hf, problems = files.read_json(directory, CONFIG)
    if not problems:
        try:
            config_from_hf(hf)
        except (ValueError, TypeError, ArithmeticError, AttributeError) as error:
            problems = [f"{CONFIG}: {str(error).removeprefix(f'{CONFIG} ')}"]
    if problems:
        raise ValueError(f"cannot load {name}: {problems[0]}")


def _why(name: str, repository: str, revision: str, error: Any) -> str:
    """What went wrong and what to do, in one line."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repository}"
    login = "run `hf auth login`, or set HF_TOKEN"
    nowhere = f"there is no {name} here, not all of it is in the cache of the Hugging Face Hub, and"
    match error:
        case errors.GatedRepoError():
            return f"{repository} is gated: accept its licence at {page}, then {login}"
        case errors.RepositoryNotFoundError():
            return f"there is neither a directory {name} here nor a repository {page}; if it is private, {login}"
        case errors.RevisionNotFoundError():
            return f"{page} has no revision {revision!r}; name a branch, a tag or a commit"
        case errors.OfflineModeIsEnabled():
            return f"{nowhere} HF_HUB_OFFLINE forbids to fetch it; unset it once"
        case errors.HfHubHTTPError() if error.response is not None:
            return f"{nowhere} {page} answers with HTTP status {error.response.status_code}"
        case errors.LocalEntryNotFoundError() | errors.HTTPError() | ConnectionError():
            reason = error.__cause__ or error
            line = " ".join(f"{type(reason).__name__}: {reason}".split())
            return f"{nowhere} {constants.ENDPOINT} cannot be reached ({line}); try again, whole files are kept"
        case _:
            return f"{name} cannot be fetched: {' '.join(str(error).split())}"


def model_name(path: Path) -> str:
    """Returns what a model is called: as its directory, its file without `.gguf`, or a link to it, or as its repository
    in a cache of the Hugging Face Hub (`models--OWNER--NAME/snapshots/COMMIT`)."""
    path = path.resolve() if path.name == ".." else path.parent.resolve() / path.name
    repository = path.parent.parent.name
    if path.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.split("--")[-1]
    return path.name.removesuffix(".gguf")
