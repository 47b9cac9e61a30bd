"""A hub on 127.0.0.1 that the real clients take for the real one, with faults to order, and a process that asks it.

It serves ROOT/models/USER/NAME and ROOT/datasets/USER/NAME. As on the real hub, large files are sent from another host
(to a client 127.0.0.1 and localhost are two), and their size and ETag stand in the answer that names it.
"""

import fnmatch
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from helpers import ROOT

LARGE = {".safetensors", ".parquet"}
DATE = "2026-01-01T00:00:00.000Z"
REFUSALS = {"busy": (429, ""), "gated": (401, "GatedRepo"), "missing": (404, "RepoNotFound")}


class Fault(NamedTuple):
    """It befalls the first `times` requests whose "METHOD /path" fits the glob `on`, 0 = all of them."""

    kind: str  # of REFUSALS; break: the body ends in its middle; late: after `wait` seconds; foreign: no hub's headers
    on: str
    times: int = 0
    wait: float = 1.0


class Loopback(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, root):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.address = root, f"http://127.0.0.1:{self.server_address[1]}"
        self.order()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def order(self, fault=None):
        """From now on with this fault; the log of requests begins anew."""
        self.fault, self.log, self.revision = fault, [], "main"

    def move(self):
        """From now on `main` is another commit, and the earlier ones are gone."""
        self.revision = "later"

    def commit(self, repository):
        return hashlib.sha1(f"{repository} {self.revision}".encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        hub, path = self.server, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request, fault = f"{self.command} {path}", hub.fault
        befallen = [line for line in hub.log if line.endswith("!")]
        is_due = fault and fnmatch.fnmatchcase(request, fault.on) and not 0 < fault.times <= len(befallen)
        hub.log.append(request + "!" * bool(is_due))
        self.kind = fault.kind if is_due else ""
        if self.kind == "late":
            time.sleep(fault.wait)
        with suppress(ConnectionError):
            if self.kind in REFUSALS:
                status, code = REFUSALS[self.kind]
                self.answer(status, b"{}", {"Retry-After": f"{fault.wait:.0f}", "X-Error-Code": code})
            else:
                self.route(path.strip("/").split("/"), body)

    do_HEAD = do_POST = do_GET

    def log_message(self, *_):
        pass

    def route(self, parts, body):
        is_api, hub = parts[0] == "api", self.server
        if parts[0] == "cdn":
            return self.send_file(next(f for f in hub.root.rglob("*") if f.is_file() and etag(f) == parts[1]), {})
        if is_api or parts[0] == "datasets":
            kind, *rest = parts[is_api:]
        else:
            kind, rest = "models", parts
        repository, rest = "/".join((kind, *rest[:2])), rest[2:]
        commit, folder = hub.commit(repository), hub.root / repository
        if not folder.is_dir():
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if rest[1:] and rest[1] not in ("main", commit):
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if not is_api:
            return self.resolve(folder / "/".join(rest[2:]), commit)
        entries = [_entry(file, folder) for file in sorted(folder.rglob("*"))]
        if rest[:1] == ["tree"]:
            content = [entry for entry in entries if entry["path"].startswith("/".join(rest[2:]))]
        elif rest[:1] == ["paths-info"]:
            wanted = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode())["paths"]
            content = [entry for entry in entries if entry["path"] in wanted]
        else:
            siblings = [{"rfilename": e["path"], "size": e["size"]} for e in entries if e["type"] == "file"]
            content = {"_id": commit[:24], "id": "/".join(repository.split("/")[1:]), "sha": commit, "private": False}
            content |= {"lastModified": DATE, "createdAt": DATE, "tags": [], "siblings": siblings}
        self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def resolve(self, file, commit):
        headers = {"X-Repo-Commit": commit} if self.kind != "foreign" else {}
        if not file.is_file():
            return self.answer(404, b"", headers | {"X-Error-Code": "EntryNotFound"})
        if file.suffix not in LARGE or self.kind == "foreign":
            return self.send_file(file, headers)
        headers |= {"X-Linked-ETag": f'"{etag(file)}"', "X-Linked-Size": str(file.stat().st_size)}
        address = self.server.address.replace("127.0.0.1", "localhost")
        self.answer(302, b"", headers | {"Location": f"{address}/cdn/{etag(file)}"})

    def send_file(self, file, headers):
        body, wanted = file.read_bytes(), self.headers.get("Range", "").removeprefix("bytes=")
        headers |= {"ETag": f'"{etag(file)}"', "Accept-Ranges": "bytes"}
        if not wanted:
            return self.answer(200, body, headers)
        low, _, high = wanted.partition("-")
        first = int(low) if low else max(0, len(body) - int(high))
        last = min(int(high), len(body) - 1) if low and high else len(body) - 1
        headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
        self.answer(206, body[first : last + 1], headers)

    def answer(self, status, body, headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if self.kind == "break" else body)
        self.close_connection |= self.kind == "break"


def etag(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _entry(file, folder):
    entry = {"path": file.relative_to(folder).as_posix(), "oid": "0" * 40, "size": 0, "type": "directory"}
    if file.is_file():
        size = file.stat().st_size
        lfs = {"lfs": {"oid": etag(file), "size": size, "pointerSize": 134}} if file.suffix in LARGE else {}
        entry |= {"type": "file", "size": size, **lfs}
    return entry


class Worker:
    """Runs scripts against a hub, each in a fork of one process that has imported the libraries."""

    LOOP = """
import json, os, runpy, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
import comprehensive_validation, improved_dino_detector
for line in sys.stdin:
    folder, log, words = json.loads(line)
    if (child := os.fork()) == 0:
        os.chdir(folder)
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(1, 2)
        sys.argv = words
        try:
            runpy.run_path(words[0], run_name="__main__")
            status = 0
        except SystemExit as error:
            status = error.code
        sys.stdout.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)
"""

    def __init__(self, address, folder):
        self.folder = folder
        names = {"HF_HOME": "hf", "DETECTION_CACHE": "cache", "YOLO_CONFIG_DIR": "yolo"}
        self.environment = os.environ | {name: str(folder / value) for name, value in names.items()}
        self.environment |= {"HF_ENDPOINT": address, "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1"}
        self.environment["NO_PROXY"] = self.environment["no_proxy"] = "127.0.0.1,localhost"
        self.environment.pop("HF_HUB_OFFLINE", None)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": self.environment}
        self.process = subprocess.Popen([sys.executable, "-c", self.LOOP], **pipes)

    def run(self, script, *words, offline=False):
        """The exit status of a script, what it printed, and the seconds that it took."""
        log, began = self.folder / "log.txt", time.perf_counter()
        command = [str(ROOT / script), *map(str, words)]
        if offline:  # which the clients read when they are imported
            environment = self.environment | {"HF_HUB_OFFLINE": "1"}
            options = {"cwd": self.folder, "env": environment, "capture_output": True, "text": True}
            done = subprocess.run([sys.executable, *command], **options)
            return done.returncode, done.stdout + done.stderr, time.perf_counter() - began
        self.process.stdin.write(json.dumps([str(self.folder), str(log), command]) + "\n")
        self.process.stdin.flush()
        status = int(self.process.stdout.readline())
        return status, Path(log).read_text(), time.perf_counter() - began
