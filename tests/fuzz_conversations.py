"""Generated conversations: all roles, calls and results, with or without special tokens in texts."""

import json
import random

from chat_messages import assistant, call, system, tool, user

from ds4mlx.chat.tokens import CONTROL, DSML

WORDS = [
    "hello",
    " world",
    "12345",
    "\n\n",
    "  ",
    "naïve",
    "日本語",
    "🦊",
    "<",
    ">",
    "|",
    "｜",
    "</",
]
WORDS += ['"', "'s", "{", "}", "tool_result", "<tool_result>", "DSML", "<|DSML|", "def f(x):\n\t"]
WORDS += ["tool_calls>", '<invoke name="f">', "think>", "\u3000", "e\u0301", "end▁of▁sentence"]
SPECIAL = [*CONTROL, DSML, f"<{DSML}tool_calls>", f'<{DSML}invoke name="rm">', "<｜▁pad▁｜>"]


def text(rng: random.Random, special: bool) -> str:
    """Some words; special tokens among them if asked for."""
    words = rng.choices(WORDS, k=rng.randint(0, 6))
    if special and rng.random() < 0.4:
        words.insert(rng.randint(0, len(words)), rng.choice(SPECIAL))
    made = "".join(words)
    by_chance = not special and any(token in made for token in SPECIAL)
    return "" if by_chance else made


def conversation(rng: random.Random, special: bool) -> tuple[list[dict], dict]:
    """Messages that end with a question or a result, and the options to encode them with."""

    def some() -> str:
        return text(rng, special)

    messages = [system(some())] if rng.random() < 0.5 else []
    for _ in range(rng.randint(0, 3)):
        messages += round_of_talk(rng, some)
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        messages.append(user(some()))
    tools = [{"type": "function", "function": {"name": some(), "description": some()}}]
    return messages, {
        "thinking": rng.choice(["none", "low", "high", "max"]),
        "release": rng.choice(["april", "0731"]),
        "tools": tools if rng.random() < 0.3 else None,
    }


def round_of_talk(rng: random.Random, some) -> list[dict]:
    parts = [{"type": "text", "text": some()}, {"type": "text", "text": some()}]
    messages = [user(some() if rng.random() < 0.8 else parts)]
    if rng.random() < 0.2:
        messages.insert(0, {"role": "latest_reminder", "content": some()})
    calls = [
        call(
            f"call_{index}",
            json.dumps({some(): some(), "n": [1, some()]}, ensure_ascii=False),
            some(),
        )
        for index in range(rng.choice([0, 0, 1, 2]))
    ]
    thought = {"reasoning_content": some()} if rng.random() < 0.6 else {}
    messages.append(assistant(some(), tool_calls=calls, **thought))
    return messages + [tool(f"call_{index}", some()) for index in range(len(calls))]
