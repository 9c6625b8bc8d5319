"""An agent at work: thirty turns with real tools, and everything that costs other servers a prefix.

The model is too small to choose its tools well: each turn names the tool that it has to call, and
the tools' schemas what it may write.
"""

import contextlib
import re
import signal

import anthropic
import processes
import pytest

NAMES = ["a.py", "b.py", "c.py"]
TEXTS = ["x = 1", "y = 2", "z = x + y"]
# Tokens at the end of a state that are not saved, at most.
TAIL = 160
SYSTEM = "You write small programs. " + "Say what you do, and do it. " * 20
NAME = {"type": "string", "enum": NAMES}
TOOLS = [
    ("write_file", "Writes a file.", {"path": NAME, "text": {"type": "string", "enum": TEXTS}}),
    ("read_file", "Reads a file.", {"path": NAME}),
    ("list_files", "Lists the files.", {}),
]
SCHEMAS = [
    {
        "name": name,
        "description": said,
        "input_schema": {"type": "object", "properties": keys, "required": list(keys)},
    }
    for name, said, keys in TOOLS
]


class Tools:
    """What the tools do in a folder."""

    def __init__(self, folder):
        self.folder = folder

    def write_file(self, path, text):
        (self.folder / path).write_text(text)
        return f"{len(text)} characters written"

    def read_file(self, path):
        found = self.folder / path
        return found.read_text() if found.exists() else f"{path} is not there"

    def list_files(self):
        return "\n".join(sorted(each.name for each in self.folder.iterdir()))


class Machine:
    """The server as a process that may be stopped and started again, over one store."""

    def __init__(self, model, store):
        self.options = ["-m", model, "--port", "0", "--dtype", "float32", "--kv-dir", store]
        self.process = None

    def start(self):
        self.process = processes.start("serve", *self.options)
        line = self.process.stdout.readline().decode()
        url = re.search(r"http://\S+", line)
        assert url, line + self.process.stderr.read().decode()
        patience = {"max_retries": 0, "timeout": processes.PATIENCE}
        return anthropic.Anthropic(base_url=url[0], api_key="none", **patience)

    def end(self, number):
        """Send a signal, and wait for the end."""
        if self.process is None:
            return None
        self.process.send_signal(number)
        self.process.communicate(timeout=processes.PATIENCE)
        code, self.process = self.process.returncode, None
        return code


class Agent:
    """A conversation with tools, and what its prompts took."""

    def __init__(self, tools, task):
        self.tools, self.messages = tools, [{"role": "user", "content": task}]
        self.prompts, self.cached, self.known = [], [], 0
        self.client = None

    def turn(self, name):
        """One call of a tool, carried out; how many tokens of the turn's prompt were not known."""
        answer = self.client.messages.create(
            model="any",
            max_tokens=100,
            system=self.system(),
            messages=self.messages,
            tools=SCHEMAS,
            tool_choice={"type": "tool", "name": name, "disable_parallel_tool_use": True},
            extra_body={"temperature": 0},
        )
        (call,) = answer.content
        result = getattr(self.tools, call.name)(**call.input)
        usage = answer.usage
        prompt = usage.input_tokens + usage.cache_read_input_tokens
        self.prompts.append(prompt)
        self.cached.append(usage.cache_read_input_tokens)
        self.known = prompt + usage.output_tokens
        told = {"type": "tool_result", "tool_use_id": call.id, "content": result}
        self.messages += [answer.to_param(), {"role": "user", "content": [told]}]
        return usage.input_tokens

    def system(self):
        """Its header line changes with every request, and the mark of what to cache moves."""
        header = f"x-anthropic-billing-header: cc_version=1; cch={len(self.prompts)};"
        last = {"cache_control": {"type": "ephemeral"}} if len(self.prompts) % 2 else {}
        return [{"type": "text", "text": header}, {"type": "text", "text": SYSTEM, **last}]

    def turns(self, count):
        """Turns that go on exactly where the one before has ended, its last token aside."""
        for _ in range(count):
            known = self.known
            self.turn(TOOLS[len(self.prompts) % 3][0])
            assert self.cached[-1] >= known - 1


@pytest.fixture
def machine(embedded_plain, tmp_path):
    made = Machine(embedded_plain, tmp_path / "kv")
    yield made
    with contextlib.suppress(ProcessLookupError):
        made.end(signal.SIGKILL)


@pytest.mark.slow
def test_thirty_turns(machine, tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    main, helper = Agent(Tools(folder), "Write two programs."), Agent(Tools(folder), "Look.")
    main.client = helper.client = machine.start()
    main.turns(7)
    retried = main.messages[:-2]
    main.messages = retried  # the answer was lost on its way
    main.turn("write_file")
    assert main.cached[-1] >= main.prompts[-1] - 1
    helper.turn("list_files")
    assert helper.cached[-1] >= 0.8 * helper.prompts[-1]
    main.turns(3)
    helper.turns(2)

    assert machine.end(signal.SIGTERM) == 0
    main.client = helper.client = machine.start()
    known = main.known
    main.turn("list_files")
    assert main.cached[-1] >= known - TAIL
    main.turns(3)

    edited = [*main.messages[:8], {"role": "user", "content": "Now read them."}]
    edited[7:8] = []
    main.messages = edited
    main.turn("read_file")
    assert main.cached[-1] >= 0.6 * main.prompts[-1]
    main.turns(3)

    machine.end(signal.SIGKILL)
    main.client = helper.client = machine.start()
    main.turn("list_files")
    assert main.cached[-1] > 0
    main.turns(2)

    summary = "So far: " + ", ".join(sorted(each.name for each in folder.iterdir()))
    main.messages = [{"role": "user", "content": summary}]
    main.turn("read_file")
    assert main.cached[-1] >= 0.7 * main.prompts[-1]
    main.turns(4)

    assert len(main.prompts) + len(helper.prompts) == 30
    prompts, cached = main.prompts + helper.prompts, main.cached + helper.cached
    assert sum(cached) >= 0.9 * sum(prompts), list(zip(cached, prompts, strict=True))
    assert {each.name for each in folder.iterdir()} <= set(NAMES)
