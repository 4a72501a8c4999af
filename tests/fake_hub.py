"""A Hub on the loopback interface: what huggingface_hub asks to make a repository, to upload and to download."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(ThreadingHTTPServer):
    """`files[repo][path]` is what it holds; `asked` the requests it got."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []
        self.made: list[dict] = []


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        self.server.asked.append(f"POST {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            self.server.made.append(asked)
            repo = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self.server.files.setdefault(repo, {})
            return self._json({"url": f"{self.server.endpoint}/{repo}", "id": repo, "name": repo})
        if self.path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            return self._json({"files": modes})
        if "/commit/" in self.path:
            repo = self.path.removeprefix("/api/models/").split("/commit/")[0]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.files[repo][line["value"]["path"]] = content
            return self._json({"commitUrl": f"{self.server.endpoint}/{repo}/commit/{COMMIT}", "commitOid": COMMIT})
        return self._json({"error": "not found"}, 404)

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body: bool = True):
        self.server.asked.append(f"{'GET' if body else 'HEAD'} {self.path}")
        path = self.path.partition("?")[0].strip("/")
        if "/resolve/" in path:
            repo, _, rest = path.partition("/resolve/")
            content = self.server.files.get(repo, {}).get(rest.partition("/")[2])
            if content is None:
                missing = "EntryNotFound" if repo in self.server.files else "RepoNotFound"
                return self._json({}, 404, {"X-Error-Code": missing, "X-Repo-Commit": COMMIT}, body)
            etag = hashlib.sha1(content).hexdigest()
            return self._send(content, 200, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, body)
        if path.startswith("api/models/"):
            repo = path.removeprefix("api/models/").partition("/revision/")[0]
            if repo in self.server.files:
                siblings = [{"rfilename": name} for name in self.server.files[repo]]
                return self._json({"id": repo, "sha": COMMIT, "siblings": siblings, "tags": []}, 200, {}, body)
        return self._json({}, 404, {"X-Error-Code": "EntryNotFound"}, body)

    def _json(self, value, status=200, headers=None, body=True):
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})}, body)

    def _send(self, content, status, headers, body=True):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)


@contextmanager
def fake_hub():
    hub = FakeHub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
