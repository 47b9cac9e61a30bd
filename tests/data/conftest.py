"""A cache for each test, and a server of official COCO on this machine."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from helpers import OFFICIAL_IDS, jpeg, official_archive

from common.data import official


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("DETECTION_CACHE", str(folder))
    return folder


@pytest.fixture
def server(monkeypatch):
    """A COCO server; `server.faults[path]` lists what happens at the next requests for a file, then all is well."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.lstrip("/")
            own.requested.append(name)
            content = own.files.get(name)
            fault = own.faults[name].pop(0) if own.faults.get(name) else ""
            if fault == "busy" or content is None:
                return self.send_error(503 if fault else 404)
            if fault == "web page":
                content = b"<html>please log in</html>"
            if fault == "slow":
                time.sleep(0.3)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if fault == "drop" else content)
            if fault == "drop":
                self.wfile.flush()
                self.close_connection = True
            return None

        def log_message(self, *_):
            pass

    own = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    own.faults, own.requested = {}, []
    own.files = {official.ARCHIVE: official_archive()}
    own.files |= {f"{part}2017/{i:012d}.jpg": jpeg(i) for part, ids in OFFICIAL_IDS.items() for i in ids}
    threading.Thread(target=own.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("COCO_URL", f"http://127.0.0.1:{own.server_port}/")
    monkeypatch.setattr(official, "BACKOFF_S", 0.01)
    yield own
    own.shutdown()
    own.server_close()
