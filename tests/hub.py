"""A small Hugging Face hub on 127.0.0.1, for its real clients."""

import base64
import hashlib
import http.server
import io
import json
import threading
import urllib.parse


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers the requests of huggingface_hub and datasets, for models and for corpora.

    server.repos: {id: {path: bytes}}; a path that starts with @ is on the parquet branch.
    server.faults: faults of the next files sent, each used once; "cut" sends half of the file.
    server.ranges counts the range requests. Uploads go to server.repos too; server.refuses: the code that answers them.
    """

    protocol_version = "HTTP/1.1"

    def answer(self, body, code=200, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in {"Content_Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        kind = next(k for k in ("/api/datasets/", "/datasets/", "/api/models/", "/") if path.startswith(k))
        parts = path.removeprefix(kind).split("/")
        repo, rest = "/".join(parts[:2]), "/".join(parts[2:])
        if files := self.server.repos.get(repo):
            parquet = "refs/convert/parquet" in rest or "1" * 40 in rest
            verb, _, rest = rest.partition("/")
            for name in ("refs/convert/parquet", "main", "0" * 40, "1" * 40):
                if f"{rest}/".startswith(f"{name}/"):
                    rest = rest.removeprefix(name)
                    break
            rest = f"{verb}/{rest.strip('/')}"
            ours = {p.lstrip("@"): data for p, data in files.items() if p.startswith("@") == parquet}
            return (self.api if "api" in kind else self.file)(repo, ours, rest, str(int(parquet)) * 40)
        self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

    def do_POST(self):
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            self.body = b""
            while size := int(self.rfile.readline(), 16):
                self.body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            self.body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.partition("?")[0]
        if path == "/api/repos/create" or "/preupload/" in path or "/commit/" in path or path == "/api/validate-yaml":
            return self.upload(path)
        self.do_GET()

    def upload(self, path):
        if self.server.refuses:
            return self.answer({"error": "You are not allowed to do this"}, self.server.refuses)
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            wanted = json.loads(self.body)
            name = f"{wanted['organization']}/{wanted['name']}"
            self.server.repos.setdefault(name, {"README.md": b"new"})
            return self.answer({"url": f"http://{self.headers['Host']}/{name}"})
        repo = "/".join(path.split("/")[3:5])
        if "/preupload/" in path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(self.body)["files"]
            ]
            return self.answer({"files": files})
        for entry in map(json.loads, self.body.splitlines()):
            if entry["key"] == "file":
                self.server.repos[repo][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        url = f"http://{self.headers['Host']}/{repo}/commit/{'3' * 40}"
        self.answer({"success": True, "commitOid": "3" * 40, "commitUrl": url, "hookOutput": ""})

    do_HEAD = do_GET

    def file(self, repo, files, rest, commit):
        data = files.get(rest.removeprefix("resolve/"))
        if data is None:
            return self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
        about = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X_Repo_Commit": commit}
        if self.command == "GET" and self.server.faults and self.server.faults.pop(0) == "cut":
            self.close_connection = True
            return self.answer(data[: len(data) // 2], **about, Content_Length=len(data))
        if not (requested := self.headers.get("Range")):
            return self.answer(data, **about)
        self.server.ranges += 1
        begin, end = requested.removeprefix("bytes=").split("-")
        end = min(int(end or len(data)), len(data) - 1)
        part = data[int(begin) : end + 1]
        self.answer(part, 206, Content_Range=f"bytes {begin}-{end}/{len(data)}", **about)

    def api(self, repo, files, rest, commit):
        def entry(path):
            if path in files:
                return {"type": "file", "path": path, "size": len(files[path]), "oid": "2" * 40}
            return {"type": "directory", "path": path, "size": 0, "oid": "2" * 40}

        folders = {"/".join(p.split("/")[:n]) for p in files for n in range(1, p.count("/") + 1)}
        if rest.startswith("paths-info"):
            paths = urllib.parse.parse_qs(self.body.decode()).get("paths") or json.loads(self.body)["paths"]
            return self.answer([entry(p) for p in paths if p in files or p in folders])
        if rest.startswith("tree"):
            parent = rest.removeprefix("tree").strip("/")
            paths = [p for p in [*files, *folders] if p != parent and p.startswith(f"{parent}/" if parent else "")]
            if "recursive=true" not in self.path.lower():
                paths = [p for p in paths if "/" not in p[len(parent) :].strip("/")]
            return self.answer([entry(p) for p in paths])
        about = {"private": False, "gated": False, "disabled": False, "tags": [], "downloads": 0, "likes": 0}
        self.answer({"id": repo, "sha": commit, "siblings": [{"rfilename": p} for p in files], **about})

    def log_message(self, *a):
        pass


def parquet(rows: list[dict]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=100)
    return file.getvalue()


def start_hub(repos: dict[str, dict[str, bytes]]) -> tuple[http.server.ThreadingHTTPServer, dict[str, str]]:
    """Start a hub; returns the server and the environment variables that direct Hugging Face's clients to it."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repos, server.faults, server.ranges, server.refuses = repos, [], 0, 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_DISABLE_TELEMETRY": "1"}
