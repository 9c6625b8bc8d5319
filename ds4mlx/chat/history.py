"""What the official encoding does to a conversation before writing it down.

Merges users and tools into one turn, puts results into the order of their calls, and finds what
thinking the model no longer sees.
"""

from collections.abc import Sequence
from dataclasses import replace

from ds4mlx.chat.messages import Block, Turn


def merge_users(turns: Sequence[Turn]) -> list[Turn]:
    """User and tool turns that follow each other become one user turn.

    A turn with a task takes no more text, only results. A merged turn's own task is lost.
    """
    merged: list[Turn] = []
    for turn in turns:
        last = merged[-1] if merged else None
        if last is not None and _joins(last, turn):
            merged[-1] = replace(last, blocks=last.blocks + turn.blocks)
        elif turn.role == "tool":
            merged.append(replace(turn, role="user"))
        else:
            merged.append(turn)
    return merged


def add_tools(turns: list[Turn], tools: tuple[str, ...]) -> list[Turn]:
    """Gives the tools to a leading system or developer turn, or to a new system turn before all."""
    if not tools:
        return turns
    if turns and turns[0].role in ("system", "developer"):
        return [replace(turns[0], tools=turns[0].tools + tools), *turns[1:]]
    return [Turn("system", tools=tools), *turns]


def sort_results(turns: Sequence[Turn]) -> list[Turn]:
    """Puts each user turn's results into the order of the latest calls before it."""
    order: dict[str, int] = {}
    result = []
    for turn in turns:
        if turn.calls:
            order = {call.id: index for index, call in enumerate(turn.calls) if call.id}
        result.append(replace(turn, blocks=_in_order(turn.blocks, order)))
    return result


def last_user(turns: Sequence[Turn]) -> int:
    """Index of the last user or developer turn, -1 if there is none."""
    asking = [i for i, turn in enumerate(turns) if turn.role in ("user", "developer")]
    return asking[-1] if asking else -1


def forget_developers(turns: Sequence[Turn], start: int) -> tuple[list[Turn], int]:
    """Leaves out developer turns before the last question; `start` moves with its turn.

    Those between a call and its result stay: they belong to a question that is still open.
    """
    last = last_user(turns)
    kept = [
        index
        for index, turn in enumerate(turns)
        if turn.role != "developer" or index == last or _is_inside_call(turns, index)
    ]
    return [turns[i] for i in kept], sum(i < start for i in kept)


def _is_inside_call(turns: Sequence[Turn], index: int) -> bool:
    """Whether the turns next to this one, of those that talk, are a call and its result."""
    telling = ("developer", "system", "latest_reminder")
    before = next((turn for turn in reversed(turns[:index]) if turn.role not in telling), None)
    after = next((turn for turn in turns[index + 1 :] if turn.role not in telling), None)
    if before is None or after is None or not before.calls:
        return False
    return any(block.call_id is not None for block in after.blocks)


def _joins(last: Turn, turn: Turn) -> bool:
    if last.role != "user":
        return False
    return turn.role == "tool" or (turn.role == "user" and last.task is None)


def _in_order(blocks: tuple[Block, ...], order: dict[str, int]) -> tuple[Block, ...]:
    """Texts keep their places; a result of an unknown call counts as the first call's."""
    results = [block for block in blocks if block.call_id is not None]
    ordered = iter(sorted(results, key=lambda block: order.get(block.call_id or "", 0)))
    return tuple(block if block.call_id is None else next(ordered) for block in blocks)
