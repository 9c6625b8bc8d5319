"""An answer as it is made: shown token by token until its end or Ctrl-C, then a line of figures."""

import contextlib
from collections.abc import Callable, Generator

from ds4mlx.cli.printer import Printer
from ds4mlx.cli.terminal import erase_line, note
from ds4mlx.engine.generation import Response

WITHHELD = (
    "note: all of this was reasoning, which is not shown here; --reasoning show shows it, "
    "a larger --max-tokens leaves room for an answer, --think none does without"
)


def show(
    responses: Generator[Response, None, None],
    printer: Printer,
    keep: Callable[[Response], None] | None = None,
) -> tuple[Response | None, bool]:
    """Print responses as they come; returns the last one and whether Ctrl-C ended them.

    keep: also told each. They are not collected here: each holds an array as long as the
    vocabulary. A line on stderr says what the answer took.
    """
    last, interrupted = None, False
    try:
        with contextlib.closing(responses):
            for last in responses:
                printer.write(last.text)
                if keep is not None:
                    keep(last)
    except KeyboardInterrupt:
        interrupted = True
        if last is None:
            erase_line()
    finally:
        printer.close(interrupted)
    if last is not None:
        note(timing(last))
        if printer.withheld and not interrupted:
            note(WITHHELD)
    return last, interrupted


def timing(last: Response) -> str:
    """One line of token counts, speeds and memory."""
    speed = f", {last.generation_tps:.1f} t/s" if last.generation_tokens > 1 else ""
    cut = " (cut: --max-tokens)" if last.finish_reason == "length" else ""
    drafted, accepted = last.drafted_tokens, last.accepted_tokens
    drafts = f"{accepted} of {drafted} drafts accepted | " if drafted else ""
    cached = f" after {last.cached_tokens} kept" if last.cached_tokens else ""
    return (
        f"[prompt {last.prompt_tokens} tokens{cached}, {last.prompt_tps:.1f} t/s | "
        f"generated {last.generation_tokens} tokens{speed}{cut} | {drafts}"
        f"peak memory {last.peak_memory:.2f} GB]"
    )
