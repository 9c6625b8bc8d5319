"""The special tokens of the official encoding, as text."""

import re

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
REMINDER = "<｜latest_reminder｜>"
THINK = "<think>"
THINK_END = "</think>"
# Marks tool markup; the angle brackets and words around it are ordinary text.
DSML = "｜DSML｜"

# Quick tasks: the token that asks for one instead of an answer.
TASKS = {
    "action": "<｜action｜>",
    "query": "<｜query｜>",
    "authority": "<｜authority｜>",
    "domain": "<｜domain｜>",
    "title": "<｜title｜>",
    "read_url": "<｜read_url｜>",
}
# Tokens that end or open something; none of them belongs inside a message's text.
CONTROL = (BOS, EOS, USER, ASSISTANT, REMINDER, THINK, THINK_END, *TASKS.values())
CONTROL += ("<｜extracted_url｜>",)
CONTROL_TOKEN = re.compile("|".join(re.escape(token) for token in CONTROL))
