"""A server of official COCO on this machine, for tests of what is fetched from there."""

import hashlib
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from helpers import OFFICIAL_IDS, jpeg, official_archive

from common.data import official


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A COCO server; `server.moods[path]` lists what happens at the next requests for a file, then all is well."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.lstrip("/")
            own.asked.append(name)
            content = own.files.get(name)
            mood = own.moods[name].pop(0) if own.moods.get(name) else ""
            if mood == "busy" or content is None:
                return self.send_error(503 if mood else 404)
            if mood == "web page":
                content = b"<html>please log in</html>"
            if mood == "damaged":
                content = content[: len(content) // 2] + bytes(len(content) - len(content) // 2)
            if mood == "slow":
                time.sleep(0.3)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            if own.tagged:
                self.send_header("ETag", f'"{hashlib.md5(own.files[name]).hexdigest()}"')
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if mood == "drop" else content)
            if mood == "drop":
                self.wfile.flush()
                self.close_connection = True
            return None

        def log_message(self, *_):
            pass

    own = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    own.moods, own.asked, own.tagged = {}, [], True
    own.files = {official.ARCHIVE: official_archive()}
    own.files |= {f"{part}2017/{i:012d}.jpg": jpeg(i) for part, ids in OFFICIAL_IDS.items() for i in ids}
    threading.Thread(target=own.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("DETECTION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COCO_URL", f"http://127.0.0.1:{own.server_port}/")
    monkeypatch.setattr(official, "BACKOFF", 0.01)
    yield own
    own.shutdown()
    own.server_close()
