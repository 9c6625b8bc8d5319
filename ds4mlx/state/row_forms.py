"""How the decode state holds rows: packed where the model's own rounding makes that lossless.

With `rounding="official"` a KV row is E4M3 codes, their E8M0 exponents and the rotary channels in
the activation type (584 bytes at Flash's shapes with bfloat16), an indexer row E2M1 codes and
exponents (68 bytes). With `rounding="none"` rows are held as computed. Packed rows are words of 32
bits, so that a row is few elements to gather.
"""

from dataclasses import dataclass
from functools import cache
from typing import Protocol

import mlx.core as mx

from ds4mlx.config import ModelConfig
from ds4mlx.custom_kernels.comparisons import take_forms
from ds4mlx.custom_kernels.layer.row_layout import Form, RowLayout
from ds4mlx.state.rounding import (
    FP4_GROUP,
    FP8_GROUP,
    Rounding,
    decode_fp4,
    decode_fp8,
    encode_fp4,
    encode_fp8,
    straight_through,
)


class RowForm(Form, Protocol):
    """A way to hold rows of `width` channels."""

    @property
    def width(self) -> int:
        """Channels of a row."""
        ...

    @property
    def dtype(self) -> mx.Dtype:
        """Type of the elements held."""
        ...

    @property
    def elements(self) -> int:
        """Elements held per row."""
        ...


@dataclass(frozen=True)
class PlainRows:
    """Rows as computed."""

    width: int
    dtype: mx.Dtype

    @property
    def elements(self) -> int:
        """Elements held per row."""
        return self.width

    @property
    def layout(self) -> RowLayout:
        """How a row lies."""
        return RowLayout("plain", self.width, self.width, self.dtype)

    def pack(self, rows: mx.array) -> mx.array:
        """The rows themselves."""
        return rows

    def unpack(self, held: mx.array) -> mx.array:
        """The rows in float32."""
        return held.astype(mx.float32)


@dataclass(frozen=True)
class RoundedRows(PlainRows):
    """Rows rounded as another form rounds them, and held as values, for gradients to go through."""

    as_by: "PackedKVRows | PackedIndexRows"

    def pack(self, rows: mx.array) -> mx.array:
        """The rounded rows; the gradient is that of the rows themselves."""
        return straight_through(self._rounded)(rows) if rows.size else rows

    def _rounded(self, rows: mx.array) -> mx.array:
        return self.as_by.unpack(self.as_by.pack(rows)).astype(rows.dtype)


@dataclass(frozen=True)
class PackedKVRows:
    """Codes of the channels without position, their exponents, padding to 8 bytes, rotary channels.

    `rotary` is the activation type; it must hold a code times its scale exactly.
    """

    width: int
    rope: int
    rotary: mx.Dtype
    dtype: mx.Dtype = mx.uint32

    @property
    def coded(self) -> int:
        """Channels that are coded, one byte each."""
        return self.width - self.rope

    @property
    def groups(self) -> int:
        """Exponents per row."""
        return -(-self.coded // FP8_GROUP)

    @property
    def head(self) -> int:
        """Bytes before the rotary channels."""
        return -(-(self.coded + self.groups) // 8) * 8

    @property
    def elements(self) -> int:
        """Words held per row."""
        return (self.head + self.rope * self.rotary.size) // 4

    @property
    def layout(self) -> RowLayout:
        """How a row lies."""
        return RowLayout("kv", self.width, self.elements, self.dtype, self.coded, self.head)

    def pack(self, rows: mx.array) -> mx.array:
        """Rows (..., width) -> words (..., elements)."""
        if rows.size == 0:
            return mx.zeros((*rows.shape[:-1], self.elements), self.dtype)
        codes, exponents = encode_fp8(rows[..., : self.coded])
        padding = mx.zeros((*rows.shape[:-1], self.head - self.coded - self.groups), mx.uint8)
        rotary = mx.contiguous(rows[..., self.coded :].astype(self.rotary)).view(mx.uint8)
        return mx.concatenate([codes, exponents, padding, rotary], axis=-1).view(self.dtype)

    def unpack(self, held: mx.array) -> mx.array:
        """Words (..., elements) -> float32 (..., width)."""
        rotary = mx.contiguous(held[..., self.head // 4 :]).view(self.rotary)
        front = mx.contiguous(held[..., : self.head // 4]).view(mx.uint8)
        exponents = front[..., self.coded : self.coded + self.groups]
        values = decode_fp8(front[..., : self.coded], exponents)
        return mx.concatenate([values, rotary.astype(mx.float32)], axis=-1)


@dataclass(frozen=True)
class PackedIndexRows:
    """E2M1 codes, two a byte, then the exponents, padded to a word."""

    width: int
    dtype: mx.Dtype = mx.uint32

    @property
    def groups(self) -> int:
        """Exponents per row."""
        return self.width // FP4_GROUP

    @property
    def elements(self) -> int:
        """Words held per row."""
        return self.width // 8 + -(-self.groups // 4)

    @property
    def layout(self) -> RowLayout:
        """How a row lies."""
        return RowLayout("index", self.width, self.elements, self.dtype)

    def pack(self, rows: mx.array) -> mx.array:
        """Rows (..., width), already Hadamard-rotated -> words (..., elements)."""
        if rows.size == 0:
            return mx.zeros((*rows.shape[:-1], self.elements), self.dtype)
        codes, exponents = encode_fp4(rows)
        padding = mx.zeros((*rows.shape[:-1], -self.groups % 4), mx.uint8)
        return mx.concatenate([codes, exponents, padding], axis=-1).view(self.dtype)

    def unpack(self, held: mx.array) -> mx.array:
        """Words (..., elements) -> float32 (..., width)."""
        front = mx.contiguous(held).view(mx.uint8)
        half = self.width // 2
        return decode_fp4(front[..., :half], front[..., half : half + self.groups])


@dataclass(frozen=True)
class StateForm:
    """How a decode state holds KV rows (of the window, and compressed) and indexer rows."""

    kv: RowForm
    index: RowForm

    @classmethod
    def of(cls, config: ModelConfig, dtype: mx.Dtype, rounding: Rounding) -> "StateForm":
        """The form for activations of type `dtype`."""
        width, rope = config.head_dim, config.qk_rope_head_dim
        return cls(*forms(width, config.index_head_dim, rope, dtype, rounding != "none"))

    def of_values(self, dtype: mx.Dtype) -> "StateForm":
        """The same rows as values of the activation type, which gradients go through."""
        kv, index = (
            RoundedRows(form.width, dtype, form)
            if isinstance(form, PackedKVRows | PackedIndexRows)
            else form
            for form in (self.kv, self.index)
        )
        return StateForm(kv, index)


@cache  # asked for with every call of a model, to compare with those of its states
def forms(
    width: int, index: int, rope: int, dtype: mx.Dtype, coded: bool
) -> tuple[RowForm, RowForm]:
    """The forms of KV rows and of index rows of so many channels; `rope` of the former turn.

    coded: whether rows are rounded to codes.
    """
    if not coded:
        return PlainRows(width, dtype), PlainRows(index, dtype)
    kv = PackedKVRows(width, rope, dtype) if width > rope else PlainRows(width, dtype)
    return kv, PackedIndexRows(index)


take_forms(forms)  # for comparisons of the kernels that read or write rows


def row_bytes(form: RowForm) -> int:
    """Bytes held per row."""
    return form.elements * form.dtype.size
