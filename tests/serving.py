"""A real server, on a free port, in a thread of the tests."""

import contextlib
import http.client
import json
import threading
import time
from dataclasses import dataclass

from starlette.applications import Starlette

from ds4mlx.server.app import create_app
from ds4mlx.server.process import Server, config_of, open_socket, url_of
from ds4mlx.server.safety import Limits

PATIENCE = 60  # seconds after which a test gives up


@dataclass
class Served:
    """Where a server is, and what it is made of."""

    url: str
    port: int
    app: Starlette
    server: Server

    def ask(self, method, path, body=None, **headers):
        """(status, headers, body) of one request; a body that is no bytes is sent as JSON."""
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        if body is not None:
            headers = {"Content-Type": "application/json"} | headers
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()

    def json(self, method, path, body=None, **headers):
        """(status, JSON) of one request."""
        status, _, raw = self.ask(method, path, body, **headers)
        return status, json.loads(raw)


@contextlib.contextmanager
def serving(model, tokenizer, limits=None, **options):
    """A server of a model, until the block ends."""
    limits = limits or Limits()
    app = create_app(model, tokenizer, name="ds4-tiny", limits=limits, **options)
    opened = open_socket("127.0.0.1", 0)
    ready = threading.Event()
    server = Server(config_of(app, limits), app.state.service, ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]}, daemon=True)
    thread.start()
    assert ready.wait(PATIENCE), "the server does not start"
    try:
        yield Served(url_of(opened), opened.getsockname()[1], app, server)
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive(), "the server does not stop"


def until(condition):
    """Wait for something that a server does by itself."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.01)
