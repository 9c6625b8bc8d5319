"""Every tensor of a model of given sizes: its name, shape, and what kind of thing it is.

The names are those of the module tree, which are the official ones but for three spellings:
`hc_attn_fn` is `hc_attn.fn` here (likewise ffn and head, base and scale), a layer's experts are one
stack, and a block scale `X.scale` is the plane `X.scales`.
"""

import re
from dataclasses import dataclass
from typing import Literal

from ds4mlx.config import ModelConfig

# matrix: FP8 in the official files; experts: FP4, stacked here; plain: BF16; exact: F32; ids: I64.
Kind = Literal["matrix", "experts", "plain", "exact", "ids"]

COMPONENTS = (
    "routed experts",
    "shared experts",
    "attention",
    "compressors",
    "indexers",
    "routers",
    "hyper-connections",
    "norms",
    "embedding",
    "head",
    "mtp",
)


@dataclass(frozen=True)
class Entry:
    """One weight: its name in the module tree, logical shape, and kind."""

    name: str
    shape: tuple[int, ...]
    kind: Kind

    @property
    def module(self) -> str:
        """Path of the module that holds it."""
        return self.name.rpartition(".")[0]

    @property
    def is_matrix(self) -> bool:
        """Whether its module is a Matrix, which can hold it in any format."""
        if self.kind in ("matrix", "experts"):
            return True
        return (
            self.kind == "plain" and len(self.shape) == 2 and not self.name.endswith("gate.weight")
        )

    @property
    def component(self) -> str:
        """Which of COMPONENTS it belongs to."""
        return component(self.name)

    def official(self, expert: int | str = 0) -> str:
        """Its name in the official files; of one expert if it is a stack."""
        return official_name(self.name, expert)


def experts(entry: Entry) -> int:
    """How many matrices an entry is a stack of; 1 if it is none."""
    return entry.shape[0] if entry.kind == "experts" else 1


def official_name(name: str, expert: int | str = 0) -> str:
    """A module-tree name as the official files spell it."""
    name = re.sub(r"\bhc_(attn|ffn|head)\.(fn|base|scale)$", r"hc_\1_\2", name)
    return re.sub(r"\bffn\.experts\.", f"ffn.experts.{expert}.", name)


def component(name: str) -> str:
    """Which of COMPONENTS a tensor belongs to."""
    rules = {
        r"^mtp\.": "mtp",
        r"^embed\.": "embedding",
        r"^head\.": "head",
        r"\.experts\.": "routed experts",
        r"\.shared_experts\.": "shared experts",
        r"\.indexer\.": "indexers",
        r"\.compressor\.": "compressors",
        r"\.gate\.": "routers",
        r"\bhc_": "hyper-connections",
        r"norm\.weight$": "norms",
    }
    return next((what for rule, what in rules.items() if re.search(rule, name)), "attention")


def inventory(config: ModelConfig) -> dict[str, list[Entry]]:
    """The entries of every weight file of a converted directory, in file order.

    A layer's routed experts have a file of their own, one contiguous slab an expert.
    """
    width, layers = config.hidden_size, config.num_hidden_layers
    vocabulary = (config.vocab_size, width)
    files = {"embed.safetensors": [Entry("embed.weight", vocabulary, "plain")]}
    for block in range(layers):
        files |= _block_files(config, f"layers.{block}", block)
    files["head.safetensors"] = [
        *_head("", config),
        Entry("norm.weight", (width,), "plain"),
        Entry("head.weight", vocabulary, "plain"),
    ]
    for draft in range(config.num_nextn_predict_layers):
        prefix = f"mtp.{draft}"
        files |= _block_files(config, prefix, layers + draft)
        files[f"{prefix}.safetensors"] += _draft(prefix, config)
    return files


def _block_files(config: ModelConfig, prefix: str, block: int) -> dict[str, list[Entry]]:
    width = config.hidden_size
    norms = [Entry(f"{prefix}.{x}.weight", (width,), "plain") for x in ("attn_norm", "ffn_norm")]
    critical = [
        *_attention(f"{prefix}.attn", config, config.ratio(block)),
        *norms,
        *_router(f"{prefix}.ffn.gate", config, block),
        *_expert(f"{prefix}.ffn.shared_experts", config, "matrix"),
        *_hyper(f"{prefix}.hc_attn", config),
        *_hyper(f"{prefix}.hc_ffn", config),
    ]
    return {
        f"{prefix}.safetensors": critical,
        f"{prefix}.experts.safetensors": _expert(f"{prefix}.ffn.experts", config, "experts"),
    }


def _attention(prefix: str, config: ModelConfig, ratio: int) -> list[Entry]:
    width, dim, rank = config.hidden_size, config.head_dim, config.q_lora_rank
    heads, low = config.num_attention_heads, config.o_groups * config.o_lora_rank
    entries = [
        Entry(f"{prefix}.attn_sink", (heads,), "exact"),
        Entry(f"{prefix}.wq_a.weight", (rank, width), "matrix"),
        Entry(f"{prefix}.q_norm.weight", (rank,), "plain"),
        Entry(f"{prefix}.wq_b.weight", (heads * dim, rank), "matrix"),
        Entry(f"{prefix}.wkv.weight", (dim, width), "matrix"),
        Entry(f"{prefix}.kv_norm.weight", (dim,), "plain"),
        Entry(f"{prefix}.wo_a.weight", (low, heads * dim // config.o_groups), "matrix"),
        Entry(f"{prefix}.wo_b.weight", (width, low), "matrix"),
    ]
    if ratio:
        entries += _compressor(f"{prefix}.compressor", width, dim, ratio)
    if ratio == 4:
        index_heads, index_dim = config.index_n_heads, config.index_head_dim
        indexer = f"{prefix}.indexer"
        entries += [
            Entry(f"{indexer}.wq_b.weight", (index_heads * index_dim, rank), "matrix"),
            Entry(f"{indexer}.weights_proj.weight", (index_heads, width), "plain"),
            *_compressor(f"{indexer}.compressor", width, index_dim, ratio),
        ]
    return entries


def _compressor(prefix: str, hidden: int, width: int, ratio: int) -> list[Entry]:
    channels = width * (2 if ratio == 4 else 1)
    return [
        Entry(f"{prefix}.ape", (ratio, channels), "exact"),
        Entry(f"{prefix}.wkv.weight", (channels, hidden), "plain"),
        Entry(f"{prefix}.wgate.weight", (channels, hidden), "plain"),
        Entry(f"{prefix}.norm.weight", (width,), "plain"),
    ]


def _router(prefix: str, config: ModelConfig, block: int) -> list[Entry]:
    experts = config.n_routed_experts
    weight = Entry(f"{prefix}.weight", (experts, config.hidden_size), "plain")
    if block < config.num_hash_layers:
        table = (config.vocab_size, config.num_experts_per_tok)
        return [weight, Entry(f"{prefix}.tid2eid", table, "ids")]
    return [weight, Entry(f"{prefix}.bias", (experts,), "exact")]


def _expert(prefix: str, config: ModelConfig, kind: Kind) -> list[Entry]:
    stack = (config.n_routed_experts,) if kind == "experts" else ()
    width, inner = config.hidden_size, config.moe_intermediate_size
    shapes = {"w1": (inner, width), "w2": (width, inner), "w3": (inner, width)}
    return [Entry(f"{prefix}.{w}.weight", (*stack, *shape), kind) for w, shape in shapes.items()]


def _hyper(prefix: str, config: ModelConfig) -> list[Entry]:
    n = config.hc_mult
    mixes = (2 + n) * n
    return [
        Entry(f"{prefix}.fn", (mixes, n * config.hidden_size), "exact"),
        Entry(f"{prefix}.base", (mixes,), "exact"),
        Entry(f"{prefix}.scale", (3,), "exact"),
    ]


def _head(prefix: str, config: ModelConfig) -> list[Entry]:
    n = config.hc_mult
    return [
        Entry(f"{prefix}hc_head.fn", (n, n * config.hidden_size), "exact"),
        Entry(f"{prefix}hc_head.base", (n,), "exact"),
        Entry(f"{prefix}hc_head.scale", (1,), "exact"),
    ]


def _draft(prefix: str, config: ModelConfig) -> list[Entry]:
    width = config.hidden_size
    projections = [
        Entry(f"{prefix}.{p}.weight", (width, width), "matrix") for p in ("e_proj", "h_proj")
    ]
    norms = [Entry(f"{prefix}.{n}.weight", (width,), "plain") for n in ("enorm", "hnorm", "norm")]
    return [*projections, *norms, *_head(f"{prefix}.", config)]
