"""The real coding agents, two turns each, on a server whose model follows a script.

    python benchmarks/launched_agents.py [--results FILE]

Those that are on $PATH are run by `ds4mlx launch` in a home of their own, which has a configuration of
each: a question for which a file has to be read, then a second one in the same session. The model is
nearly nothing, so that a prompt of 30,000 tokens takes seconds on a CPU; what it draws is the call of a
tool that the agent offers, then, once the result has come, a sentence. Kept are the version, whether the
file's content came back, how many tokens of each prompt were reused, and whether the configuration is
as it was.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import mlx.core as mx

from ds4mlx import Model, ModelConfig
from ds4mlx.chat import encode_messages
from ds4mlx.chat.tokens import EOS
from ds4mlx.cli import opening
from ds4mlx.cli.clients import CLIENTS
from ds4mlx.cli.main import run
from ds4mlx.engine.chat_tokenizer import ChatTokenizer
from ds4mlx.engine.default_model import EMBEDDED
from ds4mlx.engine.sequence import Sequence

PORT, CONTEXT, PATIENCE = 8799, 200_000, 300
FILE, SECRET, SENTENCE = "notes.txt", "the tide turns at nine", "It says when the tide turns."
# A mark of the tool in a prompt, its name, and arguments that have it read the file.
TOOLS = (
    ('"name": "exec_command"', "exec_command", {"cmd": "cat {path}"}),
    ('"name": "Read"', "Read", {"file_path": "{path}"}),
    ('"filePath"', "read", {"filePath": "{path}"}),
    ('"name": "read"', "read", {"path": "{path}"}),
)
FIRST, SECOND = "What is in notes.txt?", "And what else?"
TURNS = {
    "claude": (["-p", FIRST], ["-c", "-p", SECOND]),
    "codex": (
        ["exec", "--skip-git-repo-check", FIRST],
        ["exec", "--skip-git-repo-check", "resume", "--last", SECOND],
    ),
    "opencode": (["run", FIRST], ["run", "-c", SECOND]),
    "pi": (["-p", FIRST], ["-c", "-p", SECOND]),
}
MINE = {
    ".claude/settings.json": '{"theme": "dark"}',
    ".codex/config.toml": 'model = "mine"\n',
    ".config/opencode/opencode.json": '{"$schema": "https://opencode.ai/config.json"}',
    ".pi/agent/settings.json": '{"defaultProvider": "anthropic"}',
}
SIZES = {
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 1,
    "o_groups": 1,
    "num_hash_layers": 0,
    "num_nextn_predict_layers": 0,
    "compress_ratios": (4,),
    "num_attention_heads": 1,
    "q_lora_rank": 32,
    "o_lora_rank": 32,
    "head_dim": 64,
    "qk_rope_head_dim": 32,
    "index_head_dim": 32,
    "index_n_heads": 1,
    "index_topk": 8,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "sliding_window": 32,
}


class Scripted(Sequence):
    """Draws what the script says, whatever the logits are; obeys a rule where there is one."""

    def __init__(self, tokens, state, tokenizer, **options):
        super().__init__(tokens, state, tokenizer, **options)
        answer = SENTENCE
        text = tokenizer.decode(list(tokens))
        if SECRET in text.rpartition("<｜User｜>")[2]:
            print("the content came back", file=sys.stderr, flush=True)
        elif "<tool_result>" not in text.rpartition("<｜User｜>")[2]:
            found = (call(name, given) for mark, name, given in TOOLS if mark in text)
            answer = next(found, SENTENCE)
        thought = "I look.</think>" if self.thinking else ""
        self.script = None if options.get("rule") else tokenizer.encode(thought + answer + EOS)

    def draw(self, logits, unread=0, proposal=None):
        if self.script is None:
            return super().draw(logits, unread, proposal)
        place = min(self.drawn + unread, len(self.script) - 1)
        return mx.array([self.script[place]], mx.int32)


def call(name, given):
    """The official text of a call."""
    given = {key: value.format(path=Path.cwd() / FILE) for key, value in given.items()}
    function = {"name": name, "arguments": json.dumps(given)}
    calls = [{"id": "call_1", "type": "function", "function": function}]
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": calls}]
    text = encode_messages(messages, thinking="none")
    return text.partition("</think>")[2].removesuffix(EOS)


def serve():
    """Run the scripted server in this process."""
    from ds4mlx.engine import running

    vocabulary = ModelConfig.from_file(EMBEDDED / "config.json").vocab_size
    model = Model(ModelConfig(**SIZES, vocab_size=vocabulary), mx.float32)
    model.identity = "scripted"
    mx.eval(model.parameters())
    running.Sequence = Scripted
    opening.open_model = lambda *_, **__: (model, ChatTokenizer.from_dir(EMBEDDED))
    opening.context = lambda *_: CONTEXT
    return run(["serve", "--port", str(PORT)])


def tried(name, home, log):
    """Two turns of one agent."""
    environment = {**os.environ, "HOME": str(home), "PWD": str(Path.cwd())}
    version = subprocess.run(
        [name, "--version"], capture_output=True, text=True, env=environment, check=False
    )
    found = {"version": version.stdout.strip() or version.stderr.strip(), "turns": []}
    for given in TURNS[name]:
        start = log.stat().st_size
        command = [
            sys.executable,
            "-m",
            "ds4mlx",
            "launch",
            name,
            "--port",
            str(PORT),
            "--",
            *given,
        ]
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=environment,
            timeout=PATIENCE,
            check=False,
        )
        said = log.read_text()[start:]
        prompts = re.findall(r"prompt (\d+) tokens, (none|\d+)", said)
        found["turns"].append(
            {
                "exit_code": done.returncode,
                "answered": SENTENCE in done.stdout,
                "tool_ran": "the content came back" in said,
                "prompts": [int(tokens) for tokens, _ in prompts],
                "reused": [0 if n == "none" else int(n) for _, n in prompts],
            }
        )
    return found


def main():
    """Try every agent that is there."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--serve", action="store_true")
    parser.add_argument("--results", type=Path)
    asked = parser.parse_args()
    if asked.serve:
        return serve()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        home, work, log = Path(folder) / "home", Path(folder) / "work", Path(folder) / "log"
        work.mkdir()
        (work / FILE).write_text(SECRET)
        for name, content in MINE.items():
            (home / name).parent.mkdir(parents=True)
            (home / name).write_text(content)
        kept = asked.results.resolve() if asked.results else None
        os.chdir(work)
        subprocess.run(["git", "init", "-q"], check=True)  # an agent's idea of a project
        with log.open("w") as errors:
            server = subprocess.Popen(
                [sys.executable, __file__, "--serve"], stdout=subprocess.PIPE, stderr=errors
            )
            assert server.stdout is not None
            server.stdout.readline()
            for name in CLIENTS:
                results[name] = tried(name, home, log) if shutil.which(name) else "not installed"
                print(name, json.dumps(results[name]), flush=True)
            server.terminate()
            server.wait()
        results["configuration_unchanged"] = all(
            (home / name).read_text() == content for name, content in MINE.items()
        )
    text = json.dumps(results, indent=1)
    print(text)
    if kept:
        kept.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
