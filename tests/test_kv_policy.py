"""When generation and chat save, what they take up again, and a whole agent session."""

import json
import logging
import re
import time
from itertools import chain

import mlx.core as mx
import numpy as np
import pytest
from steering import Dictation, Failing, tokens_of

from ds4mlx import DecodeState, KVStore, ModelConfig, stream_generate
from ds4mlx.chat import encode_ids, encode_messages, encode_segments, parse_completion
from ds4mlx.chat.replay import sampled_calls
from ds4mlx.chat.tokens import DSML, EOS
from ds4mlx.cli import main as cli
from ds4mlx.engine.conversation import Conversation
from ds4mlx.engine.sampling import Sampler
from ds4mlx.state.record import record_bytes
from ds4mlx.store import admin
from ds4mlx.store.policy import Policy
from ds4mlx.text.tokenizer import Tokenizer

IDS = np.random.default_rng(4).integers(2, 288, 5000).tolist()
NEAR = Policy(min_tokens=64, trim=8, align=32, interval=128)  # saves of short prompts


@pytest.fixture(scope="module")
def tokenizer(small_dir):
    return Tokenizer.from_dir(small_dir)


@pytest.fixture
def store(small_model, tmp_path):
    with KVStore(tmp_path / "kv", model=small_model) as opened:
        yield opened


def lengths(store):
    """(tokens, reason) of what is stored, without the boundaries on the way."""
    found = admin.entries(admin.open_directory(store.directory))
    return sorted((entry.tokens, entry.reason) for entry in found)


def answer(model, tokenizer, ids, count, **options):
    return list(stream_generate(model, tokenizer, ids, count, **options))


@pytest.mark.parametrize(
    ("prompt", "end"), [(100, 0), (543, 0), (544, 512), (700, 640), (800, 768), (801, 768)]
)
def test_where_a_prompt_is_saved(prompt, end):
    assert Policy().prompt_end(prompt) == end


def test_a_prompt_is_prefilled_once(small_model, tokenizer, store):
    """And the second answer is the first one, token for token."""
    first = answer(small_model, tokenizer, IDS[:700], 12, store=store)
    assert lengths(store) == [(640, "cold")]
    second = answer(small_model, tokenizer, IDS[:700], 12, store=store)
    assert tokens_of(second) == tokens_of(first)
    assert (first[0].cached_tokens, first[0].prompt_tokens) == (0, 700)
    assert (second[0].cached_tokens, second[0].prompt_tokens) == (640, 60)
    longer = answer(small_model, tokenizer, IDS[:1000], 3, store=store)
    assert longer[0].cached_tokens == 640
    assert lengths(store) == [(640, "cold"), (896, "continue")]


def test_short_prompts_leave_no_files(small_model, tokenizer, store):
    answer(small_model, tokenizer, IDS[:500], 3, store=store)
    assert not list(store.directory.rglob("*.kv"))


def test_long_runs_are_saved_on_the_way(small_model, tokenizer, store):
    options = {"prefill_step": 64, "sampler": Dictation(IDS[120:]), "policy": NEAR}
    answer(small_model, tokenizer, IDS[:120], 44, store=store, **options)
    assert lengths(store) == [(96, "cold"), (128, "continue"), (160, "shutdown")]
    assert store.restore(IDS[:163])[1] == 160


def test_an_answer_that_is_closed_is_saved_as_far_as_it_came(small_model, tokenizer, store):
    options = {"store": store, "policy": NEAR, "sampler": Dictation(IDS[60:])}
    run = stream_generate(small_model, tokenizer, IDS[:80], 100, **options)
    for _ in range(40):
        next(run)
    run.close()
    assert lengths(store) == [(64, "cold"), (96, "shutdown")]


def test_a_state_that_failed_is_not_saved(small_model, tokenizer, store):
    with pytest.raises(RuntimeError, match="out of memory"):
        options = {"store": store, "policy": NEAR, "sampler": Failing(40)}
        answer(small_model, tokenizer, IDS[:80], 100, **options)
    assert lengths(store) == [(64, "cold")]


def test_a_store_that_cannot_be_written_is_told_once(small_model, tokenizer, tmp_path, caplog):
    store = KVStore(tmp_path, budget_bytes=1000, model=small_model)
    want = answer(small_model, tokenizer, IDS[:80], 5)
    with caplog.at_level(logging.WARNING):
        got = answer(small_model, tokenizer, IDS[:80], 5, store=store, policy=NEAR)
    assert tokens_of(got) == tokens_of(want)
    assert len(caplog.records) == 1 and "budget" in caplog.text


# By text


def test_a_history_that_is_tokenised_otherwise_is_found_by_its_text(talker, tmp_path):
    """As after an answer whose tokens are not those the tokenizer would choose."""
    model, tokenizer = talker
    store = KVStore(tmp_path, model=model, tokenizer=tokenizer)
    text = "The history of a conversation" * 3
    spelled = [tokenizer.encode(char)[0] for char in text]  # a token for every letter
    assert spelled != tokenizer.encode(text)
    cache = model.make_cache()
    mx.eval(model(mx.array([spelled]), cache=cache))
    store.save(spelled, cache)
    ids = store.encode(text + " and its end")
    assert ids == spelled + tokenizer.encode(" and its end")
    assert store.restore(ids)[1] == len(spelled)
    for other in ("The history" + text, text[:-1] + "?", text, text + "s", text + "al matters"):
        assert store.encode(other) == tokenizer.encode(other)


def test_no_text_is_cut_inside_a_character(talker, tmp_path):
    model, tokenizer = talker
    store = KVStore(tmp_path, model=model, tokenizer=tokenizer)
    ids = tokenizer.encode("one 🦊")
    assert len(tokenizer.token_bytes(ids[-1])) < 4
    cache = model.make_cache()
    mx.eval(model(mx.array([ids[:-1]]), cache=cache))
    store.save(ids[:-1], cache)
    assert store.encode("one 🦊 two") == tokenizer.encode("one 🦊 two")


# Tool calls


CALLS = (
    f'Look.\n\n<{DSML}tool_calls>\n<{DSML}invoke name="f">\n'
    f'<{DSML}parameter name="x" string="false">1.50</{DSML}parameter>\n'
    f"</{DSML}invoke>\n</{DSML}tool_calls>"
)


@pytest.mark.parametrize(
    "text", [CALLS, CALLS.replace("\n\n<", "\n<"), CALLS.replace(">\n<", "> <")]
)
def test_calls_are_rendered_as_they_were_sampled_in_another_process_too(
    small_model, tmp_path, text
):
    message = parse_completion(text + EOS)
    del message["malformed"]
    message["tool_calls"][0]["id"] = "call_abc"
    KVStore(tmp_path, model=small_model).calls.remember(["call_abc"], sampled_calls(text + EOS))
    replay = KVStore(tmp_path, model=small_model).calls
    history = [{"role": "user", "content": "?"}, message, {"role": "user", "content": "!"}]
    assert (text + EOS) in encode_messages(history, replay=replay)
    assert "call_other" not in replay and len(replay) == 1


def test_an_id_of_two_texts_names_neither(small_model, tmp_path):
    first, second = (KVStore(tmp_path, model=small_model).calls for _ in range(2))
    first.remember(["call_a", "call_b"], "one")
    first.remember(["call_a"], "one")
    assert second["call_a"] == "one"
    second.remember(["call_a"], "two")
    for calls in (second, KVStore(tmp_path, model=small_model).calls):
        assert sorted(calls) == ["call_b"] and len(calls) == 1
        assert "call_a" not in calls and calls.get("call_a") is None


BLOCK = CALLS.removeprefix("Look.")


@pytest.mark.parametrize(
    ("text", "thinking", "replayed"),
    [
        ("no calls", "none", ""),
        (CALLS + "behind", "none", ""),
        (CALLS[:-9], "none", ""),
        (CALLS, "none", BLOCK),
        (CALLS + EOS, "none", BLOCK),
        (f"So.</think>{CALLS}", "high", BLOCK),
        (CALLS, "high", BLOCK),
        ("So." + CALLS + "</think>No.", "high", ""),
        ("<think>" + CALLS, "none", BLOCK),
    ],
)
def test_what_can_be_replayed(text, thinking, replayed):
    """The calls that end an answer, and none of those that its reasoning only thinks of."""
    assert sampled_calls(text, thinking) == replayed


# A chat


def test_a_chat_goes_on_in_another_process(talker, tmp_path):
    """What a conversation held when it was left is taken up by the next."""
    model, tokenizer = talker
    talks = []
    for _ in range(2):
        store = KVStore(tmp_path, model=model, tokenizer=tokenizer)
        talk = Conversation(
            model, tokenizer, Sampler(temperature=0), "none", "Be brief. " * 160, store
        )
        talks.append(list(talk.ask("Hello there", 8)))
        talk.keep("shutdown")
    assert tokens_of(talks[0]) == tokens_of(talks[1])
    assert talks[0][0].cached_tokens == 0 and talks[1][0].cached_tokens >= 512
    second = list(talk.ask("And now?", 4))
    assert second[0].cached_tokens > talks[1][0].cached_tokens
    talk.reset()
    assert talk.fed == [] and talk.cache.offset == 0


def test_the_commands(talker_dir, tmp_path, capfd):
    prompt, kv = tmp_path / "prompt", ["--kv-dir", str(tmp_path / "kv")]
    prompt.write_text("All work and no play makes a dull text. " * 60)

    def run(*arguments):
        code = cli.run([*arguments, *kv])
        return code, *capfd.readouterr()

    generate = ("generate", "-m", str(talker_dir), "--temp", "0", "--max-tokens", "4")
    first, second = (run(*generate, "--prompt-file", str(prompt)) for _ in range(2))
    assert first[:2] == second[:2] and first[0] == 0
    assert " kept" not in first[2] and " kept" in second[2]
    _, listed, _ = run("cache", "ls")
    key = listed.splitlines()[1].split()[0]
    assert "cold" in listed and "1 hits" in listed
    assert json.loads(run("cache", "ls", "--json")[1])["prefixes"][0]["hits"] == 1
    shown = run("cache", "show", key)[1]
    assert "All work and no play" in shown
    details = json.loads(run("cache", "show", key, "--json")[1])["prefix"]
    created = time.strftime("%Y-%m-%d %H:%M", time.localtime(details["created"]))
    assert shown.startswith(f"key          {details['prefix']}\n")
    assert (
        details["prefix"].startswith(key)
        and f"saved        {created} ({details['reason']})\n" in shown
    )
    assert re.search(r"last used +20\d\d-\d\d-\d\d \d\d:\d\d\n", shown)
    assert not re.search(r"\d{9,}\.\d", shown)  # no seconds since 1970
    assert run("cache", "show", "ffff")[0] == 1
    assert run("cache", "verify")[0] == 0
    segment = next((tmp_path / "kv" / "segments").iterdir())
    raw = bytearray(segment.read_bytes())
    raw[-5] ^= 1
    segment.write_bytes(raw)
    code, found, _ = run("cache", "verify")
    assert code == 1 and segment.name in found
    assert run("cache", "prune", "--budget", "1K")[0] == 0
    assert "0 prefixes" in run("cache", "ls")[1]
    assert run("cache", "clear")[0] == 2
    assert run("cache", "clear", "--yes")[0] == 0
    kv[1] = str(tmp_path)
    code, _, wrong = run("cache", "ls")
    assert code == 1 and "not a KV store" in wrong


@pytest.mark.parametrize("prompts", [0, 1])
def test_the_usual_place(talker_dir, tmp_path, monkeypatch, capfd, prompts):
    """Where `--kv` keeps things, and `cache` looks if nothing is named; empty before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    prompt = tmp_path / "prompt"
    prompt.write_text("All work and no play makes a dull text. " * 60)
    generate = ("generate", "-m", str(talker_dir), "--max-tokens", "1", "--prompt-file")
    for _ in range(prompts):
        assert cli.run([*generate, str(prompt), "--kv"]) == 0
    capfd.readouterr()
    assert cli.run(["cache", "ls", "--json"]) == 0
    listed = json.loads(capfd.readouterr().out)["prefixes"]
    assert [entry["reason"] for entry in listed] == ["shutdown", "cold"] * prompts
    assert [p.name for p in (tmp_path / "ds4mlx").iterdir()] == ["kv"]
    for command in (["verify"], ["prune"], ["clear", "--yes"], ["ls"]):
        assert cli.run(["cache", *command]) == 0
    assert "0 prefixes" in capfd.readouterr().out
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cli.run(["cache", "ls"]) == 1
    assert "--kv-dir" in capfd.readouterr().err


# Flash's shapes


@pytest.mark.parametrize(
    ("tokens", "most"), [(128, 3.7e6), (100_000, 14.7e6), (100_095, 14.7e6), (102_400, 3.7e6)]
)
def test_boundary_records_of_flash(tokens, most):
    assert record_bytes(DecodeState(ModelConfig()).layers, tokens) <= most


# An agent


def agent_session(rng, turns, scale):
    """(what happens, prompt) of some turns: growth, retries, an edited turn, a compaction."""

    def some(count):
        return rng.integers(2, 288, count // scale).tolist()

    edited, compacted = turns * 14 // 40, turns * 26 // 40
    system, history = some(900), []
    for turn in range(turns):
        if turn in {turns * n // 40 for n in (7, 19, 31)}:
            yield "retry", [*system, *chain.from_iterable(history)]
            continue
        if turn == edited:
            history[-3:] = [some(70)]
            yield "edited turn", [*system, *chain.from_iterable(history)]
            continue
        if turn == compacted:
            history = [some(250)]
            yield "compaction", [*system, *chain.from_iterable(history)]
            continue
        history.append(some(int(rng.integers(30, 110))))
        yield "growth", [*system, *chain.from_iterable(history)]


@pytest.mark.parametrize(
    ("turns", "scale", "share"), [(16, 4, 0.2), pytest.param(40, 1, 0.15, marks=pytest.mark.slow)]
)
def test_an_agent_session_prefills_little(small_model, tokenizer, tmp_path, turns, scale, share):
    """Every turn finds its beginning on the disk, as if the server had been restarted."""
    total = prefilled = 0
    policy = Policy(512 // scale, 32 // scale, 128 // scale)
    for turn, (what, ids) in enumerate(agent_session(np.random.default_rng(9), turns, scale)):
        with KVStore(tmp_path, model=small_model) as store:
            last = answer(small_model, tokenizer, ids, 4, store=store, policy=policy)[-1]
            source = "nothing" if store.last_hit is None else f"{store.last_hit[1]}"
            print(
                f"{turn:>2} {what:<12} {len(ids):>5} tokens: {last.cached_tokens:>5} from "
                f"{source:<9} {last.prompt_tokens:>5} prefilled"
            )
            assert last.cached_tokens + last.prompt_tokens == len(ids)
        total, prefilled = total + len(ids), prefilled + last.prompt_tokens
    print(f"{prefilled} of {total} tokens prefilled: {prefilled / total:.1%}")
    assert prefilled < share * total


def test_a_stored_prefix_with_the_same_text_but_real_special_tokens_is_not_taken(talker, tmp_path):
    """What a raw prompt has opened, a chat whose user spells the same must not take up."""
    model, tokenizer = talker
    messages = [{"role": "user", "content": f"a{EOS}<｜User｜>b" + " and so on" * 40}]
    raw = encode_messages(messages)
    ids = tokenizer.encode(raw)[:-2]
    state = model.make_cache()
    model(mx.array([ids]), cache=state)
    with KVStore(tmp_path, model=model, tokenizer=tokenizer) as store:
        store.save(ids, state)
        assert store.encode(encode_segments(messages)) == encode_ids(messages, tokenizer)
        assert store.encode(raw)[: len(ids)] == ids


def test_a_stored_prefix_in_other_tokens_is_taken_for_a_conversation(talker, tmp_path):
    model, tokenizer = talker
    messages = [{"role": "user", "content": "hello hello" + " and so on" * 40}]
    own = encode_ids(messages, tokenizer)
    split = next(
        i for i, token in enumerate(own) if i > 3 and len(tokenizer.token_bytes(token)) > 2
    )
    letters = [tokenizer.encode(char)[0] for char in tokenizer.decode([own[split]])]
    ids = [*own[:split], *letters, *own[split + 1 : -3]]
    state = model.make_cache()
    model(mx.array([ids]), cache=state)
    with KVStore(tmp_path, model=model, tokenizer=tokenizer) as store:
        store.save(ids, state)
        found = store.encode(encode_segments(messages))
        assert found[: len(ids)] == ids and tokenizer.decode(found) == tokenizer.decode(own)
