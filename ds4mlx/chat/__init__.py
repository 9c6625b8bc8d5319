"""The official prompt text of a conversation, and the message in a completion.

    from ds4mlx.chat import encode_messages, parse_completion

    prompt = encode_messages([{"role": "user", "content": "2+2?"}], thinking="high")
    message = parse_completion("Easy.</think>4", thinking="high")

Knows text only: tokens and sampling are elsewhere.
"""

from ds4mlx.chat.encode import encode_messages
from ds4mlx.chat.parse import parse_completion, split_reasoning

__all__ = ["encode_messages", "parse_completion", "split_reasoning"]
