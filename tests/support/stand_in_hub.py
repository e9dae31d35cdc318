"""A Hub on this machine: as much of its HTTP interface as uploading a model needs, kept in memory.

What `huggingface_hub` asks for, in the order in which it asks: make the repository, check the model card, say for each
file whether it goes to git or to LFS, take LFS files, take the commit.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

TOKEN = "hf_x"
COMMIT = "0" * 40


@dataclass
class StandInHub:
    """Repositories and all that was asked.

    Attributes:
        url: Where it listens.
        files: Bytes of each file, by repository.
        lfs_files: Names of those that came through LFS, by repository.
        requests: Method and path of each request.
        unauthorized: Requests to write something that came without the token.
        failing: Repositories whose commits fail with status 500.
    """

    url: str = ""
    files: dict = field(default_factory=dict)
    lfs_files: dict = field(default_factory=dict)
    requests: list = field(default_factory=list)
    unauthorized: list = field(default_factory=list)
    failing: set = field(default_factory=set)
    _objects: dict = field(default_factory=dict)

    def answer(self, method, path, body):
        """Return (status, headers, what to send as JSON or as bytes)."""
        for pattern, respond in self._ROUTES.items():
            match = re.fullmatch(pattern, f"{method} {path}")
            if match:
                return respond(self, body, *match.groups())
        return 404, {}, {"error": f"the stand-in Hub does not know {method} {path}"}

    def _create(self, body):
        request = json.loads(body)
        repo = f"{request['organization'] or 'somebody'}/{request['name']}"
        self.files.setdefault(repo, {})
        self.lfs_files.setdefault(repo, set())
        return 200, {}, {"url": f"{self.url}/{repo}", "name": repo, "id": "1"}

    def _validate_card(self, body):
        content = json.loads(body)["content"]
        if not content.startswith("---\n"):
            return 400, {}, {"errors": [{"message": "no metadata"}], "warnings": []}
        return 200, {}, {"errors": [], "warnings": []}

    def _preupload(self, body, repo):
        assert repo in self.files, f"{repo} was not made"
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        return 200, {}, {"files": files}

    def _lfs_batch(self, body, repo):
        objects = [
            {**wanted, "actions": {"upload": {"href": f"{self.url}/lfs/{repo}/{wanted['oid']}"}}}
            for wanted in json.loads(body)["objects"]
        ]
        return 200, {}, {"transfer": "basic", "objects": objects}

    def _lfs_upload(self, body, repo, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            return 400, {}, {"error": f"{repo}: not the object {oid}"}
        self._objects[oid] = body
        return 200, {}, {}

    def _commit(self, body, repo):
        if repo in self.failing:
            return 500, {}, {"error": "the stand-in Hub fails, as it was told to"}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "lfsFile":
                self.files[repo][value["path"]] = self._objects[value["oid"]]
                self.lfs_files[repo].add(value["path"])
            elif line["key"] == "file":
                assert value["encoding"] == "base64"
                self.files[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] != "header":
                return 400, {}, {"error": f"unknown {line['key']}"}
        return 200, {}, {"commitUrl": f"{self.url}/{repo}/commit/{COMMIT}", "commitOid": COMMIT}

    def _download(self, body, repo, name):
        del body
        content = self.files.get(repo, {}).get(name)
        if content is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, {"error": "Entry not found"}
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        return 200, headers, content

    _ROUTES = {  # noqa: RUF012  # not a field
        r"POST /api/repos/create": _create,
        r"POST /api/validate-yaml": _validate_card,
        r"POST /api/models/([^/]+/[^/]+)/preupload/main": _preupload,
        r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch": _lfs_batch,
        r"PUT /lfs/([^/]+/[^/]+)/([0-9a-f]{64})": _lfs_upload,
        r"POST /api/models/([^/]+/[^/]+)/commit/main": _commit,
        r"(?:GET|HEAD) /([^/]+/[^/]+)/resolve/main/(.+)": _download,
    }


@contextmanager
def running_hub():
    """Yield a `StandInHub` that listens while the block runs."""
    hub = StandInHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            path = urlsplit(self.path).path
            body = self._body()
            hub.requests.append(f"{self.command} {path}")
            # The address of an LFS upload has no token, as on the real Hub, where it is signed.
            writes = self.command == "POST" and path != "/api/validate-yaml"
            if writes and self.headers["Authorization"] != f"Bearer {TOKEN}":
                hub.unauthorized.append(f"{self.command} {path}")
            status, headers, content = hub.answer(self.command, path, body)
            payload = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(payload)

        do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815  # the names that http.server looks for

        def _body(self):
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)

        def log_message(self, *args):
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
