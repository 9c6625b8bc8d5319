"""The coding agents that `ds4mlx launch` sets up: for each what it is told, and how.

Nothing is written where an agent keeps its own configuration: all of it goes into environment
variables, arguments, and files of a folder that is gone afterwards.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

# Stand for what is known last: the key, as a whole value, and the folder of this run's files.
KEY, FOLDER = "{key}", "{folder}"
KEY_VARIABLE = "DS4MLX_API_KEY"
# The longest answer that an agent asks for, and the share of the context that it may be.
LONGEST_ANSWER, SHARE = 32000, 4
# Milliseconds that a request may take: a long thought on a slow machine is no fault.
PATIENCE = 3_600_000


@dataclass(frozen=True)
class Served:
    """A server as an agent sees it. url: without a path; context: tokens."""

    url: str
    model: str
    context: int

    @property
    def answer(self) -> int:
        """The most tokens of an answer, which an agent keeps free."""
        return min(LONGEST_ANSWER, self.context // SHARE)

    @property
    def full(self) -> int:
        """Tokens from which on an agent is to compact its history."""
        return (self.context - self.answer) * 9 // 10


@dataclass(frozen=True)
class Setup:
    """What an agent is started with, beside the user's arguments.

    variables: None unsets one. files: by their names in FOLDER.
    """

    arguments: tuple[str, ...] = ()
    variables: Mapping[str, str | None] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Client:
    """An agent: its command, the package that has it, and how it is set up."""

    command: str
    package: str
    setup: Callable[[Served], Setup]


def _claude(served: Served) -> Setup:
    """By variables. It takes a window of 200,000 tokens for granted, and sends small requests to others."""
    roles = ("ANTHROPIC_MODEL", "CLAUDE_CODE_SUBAGENT_MODEL")
    sizes = (f"ANTHROPIC_DEFAULT_{name}_MODEL" for name in ("HAIKU", "SONNET", "OPUS", "FABLE"))
    others = (
        "ANTHROPIC_API_KEY",
        *(f"CLAUDE_CODE_USE_{n}" for n in ("BEDROCK", "VERTEX", "FOUNDRY")),
    )
    return Setup(
        variables={
            **dict.fromkeys(others),
            "ANTHROPIC_BASE_URL": served.url,
            "ANTHROPIC_AUTH_TOKEN": KEY,
            **dict.fromkeys((*roles, *sizes), served.model),
            "CLAUDE_CODE_MAX_CONTEXT_TOKENS": str(served.context),
            "CLAUDE_CODE_AUTO_COMPACT_WINDOW": str(served.context),
            "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(served.answer),
            "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "API_TIMEOUT_MS": str(PATIENCE),
        }
    )


def _codex(served: Served) -> Setup:
    """By `-c`, whose values are TOML: JSON's strings and numbers are."""
    provider: dict[str, Any] = {
        "name": "ds4mlx",
        "base_url": f"{served.url}/v1",
        "wire_api": "responses",
        "env_key": KEY_VARIABLE,
        "supports_websockets": False,
        "stream_idle_timeout_ms": PATIENCE,
    }
    values: dict[str, Any] = {
        "model": served.model,
        "model_provider": "ds4mlx",
        **{f"model_providers.ds4mlx.{name}": value for name, value in provider.items()},
        "model_context_window": served.context,
        "model_auto_compact_token_limit": served.full,
        "check_for_update_on_startup": False,
    }
    pairs = (("-c", f"{name}={json.dumps(value)}") for name, value in values.items())
    return Setup(tuple(word for pair in pairs for word in pair), {KEY_VARIABLE: KEY})


def _opencode(served: Served) -> Setup:
    """By a configuration in a variable, which comes on top of the files'."""
    model = {
        "name": served.model,
        "reasoning": True,
        "tool_call": True,
        "interleaved": {"field": "reasoning_content"},
        "limit": {"context": served.context, "output": served.answer},
    }
    key = f"{{env:{KEY_VARIABLE}}}"
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "ds4mlx",
        "options": {"baseURL": f"{served.url}/v1", "apiKey": key, "timeout": False},
        "models": {served.model: model},
    }
    named = f"ds4mlx/{served.model}"
    told = {"provider": {"ds4mlx": provider}, "model": named, "small_model": named}
    told |= {"autoupdate": False, "share": "disabled"}
    return Setup(variables={"OPENCODE_CONFIG_CONTENT": json.dumps(told), KEY_VARIABLE: KEY})


def _pi(served: Served) -> Setup:
    """By an extension that registers a provider."""
    model = {
        "id": served.model,
        "name": served.model,
        "reasoning": True,
        "input": ["text"],
        "cost": {"input": 0, "output": 0, "cacheRead": 0, "cacheWrite": 0},
        "contextWindow": served.context,
        "maxTokens": served.answer,
        "compat": {"thinkingFormat": "deepseek"},
    }
    provider = {
        "name": "ds4mlx",
        "baseUrl": f"{served.url}/v1",
        "apiKey": KEY_VARIABLE,
        "api": "openai-completions",
        "models": [model],
    }
    register = f'pi.registerProvider("ds4mlx", {json.dumps(provider, indent=2)});'
    return Setup(
        ("--extension", f"{FOLDER}/ds4mlx.js", "--provider", "ds4mlx", "--model", served.model),
        {KEY_VARIABLE: KEY},
        {"ds4mlx.js": f"export default function (pi) {{\n{register}\n}}\n"},
    )


CLIENTS = {
    client.command: client
    for client in (
        Client("claude", "@anthropic-ai/claude-code", _claude),
        Client("codex", "@openai/codex", _codex),
        Client("opencode", "opencode-ai", _opencode),
        Client("pi", "@earendil-works/pi-coding-agent", _pi),
    )
}
