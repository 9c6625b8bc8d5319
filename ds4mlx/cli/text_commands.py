"""The commands that write text: generate, one prompt and its answer, and chat, many."""

import contextlib
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ds4mlx.cli import arguments as arg
from ds4mlx.cli import opening
from ds4mlx.cli import steered as steering
from ds4mlx.cli.terminal import progress

if TYPE_CHECKING:
    from ds4mlx.chat.segments import Prompt
    from ds4mlx.config import ModelConfig
    from ds4mlx.text.tokenizer import Tokenizer

INTERRUPTED = 130


def generate(
    text: Annotated[
        str | None,
        typer.Argument(
            metavar="TEXT", help="The prompt; - or nothing at all reads it from standard input."
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("-p", "--prompt", help="The prompt; - is standard input.")
    ] = None,
    prompt_file: Annotated[
        str | None, typer.Option(help="A file with the prompt; - is standard input.")
    ] = None,
    model: arg.Model = None,
    adapter: arg.Adapter = None,
    raw: Annotated[
        bool,
        typer.Option("--raw", help="Feed the prompt byte for byte, without the chat encoding."),
    ] = False,
    system: arg.System = None,
    think: arg.Think = "high",
    think_budget: arg.ThinkBudget = None,
    reasoning: arg.Reasoning = None,
    max_tokens: arg.MaxTokens = 4096,
    temp: arg.Temp = 1.0,
    top_p: arg.TopP = 1.0,
    top_k: arg.TopK = 0,
    min_p: arg.MinP = 0.0,
    seed: arg.Seed = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="A text that ends the answer and is left out; may be repeated."),
    ] = None,
    json_schema: arg.JsonSchema = None,
    draft: arg.Draft = 0,
    steer: steering.File = None,
    steer_scale: steering.Scale = None,
    steer_layers: steering.Layers = None,
    steer_operation: steering.Operation = None,
    steer_site: steering.Site = None,
    logprobs: Annotated[
        Path | None,
        typer.Option(help="Write a file of JSON lines: each token with its log-probabilities."),
    ] = None,
    kv_dir: arg.KvDir = None,
    kv: arg.Kv = False,
    kv_budget: arg.KvBudget = "16G",
    kv_text: arg.KvText = True,
) -> None:
    """Answer one prompt. The text goes to standard output, everything else to standard error.

    \b
    ds4mlx generate -m ~/models/v4-flash "Why is the sky blue?"
    git diff | ds4mlx generate --system "Review this change." --think max > review.md

    Where standard output is not a terminal, only the answer is written and not the reasoning
    before it. Without --raw, the line end that closes a file or standard input is left out.
    """
    if raw and system:
        raise typer.BadParameter("--system needs the chat encoding, which --raw leaves out")
    sampler = arg.sampler(temp, top_p, top_k, min_p, seed)
    arg.stop_strings(stop)
    arg.size(kv_budget)
    asked = arg.prompt_text(text, prompt, prompt_file, raw)
    arg.spare(logprobs, prompt_file, json_schema, steer)
    rule = arg.rule(json_schema)
    steered = steering.steered(model, steer, steer_scale, steer_layers, steer_operation, steer_site)

    from ds4mlx.chat import encode_segments
    from ds4mlx.cli.answer import show
    from ds4mlx.cli.logprobs import LogProbs
    from ds4mlx.cli.printer import Printer
    from ds4mlx.engine.generation import encoded, stream_generate
    from ds4mlx.engine.requests import check_prompt

    def written(config: "ModelConfig") -> "str | Prompt":
        if raw:
            return asked
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": asked})
        return encode_segments(messages, thinking=think, release=config.release)

    def length(tokenizer: "Tokenizer", config: "ModelConfig") -> int:
        ids = encoded(written(config), tokenizer, None)
        check_prompt(config, ids, 0, max_tokens)
        return len(ids) + max_tokens

    with contextlib.ExitStack() as stack:
        log = stack.enter_context(arg.output(logprobs))
        loaded, tokenizer = opening.open_model(model, context=length, adapter=adapter)
        opened = opening.open_store(kv_dir, kv, kv_budget, kv_text, (loaded, tokenizer), model)
        store = stack.enter_context(opened)
        stack.enter_context(steered(loaded))
        responses = stream_generate(
            loaded,
            tokenizer,
            written(loaded.args),
            max_tokens,
            sampler=sampler,
            stop=stop or (),
            on_prefill=partial(progress, "prompt", "tokens"),
            store=store,
            rule=rule,
            thinking_budget=think_budget,
            drafts=draft,
        )
        printer = Printer(sys.stdout, not raw and think != "none", arg.shown(reasoning))
        keep = LogProbs(log, tokenizer).add if log else None
        _, interrupted = show(responses, printer, keep)
    if interrupted:
        raise typer.Exit(INTERRUPTED)


def chat(
    model: arg.Model = None,
    adapter: arg.Adapter = None,
    system: arg.System = None,
    think: arg.Think = "high",
    think_budget: arg.ThinkBudget = None,
    reasoning: arg.Reasoning = None,
    max_tokens: arg.MaxTokens = 4096,
    temp: arg.Temp = 1.0,
    top_p: arg.TopP = 1.0,
    top_k: arg.TopK = 0,
    min_p: arg.MinP = 0.0,
    seed: arg.Seed = None,
    steer: steering.File = None,
    steer_scale: steering.Scale = None,
    steer_layers: steering.Layers = None,
    steer_operation: steering.Operation = None,
    steer_site: steering.Site = None,
    kv_dir: arg.KvDir = None,
    kv: arg.Kv = False,
    kv_budget: arg.KvBudget = "16G",
    kv_text: arg.KvText = True,
) -> None:
    """Talk with the model. Ctrl-C ends an answer, Ctrl-D the chat; /help lists its commands.

    \b
    ds4mlx chat -m ~/models/v4-flash --system "Answer in French."
    """
    sampler = arg.sampler(temp, top_p, top_k, min_p, seed)
    arg.size(kv_budget)
    steered = steering.steered(model, steer, steer_scale, steer_layers, steer_operation, steer_site)

    from ds4mlx.cli.chat import Chat, interact
    from ds4mlx.engine.conversation import Conversation

    loaded = opening.open_model(model, adapter=adapter)
    opened = opening.open_store(kv_dir, kv, kv_budget, kv_text, loaded, model)
    with steered(loaded[0]), opened as store:
        conversation = Conversation(*loaded, sampler, think, system, store, think_budget)
        try:
            interact(
                Chat(conversation, max_tokens, arg.shown(reasoning)), opening.model_name(model)
            )
        finally:
            conversation.keep("shutdown")
