"""A server under mixed load: what its clients are told, and the memory that its process takes.

python soaking.py SECONDS [RESULTS]: converts the embedded model, serves it over a small store and in
little memory, so that states leave both all the time, and asks for so long. Writes figures as JSON.
Every answer is checked: a question that was asked before is answered as it was alone, and a new one
must be answered with a mark that is in no other.
"""

import argparse
import asyncio
import json
import random
import re
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

import processes
from asking import PATHS, ask, body_of, schema_of, sent, streamed, whole

KNOWN = ["adds two numbers", "sorts a list", "counts words", "reads a file", "reverses a text"]
WORDS = [
    "one",
    "two",
    "red",
    "blue",
    "cat",
    "dog",
    "runs",
    "sleeps",
    "in",
    "on",
    "the",
    "a",
    "old",
    "new",
    "tree",
    "house",
    "and",
    "or",
]
TALKS = ["chat", "messages", "responses"]
CLIENTS, MOST = 8, 10
# Tokens of an answer in JSON, which may have 65 of white space at each of four places.
ROOM = 320
# What the process may take for states beside the weights, and files in the store.
MEMORY, STORED = "540M", "8M"
# Words of a new question; the longest are saved in the store.
LENGTHS = [9, 9, 40, 40, 150, 600]
# The share of the time after which memory is not to grow.
WARM = 1 / 6


class Load:
    """Clients that ask until a time, and what went wrong."""

    def __init__(self, port, seed=1):
        self.port, self.random = port, random.Random(seed)
        self.counts, self.wrong = Counter(), []
        self.known = {}
        self.resident = []  # (seconds, bytes)

    async def learn(self, tasks=KNOWN):
        """Ask each of these questions alone."""
        for task in tasks:
            body = body_of("chat", self._known(task), MOST)
            self.known[task] = await whole(self.port, "chat", body)

    async def run(self, seconds, watched=None):
        """All clients at once. watched: the process whose memory is noted."""
        self.begun, self.until = time.monotonic(), time.monotonic() + seconds
        clients = [self._client() for _ in range(CLIENTS)]
        await asyncio.gather(*clients, *([self._watch(watched)] if watched else []))

    @property
    def over(self):
        """Whether no more is to be asked."""
        return time.monotonic() > self.until

    async def _client(self):
        kinds = [self._ask_known] * 3 + [self._ask_new] * 4 + [self._call, self._look]
        kinds += [self._cancel] * 2 + [self._chain]
        while not self.over:
            kind = self.random.choice(kinds)
            try:
                await asyncio.wait_for(kind(), 120)
                self.counts[kind.__name__.strip("_")] += 1
            except Exception as error:  # noqa: BLE001 - whatever it is, it is told in the end
                self.wrong.append(f"{kind.__name__}: {error!r:.500}")

    async def _watch(self, process):
        while not self.over:
            self.resident.append((time.monotonic() - self.begun, resident_bytes(process)))
            await asyncio.sleep(0.5)

    # Kinds of questions

    async def _ask_known(self):
        task, protocol = self.random.choice([*self.known]), self.random.choice(TALKS)
        reading = self.random.choice([streamed, whole])
        text = await reading(self.port, protocol, body_of(protocol, self._known(task), MOST))
        assert text == self.known[task], (protocol, reading.__name__, task, text, self.known[task])

    async def _ask_new(self):
        """A new conversation of two turns."""
        protocol, mark = self.random.choice(TALKS), self._mark()
        talk = [{"role": "user", "content": f"{mark} {self._words()}"}]
        for _ in range(2):
            form = schema_of(protocol, marked(mark))
            reading = self.random.choice([streamed, whole])
            text = await reading(self.port, protocol, body_of(protocol, talk, ROOM, **form))
            assert json.loads(text) == {"mark": mark}, (protocol, mark, text)
            talk += [{"role": "assistant", "content": text}, {"role": "user", "content": "Again."}]

    async def _call(self):
        mark = self._mark()
        function = {"name": "note", "parameters": marked(mark)}
        tools = {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}
        body = body_of("chat", f"Note {mark}.", ROOM, parallel_tool_calls=False, **tools)
        status, told = await ask(self.port, "POST", PATHS["chat"], body)
        assert status == 200, told
        (call,) = told["choices"][0]["message"]["tool_calls"]
        assert json.loads(call["function"]["arguments"]) == {"mark": mark}, (mark, call)

    async def _chain(self):
        """A response that is kept, gone on from, and forgotten."""
        mark = self._mark()
        body = body_of("responses", f"{mark} {self._words()}", ROOM)
        body |= schema_of("responses", marked(mark))
        for _ in range(2):
            status, told = await ask(self.port, "POST", PATHS["responses"], body)
            assert status == 200, told
            text = told["output"][-1]["content"][0]["text"]
            assert json.loads(text) == {"mark": mark}, (mark, text)
            again = [{"role": "user", "content": "Again."}]
            body |= {"input": again, "previous_response_id": told["id"]}
        where = f"{PATHS['responses']}/{told['id']}"
        assert (await ask(self.port, "GET", where))[1] == told
        assert (await ask(self.port, "DELETE", where))[1]["deleted"]
        assert (await ask(self.port, "GET", where))[0] == 404

    async def _look(self):
        for path in ("/health", "/metrics", "/v1/models", "/"):
            status, told = await ask(self.port, "GET", path)
            assert status == 200, told
        body = {"messages": [{"role": "user", "content": self._words()}]}
        status, told = await ask(self.port, "POST", "/v1/messages/count_tokens", body)
        assert status == 200 and told["input_tokens"] > 10, told

    async def _cancel(self):
        """Leave before the end: while the question waits, is read, or is answered."""
        protocol = self.random.choice([*TALKS, "completions"])
        stream = self.random.random() < 0.7
        body = body_of(protocol, f"{self._mark()} {self._words()}", 2000, stream=stream)
        reader, writer = await sent(self.port, "POST", PATHS[protocol], body)
        try:
            for _ in range(self.random.choice([0, 1, 9, 30]) if stream else 0):
                await reader.readline()
            if not stream:
                await asyncio.sleep(self.random.random())
        finally:
            writer.close()

    def _known(self, task):
        return f"Write a function that {task}."

    def _mark(self):
        return f"m{self.random.getrandbits(40):010x}"

    def _words(self):
        return " ".join(self.random.choices(WORDS, k=self.random.choice(LENGTHS)))


def marked(mark):
    """The schema of an object that holds a mark."""
    properties = {"mark": {"type": "string", "const": mark}}
    return {
        "type": "object",
        "properties": properties,
        "required": ["mark"],
        "additionalProperties": False,
    }


def resident_bytes(process):
    """Bytes of a process that are in memory."""
    text = Path(f"/proc/{process}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", text)[1]) << 10


def growth(resident):
    """(bytes soon after the beginning, bytes at the end): medians of a fifth of what follows WARM."""
    warm = [taken for seconds, taken in resident if seconds > WARM * resident[-1][0]]
    fifth = max(len(warm) // 5, 1)
    return statistics.median(warm[:fifth]), statistics.median(warm[-fifth:])


async def until_idle(port):
    """What the server says of itself when nothing goes on any more. Raises AssertionError."""
    for _ in range(600):
        told = (await ask(port, "GET", "/health"))[1]
        if not told["running"] + told["waiting"]:
            return told
        await asyncio.sleep(0.1)
    raise AssertionError(f"the server goes on: {told}")


def soak(model, store, seconds):
    """Figures of a server process of that model under load for so long."""
    options = ["-m", model, "--port", "0", "--dtype", "float32", "--ctx", "4096"]
    options += ["--kv-dir", store, "--kv-budget", STORED]
    server = processes.start("serve", *options, DS4MLX_MEMORY=MEMORY)
    drain = None
    try:
        line = server.stdout.readline().decode()
        load = Load(int(line.strip().rpartition(":")[2]))

        async def main():
            nonlocal drain
            drain = asyncio.create_task(asyncio.to_thread(server.stderr.read))
            await load.learn()
            await load.run(seconds, watched=server.pid)
            told = await until_idle(load.port)
            figures = (await ask(load.port, "GET", "/metrics"))[1].decode()
            server.terminate()
            log = (await drain).decode()
            return told, figures, log

        told, metrics, log = asyncio.run(main())
        code = server.wait(processes.PATIENCE)
    finally:
        server.kill()
    first, last = growth(load.resident)
    counters = re.findall(r"^ds4mlx_(\w+)_total (\S+)", metrics, re.MULTILINE)
    return {
        "seconds": seconds,
        "clients": CLIENTS,
        "asked": dict(load.counts),
        "wrong": load.wrong,
        "exit_code": code,
        "errors_in_log": [
            text for text in log.splitlines() if " ERROR " in text or "Error" in text
        ],
        "counters": {name: int(float(value)) for name, value in counters},
        "state_bytes": told["state_bytes"],
        "store_bytes": told["store_bytes"],
        "resident_after_warming_mb": round(first / 1e6, 1),
        "resident_at_the_end_mb": round(last / 1e6, 1),
        "resident_mb": [
            [round(at), round(taken / 1e6, 1)]
            for at, taken in load.resident[:: max(len(load.resident) // 20, 1)]
        ],
    }


if __name__ == "__main__":
    from ds4mlx.convert import convert
    from ds4mlx.engine.default_model import EMBEDDED

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seconds", type=float)
    parser.add_argument("results", type=Path, nargs="?")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        converted = Path(folder) / "model"
        convert(EMBEDDED, converted, progress=False)
        found = soak(converted, Path(folder) / "store", given.seconds)
    text = json.dumps(found, indent=1) + "\n"
    print(text)
    if given.results:
        given.results.write_text(text)
