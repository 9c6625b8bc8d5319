"""A small hub on this machine: serves directories as repositories, and counts the bytes of every file."""

import contextlib
import hashlib
import json
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c0ffee" + "0" * 34


class Hub(ThreadingHTTPServer):
    """The repository `name` with the files of `directory`; `on_file` is told of each that is sent whole.

    Weights come from another host, as on the real hub, whose answer only says where they are.
    """

    daemon_threads = True

    def __init__(self, name, directory, commit=COMMIT):
        super().__init__(("127.0.0.1", 0), Answer)
        self.name, self.directory, self.commit = name, directory, commit
        self.sent = Counter()  # file -> bytes
        self.on_file = lambda file: None
        self.ranges = True  # or a request for a part of a file is answered with the whole
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def downloaded(self):
        """The weight files of which more than the header was sent."""
        return {
            file
            for file, count in self.sent.items()
            if file.endswith(".safetensors") and count > header_size(self.directory / file)
        }


class Answer(BaseHTTPRequestHandler):
    """Speaks what huggingface_hub asks for models."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        hub, path = self.server, self.path.partition("?")[0]
        if path.startswith(f"/api/models/{hub.name}/tree/"):
            files = [{"type": "file", "oid": "0", "path": p.name, "size": p.stat().st_size}
                     for p in hub.directory.iterdir()]  # fmt: skip
            return self.send(json.dumps(files).encode(), {})
        if path.startswith(f"/api/models/{hub.name}"):
            files = [{"rfilename": p.name} for p in hub.directory.iterdir()]
            text = json.dumps({"id": hub.name, "sha": hub.commit, "siblings": files})
            return self.send(text.encode(), {})
        match = re.fullmatch(rf"/(?:{hub.name}/resolve/[^/]+|(cdn))/(.+)", path)
        if match is None:
            return self.refuse("RepoNotFound")
        file = hub.directory / match[2]
        if file.suffix == ".safetensors" and file.is_file() and not match[1]:
            elsewhere = f"{hub.url.replace('127.0.0.1', 'localhost')}/cdn/{file.name}"
            linked = {"X-Linked-ETag": tag(file), "X-Linked-Size": str(file.stat().st_size)}
            return self.send(b"", {"Location": elsewhere, **linked}, status=302)
        return self.send_file(file, with_body) if file.is_file() else self.refuse("EntryNotFound")

    def send_file(self, file, with_body):
        data = file.read_bytes()
        tags = {"ETag": tag(file), "Accept-Ranges": "bytes"}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not part or not self.server.ranges:
            if with_body:
                self.server.on_file(file.name)
            return self.send(data, tags, with_body, file.name)
        first, last = int(part[1]), int(part[2] or len(data) - 1)
        tags["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        return self.send(data[first : last + 1], tags, with_body, file.name, 206)

    def send(self, data, headers, with_body=True, file="", status=200):
        self.send_response(status)
        named = {"X-Repo-Commit": self.server.commit, "Content-Length": str(len(data)), **headers}
        for name, value in named.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.server.sent[file] += len(data)
            with contextlib.suppress(ConnectionError):
                self.wfile.write(data)

    def refuse(self, code):
        self.send(b"", {"X-Error-Code": code}, status=404)


def tag(file):
    return f'"{hashlib.sha256(file.read_bytes()).hexdigest()}"'


def header_size(file):
    with file.open("rb") as opened:
        return 8 + int.from_bytes(opened.read(8), "little")


@contextlib.contextmanager
def serving(name, directory, **options):
    with Hub(name, directory, **options) as hub:
        threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True).start()
        yield hub
        hub.shutdown()
