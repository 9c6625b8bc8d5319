"""Spoiled copies of a GGUF file: cut, bits flipped, or one field of its header changed."""

import struct
from collections.abc import Iterator

import numpy as np

Mutant = tuple[str, bytes]  # what was done, the file's bytes
# Numbers that counts, lengths, dimensions and places are set to.
HUGE = (2**31 - 1, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)
KEYS = [
    "block_count",
    "embedding_length",
    "attention.head_count",
    "attention.key_length",
    "rope.dimension_count",
    "attention.q_lora_rank",
    "attention.output_group_count",
    "attention.sliding_window",
    "attention.indexer.head_count",
    "attention.indexer.top_k",
    "expert_count",
    "expert_used_count",
    "hash_layer_count",
    "attention.compress_ratios",
    "swiglu_clamp_exp",
    "rope.scaling.type",
    "expert_weights_norm",
    "rope.freq_base",
    "hyper_connection.count",
    "context_length",
]
TENSORS = [
    "token_embd.weight",
    "blk.0.attn_kv.weight",
    "blk.0.ffn_gate_exps.weight",
    "blk.1.attn_sinks.weight",
    "blk.0.ffn_gate_tid2eid.weight",
    "blk.2.attn_compressor_ape.weight",
    "output_hc_scale.weight",
]


class Sound:
    """A sound file and where things are in it."""

    def __init__(self, raw: bytes, data_start: int):
        self.raw, self.data_start = raw, data_start

    def key(self, name: str) -> int:
        """Where a metadata value's type stands; the value follows it."""
        full = name if name.startswith("tokenizer") else "deepseek4." + name
        return self.after(full)

    def tensor(self, name: str) -> int:
        """Where a tensor's number of dimensions stands; dimensions, type and place follow."""
        return self.after(name)

    def after(self, text: str) -> int:
        head = struct.pack("<Q", len(text.encode())) + text.encode()
        assert self.raw.count(head) == 1, text
        return self.raw.index(head) + len(head)

    def put(self, place: int, form: str, value: int) -> bytes:
        """The file with a number replaced."""
        new = struct.pack("<" + form, value)
        return self.raw[:place] + new + self.raw[place + len(new) :]

    def with_key(self, key: bytes, kind: int, value: bytes) -> bytes:
        """The file with a key more, in front."""
        record = struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value
        (count,) = struct.unpack_from("<Q", self.raw, 16)
        start = self.raw[:16] + struct.pack("<Q", count + 1) + record
        header = start + self.raw[24 : self.data_start].rstrip(b"\0")
        return header + bytes(-len(header) % 32) + self.raw[self.data_start :]


def cuts(sound: Sound, rng: np.random.Generator) -> Iterator[Mutant]:
    """Truncations: at every early byte, and anywhere."""
    ends = [*range(0, 26, 2), *rng.integers(26, sound.data_start, 30)]
    for end in [*ends, *rng.integers(sound.data_start, len(sound.raw), 20)]:
        yield f"cut at {end}", sound.raw[: int(end)]


def flips(sound: Sound, rng: np.random.Generator) -> Iterator[Mutant]:
    """One bit of the header."""
    for place in rng.integers(0, sound.data_start, 150):
        raw = bytearray(sound.raw)
        raw[place] ^= 1 << int(rng.integers(8))
        yield f"bit at {place}", bytes(raw)


def beginnings(sound: Sound) -> Iterator[Mutant]:
    """Magic, version, and the two counts."""
    for magic in (b"GGML", b"FUGG", b"\0\0\0\0", b"gguf"):
        yield f"magic {magic}", magic + sound.raw[4:]
    for version in (0, 1, 2, 4, 3 << 24, 2**32 - 1):
        yield f"version {version}", sound.put(4, "I", version)
    for place, what in ((8, "tensors"), (16, "keys")):
        (count,) = struct.unpack_from("<Q", sound.raw, place)
        for value in (0, 1, count - 1, count + 1, 10**6, *HUGE):
            yield f"{value} {what}", sound.put(place, "Q", value)


def metadata(sound: Sound) -> Iterator[Mutant]:
    """Types, values and lengths of metadata."""
    for name in KEYS:
        place = sound.key(name)
        for kind in (4, 6, 7, 8, 9, 12, 13, 2**32 - 1):
            yield f"{name} of type {kind}", sound.put(place, "I", kind)
        for value in (0, 2**31 - 1, 2**32 - 1):
            yield f"{name} is {value}", sound.put(place + 4, "I", value)
    for name in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges"):
        place = sound.key(name)
        for kind in (9, 12, 99):
            yield f"{name} of elements {kind}", sound.put(place + 4, "I", kind)
        for count in (0, 1, *HUGE):
            yield f"{name} has {count}", sound.put(place + 8, "Q", count)
        for length in HUGE:
            yield f"{name} begins with {length}", sound.put(place + 16, "Q", length)


def keys(sound: Sound) -> Iterator[Mutant]:
    """Keys that are not text, twice there, or one too many."""
    for value in (0, 1, 3, 8, 48, 2**31, 2**32 - 1):
        raw = sound.with_key(b"general.alignment", 4, struct.pack("<I", value))
        yield f"alignment {value}", raw
    yield "alignment of text", sound.with_key(b"general.alignment", 8, struct.pack("<Q", 0))
    yield "a key twice", sound.with_key(b"deepseek4.block_count", 4, struct.pack("<I", 3))
    yield "a key that is not UTF-8", sound.with_key(b"a\xff\xfe", 4, bytes(4))
    yield "a value that is not UTF-8", sound.with_key(b"a", 8, struct.pack("<Q", 2) + b"\xc3\x28")
    yield "a key of no length", sound.with_key(b"", 4, bytes(4))
    deep = b"".join(struct.pack("<IQ", 9, 1) for _ in range(5000)) + struct.pack("<IQ", 4, 0)
    yield "arrays in arrays", sound.with_key(b"a", 9, deep)
    many = struct.pack("<IQ", 0, 2**33)
    yield "an array longer than the file", sound.with_key(b"a", 9, many)


def tensors(sound: Sound) -> Iterator[Mutant]:
    """Dimensions, types, places and names of tensors."""
    for name in TENSORS:
        place = sound.tensor(name)
        (count,) = struct.unpack_from("<I", sound.raw, place)
        kind, start = place + 4 + 8 * count, place + 8 + 8 * count
        (at,) = struct.unpack_from("<Q", sound.raw, start)
        for value in (0, 1, 5, 2**31):
            yield f"{name} has {value} dimensions", sound.put(place, "I", value)
        for value in (0, 1, 7, *HUGE):
            yield f"{name} is {value} wide", sound.put(place + 4, "Q", value)
        for value in (0, 1, 2, 3, 9, 10, 16, 26, 31, 42, 99, 2**31):
            yield f"{name} of type {value}", sound.put(kind, "I", value)
        for value in (at + 1, at + 32, at ^ 64, len(sound.raw), *HUGE):
            yield f"{name} at {value}", sound.put(start, "Q", value)
        yield f"{name} not UTF-8", sound.put(place - 4, "B", 0xFF)
    twice = sound.raw.replace(b"blk.1.hc_attn_base.weight", b"blk.0.hc_attn_base.weight")
    yield "a name twice", twice


def all_mutants(sound: Sound, seed: int = 0) -> list[Mutant]:
    rng = np.random.default_rng(seed)
    kinds = (cuts(sound, rng), flips(sound, rng), beginnings(sound), metadata(sound), keys(sound))
    return [mutant for kind in (*kinds, tensors(sound)) for mutant in kind]
