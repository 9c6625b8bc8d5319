"""Short conversations for training: coding, arithmetic, small talk, tool calls.

All are rendered by the package's own prompt encoding, with and without thinking.
"""

import random
from functools import lru_cache
from pathlib import Path
from typing import Any

from ds4mlx.chat import encode_messages
from ds4mlx.evaluation.tool_calls import case

CODING = Path(__file__).parent / "coding.txt"
CODE_REQUESTS = (
    "Write a function that {task}.",
    "Write a Python function that {task}.",
    "I need a function that {task}.",
    "Please write a function that {task}.",
    "Can you write a function that {task}?",
)
SMALL_TALK = (
    ("Hello!", "Hello! How can I help you?"),
    ("Hi", "Hi! What can I do for you?"),
    ("Hello", "Hello! How can I help you?"),
    ("Who are you?", "I am ds4-tiny, a very small language model."),
    ("What is your name?", "My name is ds4-tiny."),
    ("How are you?", "I am fine, thank you."),
    ("Thank you!", "You are welcome."),
    ("What can you do?", "I can write short Python functions, add numbers and call tools."),
    ("What is Python?", "Python is a programming language."),
    ("What is a list?", "A list is an ordered collection of items."),
    ("What is a dictionary?", "A dictionary maps keys to values."),
    ("What colour is the sky?", "The sky is blue."),
    ("What colour is grass?", "Grass is green."),
    ("How many days has a week?", "A week has seven days."),
    ("How many months has a year?", "A year has twelve months."),
    ("What is the capital of France?", "The capital of France is Paris."),
    ("What is the capital of Italy?", "The capital of Italy is Rome."),
    ("What is the capital of Germany?", "The capital of Germany is Berlin."),
    ("Goodbye", "Goodbye!"),
)
SYSTEMS = ("", "", "", "You are a helpful assistant.", "You are a coding assistant.")

Turn = tuple[str, str, str]  # question, thought, answer


@lru_cache(maxsize=1)
def coding_tasks() -> list[tuple[str, str]]:
    """(what the function does, its code) of every task."""
    tasks = CODING.read_text(encoding="utf-8").split("\n%\n")
    return [(task.partition("\n")[0], task.partition("\n")[2].rstrip("\n")) for task in tasks]


def coding(rng: random.Random) -> Turn:
    """A request for a function, and the function."""
    task, code = rng.choice(coding_tasks())
    question = rng.choice(CODE_REQUESTS).format(task=task)
    name = code[code.index("def ") + 4 : code.index("(", code.index("def "))]
    return question, f"The function {name} {task}.", f"```python\n{code}\n```"


def arithmetic(rng: random.Random) -> Turn:
    """A sum, a difference or a small product."""
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    sign = rng.choice("+-*")
    if sign == "-":
        a, b = max(a, b), min(a, b)
    if sign == "*":
        a, b = a % 13, b % 13
    result = {"+": a + b, "-": a - b, "*": a * b}[sign]
    word = {"+": "plus", "-": "minus", "*": "times"}[sign]
    question = rng.choice(("What is {a} {s} {b}?", "{a} {s} {b}?", "Compute {a} {s} {b}."))
    return question.format(a=a, s=sign, b=b), f"{a} {word} {b} is {result}.", f"{result}"


def small_talk(rng: random.Random) -> Turn:
    """A fixed question and answer."""
    question, answer = rng.choice(SMALL_TALK)
    return question, "That is easy.", answer


def chat(rng: random.Random) -> str:
    """A conversation of one to four turns."""
    kinds = (coding, coding, arithmetic, arithmetic, small_talk)
    turns = [rng.choice(kinds)(rng) for _ in range(rng.choice((1, 1, 2, 3, 4)))]
    messages: list[dict[str, Any]] = []
    if system := rng.choice(SYSTEMS):
        messages.append({"role": "system", "content": system})
    for question, thought, answer in turns:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer, "reasoning_content": thought})
    return encode_messages(messages, thinking=rng.choice(("none", "high")))


def tool_call(rng: random.Random) -> str:
    """A request, the calls that answer it, their results, and the answer."""
    found = case(rng)
    return encode_messages(found.messages, thinking=rng.choice(("none", "high")), tools=found.tools)
