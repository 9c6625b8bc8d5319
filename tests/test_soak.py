"""A server under mixed load for long: nothing is lost, nothing goes to somebody else, nothing grows."""

import asyncio

import pytest
import serving
import soaking

from ds4mlx.store import KVStore


@pytest.mark.long
def test_a_mixed_load_is_answered_as_it_should_be(embedded, tmp_path):
    """For two minutes, in little memory over a small store."""
    model, tokenizer = embedded
    with (
        KVStore(tmp_path, 8 << 20, model, tokenizer=tokenizer) as store,
        serving.serving(model, tokenizer, store=store, memory=60_000_000) as server,
    ):
        load = soaking.Load(server.port)

        async def main():
            await load.learn(soaking.KNOWN[:2])
            await load.run(120)
            return await soaking.until_idle(server.port)

        told = asyncio.run(main())
        assert load.wrong == [] and set(load.counts) >= {"ask_known", "ask_new", "cancel"}
        assert not server.app.state.service.turns and told["store_bytes"] <= 8 << 20


@pytest.mark.slow
def test_half_an_hour_of_mixed_load(embedded_dir, tmp_path):
    found = soaking.soak(embedded_dir, tmp_path / "store", 1800)
    assert found["wrong"] == found["errors_in_log"] == [] and found["exit_code"] == 0
    before, after = found["resident_after_warming_mb"], found["resident_at_the_end_mb"]
    assert after < 1.05 * before + 20
