"""The interactive chat: messages and commands, from a pipe and from a person at a terminal."""

import io
import os
import signal

import processes
import pytest
from steering import text_of

from ds4mlx.cli.chat import as_command
from ds4mlx.cli.main import run
from ds4mlx.engine.conversation import Conversation
from ds4mlx.engine.sampling import Sampler

GREEDY = Sampler(temperature=0)


@pytest.fixture
def talk(talker):
    """A conversation to begin."""
    return lambda *options, **more: Conversation(*talker, GREEDY, *options, **more)


@pytest.fixture
def chat(talker_dir, monkeypatch, capsys):
    """Runs the chat on these lines in this process: exit code, stdout, stderr."""

    def chat(lines, *options):
        raw = lines if isinstance(lines, bytes) else lines.encode()
        stdin = io.TextIOWrapper(io.BytesIO(raw), "utf-8", errors="replace")
        monkeypatch.setattr("sys.stdin", stdin)
        arguments = ["chat", "-m", str(talker_dir), "--temp", "0", "--max-tokens", "6"]
        code = run([*arguments, *(options or ("--think", "none"))])
        return code, *capsys.readouterr()

    return chat


def answers(conversation, *messages):
    return "".join(f"{text_of(conversation.ask(message, 6))}\n" for message in messages)


# What is a command


@pytest.mark.parametrize(
    ("message", "command"),
    [
        ("/quit", ("/quit", "")),
        ("exit", ("/quit", "")),
        ("Quit ", ("/quit", "")),
        ("/exit", ("/quit", "")),
        ("help", ("/help", "")),
        ("?", ("/help", "")),
        ("/?", ("/help", "")),
        ("/help", ("/help", "")),
        ("/think  high ", ("/think", "high")),
        ("/system Be brief.\nBe kind.", ("/system", "Be brief.\nBe kind.")),
        ("/file a b", ("/file", "a b")),
        ("/what", ("/what", "")),
        ("/thinking high", ("/thinking", "high")),
        ("exit the loop how?", None),
        ("help me", None),
        ("what?", None),
        (" /help", None),
        (" exit", None),
        ("/etc/hosts what is this", None),
        ("/tmp", None),
        ("/tmp is full", None),
        ("/what/ever", None),
        ("// a comment", None),
        ("/* a comment */", None),
        ("/", None),
        ("/what\nis this", None),
        ("/usr/bin/env: no such file\nwhy?", None),
        ("", None),
    ],
)
def test_commands_and_messages(message, command):
    assert as_command(message) == command


# From a pipe


def test_turns_from_a_pipe(chat, talk):
    """Answers on stdout, one timing line each on stderr, and nothing else."""
    code, out, err = chat("one\n\ntwo\\\nlines\n/etc/hosts what is this")
    assert code == 0
    assert out == answers(talk("none"), "one", "two\nlines", "/etc/hosts what is this")
    assert len(err.splitlines()) == 3
    assert all(line.startswith("[prompt ") for line in err.splitlines())


def test_commands(chat, talk):
    lines = "one\n/reset\none\n/think none\none\n/what\nhelp\nexit\nnot read\n"
    code, out, err = chat(lines, "--think", "low", "--reasoning", "show")
    thoughtful, plain = talk("low"), talk("none")
    first = text_of(thoughtful.ask("one", 6))
    plain.messages = list(thoughtful.messages)
    shown = f"Reasoning:\n{first}\n"
    assert code == 0 and out == f"{shown}{shown}{text_of(plain.ask('one', 6))}\n"
    assert "the conversation is forgotten" in err and "thinking: none" in err
    assert "no such command: /what" in err
    assert err.count("/system TEXT") == 2


def test_a_command_says_what_it_takes(chat):
    _, out, err = chat("/think\n/think hard\n/file\n")
    assert out == "" and err.splitlines() == [
        "/think takes one of none, low, high, max",
        "/think takes one of none, low, high, max, not 'hard'",
        "/file takes the path of a file, and after it any text",
    ]


def test_a_system_text_stays_until_another_comes(chat, talk):
    lines = "/reset\none\n/system B\none\n/system\none\n"
    code, out, _ = chat(lines, "--system", "A", "--think", "none")
    want = [answers(talk("none", system), "one") for system in ("A", "B", None)]
    assert code == 0 and out == "".join(want)


def test_a_file_is_a_message(chat, talk, tmp_path):
    """With what follows its name; what cannot be read is one line, and the chat goes on."""
    spaced, plain = tmp_path / "a b.txt", tmp_path / "c.txt"
    spaced.write_text("one\ntwo\n")
    plain.write_text("three")
    (tmp_path / "raw").write_bytes(b"\xff")
    (tmp_path / "empty").write_text("\n")
    requests = [spaced, f"'{spaced}'", f"{plain} and four?", f'"{spaced}" and five?']
    requests += [tmp_path / "none", tmp_path, tmp_path / "raw", tmp_path / "empty", f"'{plain}"]
    code, out, err = chat("".join(f"/file {each}\n" for each in requests))
    text = "one\ntwo\n"
    sent = [text, text, "three\n\nand four?", f"{text}\n\nand five?"]
    assert code == 0 and out == answers(talk("none"), *sent)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    causes = ["none: No such file", "Is a directory", "not UTF-8", "is empty", "No such file"]
    assert len(errors) == len(causes)
    assert all(cause in error for cause, error in zip(causes, errors, strict=True))


def test_a_turn_that_fails_is_one_line_and_the_chat_goes_on(chat):
    code, out, err = chat(f"{'word ' * 70000}\none\n")
    error, timing = err.splitlines()
    assert error.startswith("error: ") and "exceed the context" in error
    assert code == 0 and out.strip() and timing.startswith("[prompt ")


def test_bytes_that_are_no_text_do_not_stop_the_chat(chat):
    code, _, err = chat(b"\xff\xfe\none\n")
    assert code == 0 and err.count("[prompt ") == 2


def test_ctrl_c_ends_the_answer_and_not_the_chat(talker_dir):
    arguments = ["chat", "-m", talker_dir, "--temp", "0", "--think", "none"]
    with processes.start(*arguments, "--max-tokens", "60000") as process:
        for question in (b"one\n", b"two\n"):
            process.stdin.write(question)
            assert process.stdout.read(1)
            process.send_signal(signal.SIGINT)
            assert process.stderr.readline().startswith(b"[prompt ")
            rest = process.stdout.read(1 << 16)  # all of it was written before the timing
            assert rest.endswith(b"\n")
        out, err = process.communicate(timeout=processes.PATIENCE)
    assert (process.returncode, out, err) == (0, b"", b"")


# At a terminal

FIGURES = r"\[prompt .* GB\]\r\n"
PASTE, PASTED = "\x1b[200~", "\x1b[201~"


# The prompt of a terminal that hands over keys as they are typed: what is typed earlier may be lost.
READY = r"\x1b\[\?2004h.*?> "


def at_terminal(talker_dir, home, length=3):
    options = ["--temp", "0", "--max-tokens", length]
    return processes.Terminal("chat", "-m", talker_dir, *options, XDG_STATE_HOME=home)


def prompt_tokens(shown):
    return int(shown.rpartition("[prompt ")[2].split()[0])


def test_a_chat_on_a_terminal(talker_dir, tmp_path):
    """Dim reasoning; Ctrl-C ends the answer, at the prompt the line; Ctrl-D leaves."""
    with at_terminal(talker_dir, tmp_path, 60000) as terminal:
        banner = terminal.until(READY)
        assert "converted: 4 layers" in banner and "65,536 tokens fits" in banner
        assert "/help lists the commands" in banner
        for question in ("one", "two"):
            terminal.type(f"{question}\r")
            terminal.until(rf"{question}.*\x1b\[2m.")
            terminal.type("\x03")
            assert "\x1b[0m\r\n[prompt " in terminal.until(FIGURES)
            terminal.until(READY)
        terminal.type("half a line")
        terminal.until("half a line")
        terminal.type("\x03")
        terminal.until(READY)
        terminal.type("\x04")
        code, _ = terminal.end()
    assert code == 0


def test_several_lines_are_one_message(talker_dir, talk, tmp_path):
    """Pasted, joined by a backslash, or by Alt-Enter: each is one turn with the same tokens."""
    conversation = talk("high")
    want = [next(conversation.ask("one\ntwo", 3)).prompt_tokens]
    with at_terminal(talker_dir, tmp_path) as terminal:
        terminal.until(READY)
        for typed in (f"{PASTE}one\r\ntwo\r\n{PASTED}\r", "one\\\rtwo\r", "one\x1b\rtwo\r"):
            terminal.type(typed)
            assert [prompt_tokens(terminal.until(FIGURES))] == want
            terminal.until(READY)
            terminal.type("/reset\r")
            terminal.until(rf"forgotten\r\n.*{READY}")


def test_what_is_typed_during_an_answer_waits_for_the_next_prompt(talker_dir, tmp_path):
    with at_terminal(talker_dir, tmp_path, 80) as terminal:
        terminal.until(READY)
        terminal.type("one\r")
        terminal.until(r"\x1b\[2m.")
        terminal.type(f"zebra{PASTE}\rzebra{PASTED}")
        assert "zebra" not in terminal.until(FIGURES)
        terminal.until("zebra.*zebra")
        terminal.type("\x15\x08\x15/quit\r")
        assert terminal.end()[0] == 0


def test_the_history_outlasts_the_session(talker_dir, tmp_path):
    """In a file that nobody else may read."""
    for keys in ("/reset\r", "\x1b[A\x1b[A\r"):
        with at_terminal(talker_dir, tmp_path) as terminal:
            terminal.until(READY)
            terminal.type(keys)
            terminal.until("forgotten")
            terminal.until(READY)
            terminal.type("exit\r")
            assert terminal.end()[0] == 0
    (history,) = tmp_path.rglob("chat-history")
    assert history.stat().st_mode & 0o777 == 0o600
    assert history.read_text().count("+/reset") == 2 and history.read_text().count("+exit") == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="a file in the way stops even the superuser")
def test_a_history_that_cannot_be_kept_does_not_stop_the_chat(talker_dir, tmp_path):
    (tmp_path / "ds4mlx").write_text("")
    with at_terminal(talker_dir, tmp_path) as terminal:
        terminal.until(READY)
        terminal.type("/quit\r")
        assert terminal.end()[0] == 0
