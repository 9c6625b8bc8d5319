"""The model's sizes, read from the official `config.json`, with V4-Flash's values as defaults.

Owns every check of those values; the rest of the package trusts a `ModelConfig`.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ds4mlx.config_keys import official_names
from ds4mlx.errors import DataError

Count = Annotated[int, Field(ge=1, le=1 << 24, strict=True)]
Width = Annotated[int, Field(ge=32, le=1 << 20, multiple_of=32, strict=True)]
Positive = Annotated[float, Field(gt=0, lt=1e12)]
Release = Literal["april", "0731"]
Ratio = Literal[0, 4, 128]
FLASH_PAIR: tuple[Ratio, Ratio] = (4, 128)

# Keys of relatives whose forward pass is another one.
FOREIGN_KEYS = {
    "engram": "DeepSeek-V4.1's engram memory",
    "kv_source_layer": "DeepSeek-V4.1's shared KV layers",
    "index_source_layer": "DeepSeek-V4.1's shared indices",
    "vision": "a vision tower",
}
# Flash's own numbers must not stand in for a missing key of somebody else's file.
REQUIRED = [
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("qk_rope_head_dim", "q_lora_rank", "o_groups", "o_lora_rank", "sliding_window"),
    *("compress_ratios", "index_n_heads", "index_head_dim", "index_topk", "n_routed_experts"),
    *("num_experts_per_tok", "moe_intermediate_size", "num_hash_layers"),
    *("num_nextn_predict_layers", "max_position_embeddings", "rope_theta", "compress_rope_theta"),
    *("rope_scaling", "routed_scaling_factor", "swiglu_limit", "hc_mult", "hc_sinkhorn_iters"),
    *("hc_eps", "rms_norm_eps", "bos_token_id", "eos_token_id"),
]


class RopeScaling(BaseModel):
    """YaRN parameters; they apply to the layers that have a compressor."""

    model_config = ConfigDict(frozen=True)
    type: Literal["yarn"] = "yarn"
    factor: Annotated[float, Field(ge=1, lt=1e6)] = 16.0
    original_max_position_embeddings: Annotated[int, Field(ge=0)] = 65536
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0


class ModelConfig(BaseModel):
    """Sizes and constants of a DeepSeek-V4 model, under the keys of the official `config.json`.

    `compress_ratios` has one entry per block: 0 (sliding window only), 4 (CSA) or 128 (HCA);
    the entries after the main layers belong to the MTP blocks.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")
    model_type: Literal["deepseek_v4"] = "deepseek_v4"
    vocab_size: Count = 129280
    hidden_size: Width = 4096
    num_hidden_layers: Annotated[int, Field(ge=1, le=1024, strict=True)] = 43
    num_nextn_predict_layers: Annotated[int, Field(ge=0, le=16, strict=True)] = 1
    num_attention_heads: Count = 64
    num_key_value_heads: Literal[1] = 1
    head_dim: Width = 512
    qk_rope_head_dim: Annotated[int, Field(ge=2, multiple_of=2, strict=True)] = 64
    q_lora_rank: Width = 1024
    o_groups: Count = 8
    o_lora_rank: Width = 1024
    sliding_window: Count = 128
    compress_ratios: tuple[Ratio, ...] = (0, 0, *FLASH_PAIR * 20, 4, 0)
    index_n_heads: Count = 64
    index_head_dim: Width = 128
    index_topk: Count = 512
    rope_theta: Positive = 10000.0
    compress_rope_theta: Positive = 160000.0
    rope_scaling: RopeScaling = RopeScaling()
    max_position_embeddings: Count = 1048576
    n_routed_experts: Count = 256
    n_shared_experts: Literal[1] = 1
    num_experts_per_tok: Count = 6
    moe_intermediate_size: Width = 2048
    num_hash_layers: Annotated[int, Field(ge=0, strict=True)] = 3
    scoring_func: Literal["sqrtsoftplus"] = "sqrtsoftplus"
    topk_method: Literal["noaux_tc"] = "noaux_tc"
    norm_topk_prob: Literal[True] = True
    routed_scaling_factor: Positive = 1.5
    swiglu_limit: Positive = 10.0
    hidden_act: Literal["silu"] = "silu"
    hc_mult: Annotated[int, Field(ge=1, le=64, strict=True)] = 4
    hc_sinkhorn_iters: Annotated[int, Field(ge=1, le=1000, strict=True)] = 20
    hc_eps: Annotated[float, Field(ge=0, lt=1)] = 1e-6
    rms_norm_eps: Annotated[float, Field(ge=0, lt=1)] = 1e-6
    tie_word_embeddings: Literal[False] = False
    attention_bias: Literal[False] = False
    bos_token_id: Annotated[int, Field(ge=0)] = 0
    eos_token_id: Annotated[int, Field(ge=0)] = 1
    release: Release = "april"

    @model_validator(mode="after")
    def _agree(self) -> "ModelConfig":
        for wrong, message in self._conflicts():
            if wrong:
                raise ValueError(message)
        return self

    def _conflicts(self) -> list[tuple[bool, str]]:
        """(is it wrong, what is wrong) for every rule that joins two values."""
        nope = self.head_dim - self.qk_rope_head_dim
        heads, groups = self.num_attention_heads, self.o_groups
        blocks = (self.num_hidden_layers, self.num_hidden_layers + self.num_nextn_predict_layers)
        power_of_two = self.index_head_dim & (self.index_head_dim - 1) == 0
        return [
            (nope < 0, "head_dim is below qk_rope_head_dim"),
            (
                not power_of_two or self.index_head_dim < self.qk_rope_head_dim,
                "index_head_dim must be a power of two and at least qk_rope_head_dim",
            ),
            (heads % groups > 0, f"o_groups {groups} must divide num_attention_heads {heads}"),
            (
                self.num_experts_per_tok > self.n_routed_experts,
                f"num_experts_per_tok {self.num_experts_per_tok} is above "
                f"n_routed_experts {self.n_routed_experts}",
            ),
            (
                len(self.compress_ratios) not in blocks,
                f"compress_ratios has {len(self.compress_ratios)} entries for "
                f"{self.num_hidden_layers} layers and {self.num_nextn_predict_layers} MTP blocks",
            ),
            (self.eos_token_id >= self.vocab_size, "eos_token_id is outside the vocabulary"),
            (self.bos_token_id >= self.vocab_size, "bos_token_id is outside the vocabulary"),
        ]

    def ratio(self, block: int) -> int:
        """Compression ratio of a block; the MTP blocks follow the main layers."""
        return self.compress_ratios[block] if block < len(self.compress_ratios) else 0

    @classmethod
    def from_dict(cls, values: dict[str, Any], name: str = "config.json") -> "ModelConfig":
        """Check `values` (the parsed `config.json` called `name`) and keep what the model needs.

        Raises DataError naming the key when a value is missing, out of range or of another
        architecture.
        """
        _refuse_other_architectures(values, name)
        values = official_names(values, name)
        missing = [key for key in REQUIRED if values.get(key) is None]
        if missing:
            raise DataError(f"{name}: missing {', '.join(missing)}")
        try:
            return cls.model_validate(_with_release(values))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            cause = first["msg"].removeprefix("Value error, ")
            found = "" if not where else f" (found {first['input']!r:.60})"
            raise DataError(f"{name}: {where + ': ' if where else ''}{cause}{found}") from None

    @classmethod
    def from_file(cls, path: Path) -> "ModelConfig":
        """Read and check a `config.json`. Raises DataError."""
        return cls.from_dict(read_json(path), str(path))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; DataError if there is no such file or no object in it."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise DataError(f"{path}: a JSON object is expected")
    return values


def _refuse_other_architectures(values: dict[str, Any], name: str) -> None:
    found = values.get("model_type")
    if found != "deepseek_v4":
        raise DataError(
            f"{name}: model_type {found!r} is not supported, only 'deepseek_v4' (DeepSeek-V4-Flash "
            "and -Pro) is"
        )
    for key in values:
        for stem, what in FOREIGN_KEYS.items():
            if stem in key.lower():
                raise DataError(f"{name}: key {key!r}: {what} is not supported")
    block = (values.get("quantization_config") or {}).get("weight_block_size", [128, 128])
    if block != [128, 128]:
        raise DataError(f"{name}: FP8 weight_block_size {block} is not supported, only [128, 128]")


def _with_release(values: dict[str, Any]) -> dict[str, Any]:
    """Recognise the 0731 release; its draft modules (`dspark_*`) are not part of this model."""
    if not any(key.startswith("dspark_") for key in values):
        return values
    layers, ratios = values.get("num_hidden_layers"), values.get("compress_ratios")
    if isinstance(layers, int) and isinstance(ratios, list) and len(ratios) > layers > 0:
        ratios = ratios[:layers]
    drafts_skipped = {"compress_ratios": ratios, "num_nextn_predict_layers": 0}
    return {"release": "0731", **values, **drafts_skipped}
