"""What `bench` counts and measures of a model, and how it shows that."""

import csv
import io
import json
from dataclasses import replace
from xml.etree import ElementTree

import mlx.core as mx
import pytest
from test_synth import SMALL
from typer.testing import CliRunner

from ds4mlx.bench import costs, whole_model
from ds4mlx.bench.drafting import Drafting
from ds4mlx.bench.plot import Line, axis, plot
from ds4mlx.bench.synth import synth_model, weight_bytes
from ds4mlx.bench.tables import csv_text, plot_text, table
from ds4mlx.bench.whole_model import Asked, bench, synthetic_state
from ds4mlx.cli.main import app
from ds4mlx.model.fused.choice import launches
from ds4mlx.state.buffers import SPAN
from ds4mlx.state.row_forms import row_bytes

PLAIN = Asked(gen=2, target=None)


@pytest.fixture(scope="module")
def model():
    return synth_model(SMALL, "q2", mx.float32)


@pytest.mark.parametrize("asked", [PLAIN, replace(PLAIN, batch=3, fill="synthetic", target="cuda")])
def test_a_row(model, asked):
    (row,) = bench(model, [150], replace(asked, bandwidth=1e9))
    assert (row.fill, row.prefill_tokens) == (asked.fill, 75 if asked.fill == "synthetic" else 150)
    assert row.prefill_tokens_per_s is not None and row.prefill_tokens_per_s > 0
    assert row.decode_tokens_per_s == pytest.approx(1000 * asked.batch / row.decode_ms, 1e-2)
    assert row.batch == asked.batch and row.operations > 100 and row.host_ms > 0
    share = (row.weights_gb + row.rows_gb) / (row.decode_ms / 1000)
    assert row.bandwidth_share == pytest.approx(share, 1e-2)
    assert bool(row.kernels) == (asked.target is not None)
    assert (row.counted_for == "cuda") == (asked.target == "cuda")


def test_drafts_are_measured(small_model, small_tokenizer):
    asked = replace(PLAIN, gen=4, drafting=Drafting(small_model, small_tokenizer, 2))
    (row,) = rows = bench(small_model, [20], asked)
    assert row.draft_tokens_per_s > 0 and 0 <= row.draft_acceptance <= 1
    assert 1 <= row.draft_tokens_per_round <= 3 and "t/round" in table(rows)


@pytest.mark.parametrize("target", ["metal", "cuda"])
@pytest.mark.parametrize("sequences", [1, 2])
def test_launches_are_counted_by_kernel(model, target, sequences):
    """Those of a layer's parts that there are in every layer, whatever else is launched."""
    states = [synthetic_state(model, 20) for _ in range(sequences)]
    spent = costs.cost(model, states, target)
    layers = SMALL.num_hidden_layers
    assert spent.layers == layers and spent.launches_per_layer == spent.launches / layers
    assert sum(spent.kernels.values()) >= 5 * layers
    assert all(count > 0 for count in (*spent.kernels.values(), *spent.others.values()))


def test_a_token_is_counted_without_what_is_done_for_many(exact_model):
    """Whether the states were just read in, or their tails are full."""
    counts = []
    for decoded in (0, 1, SPAN):
        states = [synthetic_state(exact_model, 20) for _ in range(2)]
        with launches():
            for _ in range(decoded):
                mx.eval(exact_model.step([1, 2], states))
        counts.append(costs.cost(exact_model, states, "cuda").launches)
    assert max(counts) <= 1.1 * min(counts)


def test_plain_operations_are_counted(model):
    spent = costs.cost(model, [synthetic_state(model, 20)], None)
    assert spent.kernels == {} and spent.launches == sum(spent.others.values()) > 100


def test_bytes_of_weights_by_arithmetic(model):
    """Of eight experts three are read a sequence, of the embedding a row, of all else everything."""
    whole = weight_bytes(SMALL, "q2")
    experts = sum(
        plane.nbytes
        for layer in model.layers
        for stack in ("w1", "w2", "w3")
        for plane in layer.ffn.experts[stack].planes.values()
    )
    embedding = model.embed.weight.nbytes
    for sequences, share in ((1, 3 / 8), (2, 6 / 8), (3, 1), (8, 1)):
        want = whole - experts * (1 - share) - embedding * (1 - sequences / SMALL.vocab_size)
        assert costs.weights_read(model, sequences) == pytest.approx(want, abs=2)


@pytest.mark.parametrize("depth", [1, 40, 200, 1000])
def test_bytes_of_rows_by_arithmetic(model, depth):
    """Layers of ratio 0, 4 and 128: the window, the eight best and the index, all rows."""
    form, tokens = model.state_form, depth + 1
    kv, index = row_bytes(form.kv), row_bytes(form.index)
    window = min(tokens, SMALL.sliding_window) * kv
    csa = min(tokens // 4, 8) * kv + (tokens // 4 * index if tokens // 4 > 8 else 0)
    assert costs.rows_read(model, depth) == 3 * window + csa + tokens // 128 * kv


def test_deep_rows_are_random(model, monkeypatch):
    """Of a mixed fill, and of a depth without room for a chunk before the one that is timed."""
    monkeypatch.setattr(whole_model, "DEEPEST", 20)
    rows = bench(model, [1, 20, 21], replace(PLAIN, gen=1, fill="mixed"))
    assert [(row.fill, row.prefill_tokens) for row in rows] == [
        ("real", 1), ("real", 20), ("synthetic", 10),
    ]  # fmt: skip
    (row,) = bench(model, [1], replace(PLAIN, gen=1, fill="synthetic"))
    assert row.prefill_tokens_per_s is None and "depth 1: after random rows" in table([row])


def test_tables(model):
    rows = bench(model, [20, 150], replace(PLAIN, gen=1, fill="synthetic", target="metal"))
    text = table(rows)
    assert all(str(row.depth) in text for row in rows) and "counted for metal" in text
    assert text.count("after random rows") == 2 and "prefill of the last 75 tokens" in text
    assert all(name in text for name in rows[-1].kernels)
    read = list(csv.DictReader(io.StringIO(csv_text(rows))))
    assert [int(line["depth"]) for line in read] == [20, 150]
    counted = dict(pair.rsplit(":", 1) for pair in read[0]["kernels"].split(" "))
    assert {name: int(count) for name, count in counted.items()} == rows[0].kernels
    drawn = ElementTree.fromstring(plot_text(rows, "a < b"))
    assert sum(part.tag.endswith("circle") for part in drawn.iter()) == 4
    assert "a < b, after random rows from depth 20 on" in "".join(drawn.itertext())


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([100.0], [100.0]),
        ([2048.0, 65536.0], [2000.0, 5000.0, 10000.0, 20000.0, 50000.0]),
        ([0.3, 0.3], []),
        ([1.0, 1e6], [10.0**power for power in range(7)]),
    ],
)
def test_axes(values, ticks):
    made = axis(values, 10, 110)
    assert made.ticks() == ticks
    assert all(10 < made.at(value) < 110 for value in values)
    assert made.at(made.low) == 10 and made.at(made.high) == pytest.approx(110)


def test_lines_of_a_plot_are_told_apart():
    drawn = plot([Line("a", [(1, 2), (3, 4)]), Line("b", [(2, 2)])], "title", "x", "y")
    colours = {part.get("stroke") for part in ElementTree.fromstring(drawn).iter()} - {None, "#ddd"}
    assert len(colours) == 2


def test_command_line(monkeypatch, tmp_path):
    monkeypatch.setattr("ds4mlx.bench.synth.config_like", lambda like, layers: SMALL)
    files = ["--csv", str(tmp_path / "rows.csv"), "--plot", str(tmp_path / "speed.svg")]
    options = ["--in-memory", "--bench", "--prompt", "20,40", "--gen", "1", "--fill", "synthetic"]
    options += ["--batch", "2", "--count-for", "cuda", "--json", *files]
    done = CliRunner().invoke(app, ["synth", *options])
    assert done.exit_code == 0
    printed = json.loads(done.stdout)
    assert [(row["depth"], row["batch"]) for row in printed["rows"]] == [(20, 2), (40, 2)]
    assert {row["counted_for"] for row in printed["rows"]} == {"cuda"}
    assert (tmp_path / "rows.csv").read_text().count("\n") == 3
    assert ElementTree.parse(tmp_path / "speed.svg").getroot().tag.endswith("svg")
    for wrong in (
        ["--draft", "1", "--batch", "2"],
        ["--plot", "speed.png"],
        ["--batch", "9"],
        ["--count-for", "vulkan"],
    ):
        assert CliRunner().invoke(app, ["bench", *wrong]).exit_code == 2
