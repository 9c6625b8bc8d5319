"""The tokenizer of a loaded model, as mlx-lm's tools expect one too: it also encodes conversations."""

from collections.abc import Sequence
from typing import Any

from ds4mlx.chat import encode_ids, encode_messages
from ds4mlx.text.tokenizer import Tokenizer


class ChatTokenizer(Tokenizer):
    """A tokenizer that knows the release of its model, and so how a conversation becomes a prompt."""

    # The prompt is made by code: there is no template to fill in.
    chat_template = None

    def apply_chat_template(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        tokenize: bool = True,
        thinking: bool | str = False,
        **_: Any,
    ) -> list[int] | str:
        """A conversation as token ids, or as the official text where `tokenize` is false.

        With `add_generation_prompt` the ids are those of `encode_ids`: they end where the model's
        words begin, and no text from outside becomes a special token. Without it they are those of
        the official text, which ends with the last message; that is what training on whole
        conversations wants. thinking: none, low, high or max, or True for high.
        Options of other models' templates are not used. Raises DataError, naming the message.
        """
        effort = {True: "high", False: "none"}.get(thinking, thinking)  # type: ignore[call-overload]
        if tokenize and add_generation_prompt:
            return encode_ids(messages, self, effort, tools, self.release)
        text = encode_messages(messages, effort, tools, self.release)
        return self.encode(text) if tokenize else text
