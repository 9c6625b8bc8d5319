"""What a server gives 1, 4 and 8 clients at once: a model of random weights at Flash's sizes, over HTTP.

    python benchmarks/serve_throughput.py [--layers N] [--recipe q2] [--small] [--results FILE]

Makes the model and a tokenizer of as many entries as Flash's in memory, serves them by the application
of `ds4mlx serve` in a thread, and asks from another process of this machine. A prompt has 1,024 tokens
and no beginning in common with another, an answer 128; tokens are drawn at temperature 1, so that each
sequence goes to experts of its own. Two speeds of all clients together: `tokens_per_s` from the first
request sent to the last token come, prompts included, and `decode_tokens_per_s` while all of them
decode. Of each its ratio to one client's and, for Flash's sizes as q2, the share of the limit: of what
reading the weights allows.

Imports numpy, mlx, gguf, pydantic, tokenizers, and of the server starlette, uvicorn with h11, sse-starlette,
prometheus-client, llguidance, and what these import: anyio, click, idna, typing-extensions.
"""

import argparse
import itertools
import json
import logging
import os
import random
import statistics
import string
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
from device import device
from tokenizers import AddedToken, decoders, pre_tokenizers
from tokenizers import Tokenizer as Encoder
from tokenizers.models import BPE

from ds4mlx.bench.synth import RECIPES, config_like, synth_model
from ds4mlx.chat import encode_ids
from ds4mlx.chat.tokens import CONTROL, DSML
from ds4mlx.config import ModelConfig
from ds4mlx.model.model import Model
from ds4mlx.server.app import create_app
from ds4mlx.server.process import Server, config_of, open_socket
from ds4mlx.server.safety import Limits
from ds4mlx.submission import submit_by_number
from ds4mlx.text.tokenizer import Tokenizer

CLIENTS = Path(__file__).parent / "serve_clients.py"
# Tokens a second of so many sequences over those of one, as far as reading the weights decides:
# 7.98 GB are read once, and 1.83 GB times the distinct experts over 6, by Flash with recipe q2.
LIMITS = {4: 2.61, 8: 3.65}
PROMPT, ANSWER, CONTEXT = 1024, 128, 4096
# Sizes for a CPU: a small model's, but of the whole vocabulary.
SMALL = {
    "hidden_size": 256,
    "moe_intermediate_size": 256,
    "num_attention_heads": 4,
    "head_dim": 128,
    "q_lora_rank": 64,
    "o_groups": 2,
    "o_lora_rank": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "index_n_heads": 4,
}


def main() -> None:
    """Measure, print as it comes, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--recipe", default="q2", choices=RECIPES)
    parser.add_argument("--small", action="store_true", help="a small model's sizes")
    parser.add_argument("--prompt", type=int, default=PROMPT)
    parser.add_argument("--answer", type=int, default=ANSWER)
    parser.add_argument("--clients", default="1,4,8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path)
    given = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    submit_by_number()  # as the command has it
    # Kernels whether or not they were compared on this machine, in the server's threads too.
    os.environ.setdefault("DS4MLX_KERNELS", "1")
    config = config_like("flash", given.layers).model_copy(update=SMALL if given.small else {})
    dtype = mx.bfloat16 if mx.default_device() == mx.gpu else mx.float32
    begun = time.perf_counter()
    model, tokenizer = synth_model(config, given.recipe, dtype), tokenizer_of(config)
    found = {
        "device": device(),
        "layers": config.num_hidden_layers,
        "recipe": given.recipe,
        "sizes": "small" if given.small else "flash",
        "made_in_s": round(time.perf_counter() - begun, 1),
        "prompt_tokens": given.prompt,
        "answer_tokens": given.answer,
        "rounds": given.rounds,
        "rows": [],
    }
    with serving(model, tokenizer) as port:
        asking = Asking(port, tokenizer, given.prompt, given.answer)
        asking.round(max(map(int, given.clients.split(","))))  # compiles what is compiled
        for count in map(int, given.clients.split(",")):
            found["rows"].append(asking.row(count, given.rounds))
            compare(found["rows"], LIMITS if given.recipe == "q2" and not given.small else {})
            print(json.dumps(found["rows"][-1]), flush=True)
            if given.results:
                given.results.write_text(json.dumps(found, indent=1) + "\n")


def tokenizer_of(config: ModelConfig) -> Tokenizer:
    """Byte-level BPE as long as the vocabulary: bytes, words of up to four letters, special tokens.

    Every word is the one before it and a letter more, so that all can be reached by merges.
    """
    special = [*CONTROL, DSML]
    known = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = (
        "".join(w) for n in (2, 3, 4) for w in itertools.product(string.ascii_lowercase, repeat=n)
    )
    known += itertools.islice(words, config.vocab_size - len(special) - len(known))
    merges = [(word[:-1], word[-1]) for word in known if len(word) > 1]
    encoder = Encoder(BPE({word: at for at, word in enumerate(known)}, merges))
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder.decoder = decoders.ByteLevel()
    encoder.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    first = len(known)
    return Tokenizer(encoder, first, first + 1)


@contextmanager
def serving(model: Model, tokenizer: Tokenizer) -> Iterator[int]:
    """A server of the model in a thread, until the block ends; its port."""
    limits, ready = Limits(), threading.Event()
    app = create_app(model, tokenizer, context=CONTEXT, limits=limits)
    opened = open_socket("127.0.0.1", 0)
    server = Server(config_of(app, limits), app.state.service, ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]}, daemon=True)
    thread.start()
    ready.wait()
    try:
        yield opened.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(60)


class Asking:
    """Rounds of questions to a server, no two the same."""

    def __init__(self, port: int, tokenizer: Tokenizer, prompt: int, answer: int):
        self._port, self._tokenizer, self._prompt, self._answer = port, tokenizer, prompt, answer
        self._random = random.Random(5)

    def row(self, clients: int, rounds: int) -> dict:
        """Medians over some rounds."""
        seen = [self.round(clients) for _ in range(rounds)]
        return {"clients": clients} | {
            name: round(statistics.median(each[name] for each in seen), 3) for name in seen[0]
        }

    def round(self, clients: int) -> dict[str, float]:
        """One answer for each of the clients."""
        asked = {"port": self._port, "bodies": [self._body() for _ in range(clients)]}
        command = [sys.executable, str(CLIENTS)]
        done = subprocess.run(
            command, input=json.dumps(asked), capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        return figures(json.loads(done.stdout))

    def _body(self) -> dict:
        """A question of exactly as many tokens: each digit is one, as words of digits have no merges."""
        message = {"role": "user", "content": ""}
        frame = len(encode_ids([message], self._tokenizer))
        message["content"] = "".join(self._random.choices(string.digits, k=self._prompt - frame))
        return {
            "model": "synthetic",
            "messages": [message],
            "reasoning_effort": "none",
            "temperature": 1,
            "seed": self._random.getrandbits(32),
            "max_tokens": self._answer,
        }


def figures(answers: list[dict]) -> dict[str, float]:
    """Speeds of all answers together, and how long each client waited for its first token."""
    tokens = sum(each["usage"]["completion_tokens"] for each in answers)
    whole = max(each["times"][-1] for each in answers) - min(each["sent"] for each in answers)
    begin = max(each["times"][0] for each in answers)
    end = min(each["times"][-1] for each in answers)
    within = sum(begin < moment <= end for each in answers for moment in each["times"])
    waits = [each["times"][0] - each["sent"] for each in answers]
    gaps = [b - a for each in answers for a, b in itertools.pairwise(each["times"])]
    return {
        "prompt_tokens": statistics.mean(each["usage"]["prompt_tokens"] for each in answers),
        "tokens": tokens,
        "tokens_per_s": tokens / whole,
        "decode_tokens_per_s": within / (end - begin) if end > begin else 0.0,
        "first_token_s": min(waits),
        "last_first_token_s": max(waits),
        "longest_gap_s": max(gaps),
    }


def compare(rows: list[dict], limits: dict[int, float]) -> None:
    """Adds to the last row its ratios to the first, and the shares of the limit that these are."""
    row, one = rows[-1], rows[0]
    for name in ("tokens_per_s", "decode_tokens_per_s"):
        ratio = row[name] / one[name] if one[name] else 0.0
        row[f"{name}_ratio"] = round(ratio, 3)
        if one["clients"] == 1 and row["clients"] in limits:
            row[f"{name}_share"] = round(ratio / limits[row["clients"]], 3)


if __name__ == "__main__":
    main()
