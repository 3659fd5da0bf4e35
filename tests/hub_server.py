"""A small server of the Hugging Face Hub's protocol on loopback, as `huggingface_hub` 2.4 asks it."""

import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants


class Hub:
    """Repositories by id; each has revisions by name, each a dict of file name to bytes.

    `asked` lists what was asked for, as (method, "OWNER/NAME", "info" or "tree" or name of a file, Range or None).
    """

    def __init__(self):
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.gated: set[str] = set()
        self.asked: list[tuple[str, str, str, str | None]] = []
        self.cuts: list[tuple[str, int]] = []
        """(file, bytes): the connections of its next requests end after so many bytes of the answer."""
        self.status: int | None = None
        """What every request is answered with, if not None."""

    @contextlib.contextmanager
    def reached(self, cache):
        """Serves as `serving`, and lets `huggingface_hub` in this process ask it and keep its files in `cache`."""
        with self.serving() as url, pytest.MonkeyPatch.context() as patch:
            # It read its environment when it was imported.
            patch.setattr(constants, "HF_HUB_OFFLINE", False)
            patch.setattr(constants, "HF_HUB_CACHE", str(cache))
            patch.setattr(constants, "ENDPOINT", url)
            patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
            yield url

    def add(self, repository, directory, revision="main", more=None):
        """Adds the files of a directory, and `more` by name, as a revision; returns its commit."""
        files = {file.relative_to(directory).as_posix(): file.read_bytes()
                 for file in Path(directory).rglob("*") if file.is_file()}
        self.repositories.setdefault(repository, {})[revision] = files | (more or {})
        return self.commit(repository, revision)

    def commit(self, repository, revision):
        """The commit that a revision names now, None if there is none."""
        revisions = self.repositories[repository]
        commits = {name: hashlib.sha1(repr((repository, sorted(files.items()))).encode()).hexdigest()
                   for name, files in revisions.items()}
        return revision if revision in commits.values() else commits.get(revision)

    def files(self, repository, commit):
        return next(files for name, files in self.repositories[repository].items()
                    if self.commit(repository, name) == commit)

    def fetched(self):
        """The names of the files whose content was asked for."""
        return {what for method, _, what, _ in self.asked if method == "GET" and what not in ("info", "tree")}

    def fall_silent(self):
        """Ends all answers: nobody listens at the address any more."""
        self._server.shutdown()
        self._server.server_close()

    @contextlib.contextmanager
    def serving(self):
        """Serves in a thread until the block ends, and gives the address."""

        class Handler(_Handler):
            hub = self

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{self._server.server_address[1]}"
        finally:
            self.fall_silent()
            thread.join()


ROUTE = re.compile(r"/(?:api/models/(?P<repo>[^/]+/[^/]+)/(?P<kind>revision|tree)/(?P<at>[^?]+)(?:\?.*)?"
                   r"|(?P<owner>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+))")


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, format, *args):
        pass

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def _answer(self):
        hub, route = self.hub, ROUTE.fullmatch(self.path)
        if route is None:  # Other questions of the library.
            return self._refuse(404, "Unknown")
        repository, kind = route["repo"] or route["owner"], route["kind"]
        what = {"revision": "info", "tree": "tree"}.get(kind, route["file"])
        hub.asked.append((self.command, repository, what, self.headers.get("Range")))
        if hub.status is not None:
            return self._refuse(hub.status, "Broken")
        if repository not in hub.repositories:
            return self._refuse(401, "RepoNotFound")
        commit = hub.commit(repository, (route["at"] or route["revision"]).replace("%2F", "/"))
        if commit is None:
            return self._refuse(404, "RevisionNotFound")
        files = hub.files(repository, commit)
        if kind == "revision":
            return self._send(json.dumps({"id": repository, "sha": commit,
                                          "siblings": [{"rfilename": name} for name in files]}).encode())
        if kind == "tree":
            return self._send(json.dumps([
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in files.items()]).encode())
        if repository in hub.gated:
            return self._refuse(403, "GatedRepo")
        if what not in files:
            return self._refuse(404, "EntryNotFound", commit)
        cut = next((cut for cut in hub.cuts if cut[0] == what and self.command == "GET"), None)
        if cut is not None:
            hub.cuts.remove(cut)
        return self._send(files[what], cut and cut[1], **{
            "X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(files[what]).hexdigest()}"'})

    def _refuse(self, status, code, commit=None):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        if commit is not None:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, content, cut=None, **headers):
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        headers["Content-Length"] = str(len(content) - start)
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.send_response(206 if start else 200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[start:][:cut])
