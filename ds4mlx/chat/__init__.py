"""The official prompt of a conversation, as text and as token ids, and the message in a completion.

    from ds4mlx.chat import encode_ids, encode_messages, encode_segments, parse_completion

    ids = encode_ids([{"role": "user", "content": "2+2?"}], tokenizer, thinking="high")
    text = encode_messages([{"role": "user", "content": "2+2?"}], thinking="high")
    message = parse_completion("Easy.</think>4", thinking="high")

`encode_ids` is for a model: no text of a message becomes a special token, and it ends where the
model's words begin. `encode_messages` is the official text, for comparison and for training.
"""

from ds4mlx.chat.encode import encode_ids, encode_messages, encode_segments
from ds4mlx.chat.parse import parse_completion, split_reasoning

__all__ = [
    "encode_ids",
    "encode_messages",
    "encode_segments",
    "parse_completion",
    "split_reasoning",
]
