"""What is written around a generation's text, on a terminal and elsewhere."""

import gc
import io

import pytest

from ds4mlx import stream_generate
from ds4mlx.cli.answer import WITHHELD, show, timing
from ds4mlx.cli.printer import DIM, PLAIN, Printer
from ds4mlx.cli.terminal import ERASE, progress
from ds4mlx.engine.generation import Response


class Screen(io.StringIO):
    """A terminal that shows nothing."""

    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def capable(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")


def written(out, pieces, reasoning=True, shown=None):
    printer = Printer(out, reasoning, shown)
    for piece in pieces:
        printer.write(piece)
    printer.close()
    return out.getvalue()


# The same text in the pieces that tokens may bring it in.
PIECES = [
    ["why it is</think>so"],
    ["why", " it is", "</think>", "so"],
    ["why it is</th", "ink>so"],
    list("why it is</think>so"),
]


@pytest.mark.parametrize("pieces", PIECES)
def test_elsewhere_only_the_answer_is_written(pieces):
    assert written(io.StringIO(), pieces) == written(Screen(), pieces, shown=False) == "so\n"


@pytest.mark.parametrize("pieces", PIECES)
def test_on_a_terminal_the_reasoning_is_dim(pieces):
    assert written(Screen(), pieces) == f"{DIM}why it is{PLAIN}\n\nso\n"


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb"), (None, None)])
def test_without_styles_words_tell_the_two_apart(monkeypatch, name, value, pieces):
    if name:
        monkeypatch.setenv(name, value)
    out = Screen() if name else io.StringIO()
    assert written(out, pieces, shown=True) == "Reasoning:\nwhy it is\n\nAnswer:\nso\n"


@pytest.mark.parametrize(
    ("text", "dim", "words", "hidden"),
    [
        ("why", f"{DIM}why{PLAIN}\n", "Reasoning:\nwhy\n", ""),
        ("why</thi", f"{DIM}why</thi{PLAIN}\n", "Reasoning:\nwhy</thi\n", ""),
        ("</think>so", "so\n", "so\n", "so\n"),
        ("why</think>", f"{DIM}why{PLAIN}\n\n", "Reasoning:\nwhy\n\nAnswer:\n", ""),
        ("a<b</think>c</think>", f"{DIM}a<b{PLAIN}\n\nc</think>\n",
            "Reasoning:\na<b\n\nAnswer:\nc</think>\n", "c</think>\n"),
        ("", "", "", ""),
    ],
)  # fmt: skip
def test_edges_of_the_reasoning(text, dim, words, hidden):
    for pieces in ([text], list(text)):
        assert written(Screen(), pieces) == dim
        assert written(io.StringIO(), pieces, shown=True) == words
        assert written(io.StringIO(), pieces) == hidden


def test_without_reasoning_the_text_is_as_it_is():
    for out in (Screen(), io.StringIO()):
        assert written(out, ["a</thi", "nk>b"], reasoning=False) == "a</think>b\n"


def test_hidden_reasoning_is_a_count_that_vanishes(monkeypatch):
    monkeypatch.setattr("sys.stderr", screen := Screen())
    assert written(io.StringIO(), ["why", "</think>", "so"]) == "so\n"
    assert screen.getvalue() == f"{ERASE}reasoning: 3 characters{ERASE}"


def test_an_answer_that_is_all_reasoning_is_explained(talker, capsys):
    """Where it is not shown; the figures come first."""
    for shown, notes in ((False, [WITHHELD]), (True, [])):
        show(stream_generate(*talker, "ab", 5), Printer(io.StringIO(), True, shown))
        figures, *rest = capsys.readouterr().err.splitlines()
        assert figures.startswith("[prompt ") and rest == notes


@pytest.mark.parametrize(
    ("pieces", "want"),
    [([], ""), ([""], ""), (["a"], "a\n"), (["a\n"], "a\n"), (["a", "\n", ""], "a\n")],
)
def test_one_line_end_closes_the_text(pieces, want):
    assert written(io.StringIO(), pieces, reasoning=False) == want


def test_an_interrupted_line_ends_after_the_mark_of_ctrl_c():
    for out, want in ((Screen(), "a\n\n"), (io.StringIO(), "a\n")):
        printer = Printer(out, reasoning=False)
        printer.write("a\n")
        printer.close(interrupted=True)
        assert out.getvalue() == want


def test_text_is_shown_at_once(talker):
    """Every response is out before the next is made, and none is collected."""
    out, told = io.StringIO(), []

    def keep(response):
        told.append(response.text)
        assert out.getvalue() == "".join(told)
        assert sum(type(thing) is Response for thing in gc.get_objects()) <= 2

    last, interrupted = show(stream_generate(*talker, "ab", 20), Printer(out, False), keep)
    assert last.generation_tokens == len(told) == 20 and not interrupted


def interrupted_by(responses, after):
    for count, response in enumerate(responses):
        if count == after:
            raise KeyboardInterrupt
        yield response


def test_ctrl_c_ends_what_is_shown(talker):
    out = Screen()
    answer = interrupted_by(stream_generate(*talker, "ab", 20), 3)
    last, interrupted = show(answer, Printer(out, reasoning=True))
    assert interrupted and last.generation_tokens == 3
    assert out.getvalue().startswith(DIM) and out.getvalue().endswith(f"{PLAIN}\n")
    assert show(interrupted_by(iter("x"), 0), Printer(io.StringIO(), True)) == (None, True)


def test_a_failure_leaves_the_terminal_undimmed(talker):
    def broken():
        yield next(stream_generate(*talker, "ab"))
        raise RuntimeError("broken")

    out = Screen()
    with pytest.raises(RuntimeError):
        show(broken(), Printer(out, reasoning=True))
    assert out.getvalue().endswith(f"{PLAIN}\n")


def test_the_timing_says_why_an_answer_is_cut(talker):
    first, *_, last = stream_generate(*talker, "ab", 5)
    assert timing(last).startswith(f"[prompt {last.prompt_tokens} tokens, ")
    assert "| generated 5 tokens, " in timing(last) and "(cut: --max-tokens)" in timing(last)
    assert "| generated 1 tokens |" in timing(first)


def test_progress_is_a_line_that_vanishes(monkeypatch):
    screen = Screen()
    monkeypatch.setattr("sys.stderr", screen)
    for done in (2048, 4096, 5000):
        progress("prompt", "tokens", done, 5000)
    shown = ["", "prompt: 2,048 of 5,000 tokens", "prompt: 4,096 of 5,000 tokens", ""]
    assert screen.getvalue() == ERASE.join(shown)


def test_progress_is_for_terminals_only(monkeypatch, capsys):
    progress("prompt", "tokens", 1, 2)
    monkeypatch.setattr("sys.stderr", screen := Screen())
    monkeypatch.setenv("TERM", "dumb")
    progress("prompt", "tokens", 1, 2)
    assert screen.getvalue() == capsys.readouterr().err == ""
