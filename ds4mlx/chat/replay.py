"""Tool calls exactly as they were sampled, so that a history is rendered byte for byte.

What a client sends back is JSON; the model's own spelling of the calls cannot be told from it.
"""

from ds4mlx.chat.calls import find_calls
from ds4mlx.chat.parse import split_reasoning
from ds4mlx.chat.tokens import EOS


def sampled_calls(text: str, thinking: str = "none") -> str:
    """The calls in a completion `text`, with the blank line before them, up to the turn's end.

    Empty if there are none, they are not complete, or other text follows them. Given back to
    `encode_messages` as `replay` under the calls' ids, the turn is rendered as it was generated.
    """
    _, body = split_reasoning(text, thinking)
    turn = body.partition(EOS)[0]
    block = find_calls(turn)
    if block is None or not (block.calls and block.is_sound) or turn[block.end :].strip():
        return ""
    before = turn[: block.start]
    content = before[:-2] if before.endswith("\n\n") else before.removesuffix("\n")
    return turn[len(content) :]
