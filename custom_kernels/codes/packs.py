"""How each format's codes become numbers inside a kernel: a chunk of 64 columns at a time.

A Pack is what one lane loads of one row: 16-byte words of codes and their scales. `dot_group` is the
product of 32 of its columns with a staged group; codes are made half2 exactly, two at a time, by
placing their bits in a half's mantissa. For tiles there is less at a time: Group g of a row are its
columns from 32 g on, and `eight` makes those from 8 j on float, `values` all of them.
"""

from dataclasses import dataclass

from ds4mlx.custom_kernels.codes import iq2 as codes_iq2
from ds4mlx.custom_kernels.codes import k as codes_k
from ds4mlx.custom_kernels.codes import plain as codes_plain

# A pair of codes as two of 32 columns, `apart` of each other.
_PUT = """
inline void put(half2 code, float scale, float least, thread float* v, int apart) {
  v[0] = fma(low(code), scale, least);
  v[apart] = fma(high(code), scale, least);
}
"""


# All 32 columns of a group.
_VALUES = """
inline void values(Group group, thread float* v, const threadgroup uint4* lut) {
  for (int j = 0; j < 4; j++) eight(group, j, v + 8 * j, lut);
}
"""


@dataclass(frozen=True)
class Packing:
    """A format's text, its planes in the order of `load_pack`, and how its codes pair."""

    planes: tuple[str, ...]
    pairing: str
    largest: int  # of the staged activations: 16 products of it and a code stay finite in half
    loading: str
    dot: str
    values: str
    lut: bool = False
    apart: int = 0  # of the four columns whose codes are bytes of a word; 0: no such product
    byte_dot: str = ""

    @property
    def decoding(self) -> str:
        """Text for kernels that decode into tiles."""
        return self.loading + _PUT + self.values + _VALUES

    def names(self, matrix: str) -> list[str]:
        """The kernel's inputs that hold a matrix."""
        return [f"{matrix}_{plane}" for plane in self.planes]


PACKINGS = {
    "iq2_xxs": Packing(
        ("weight", "d"),
        "8",
        64,
        codes_iq2.IQ2,
        codes_iq2.IQ2_DOT,
        codes_iq2.IQ2_VALUES,
        lut=True,
        apart=1,
        byte_dot=codes_iq2.IQ2_BYTES,
    ),
    "q2_k": Packing(
        ("weight", "scales", "d"),
        "16",
        256,
        codes_k.Q2_K,
        codes_k.Q2_K_DOT,
        codes_k.Q2_K_VALUES,
        apart=4,
        byte_dot=codes_k.Q2_K_BYTES,
    ),
    "q4_k": Packing(
        ("weight", "scales", "d"),
        "8",
        64,
        codes_k.Q4_K,
        codes_k.Q4_K_DOT,
        codes_k.Q4_K_VALUES,
        apart=2,
        byte_dot=codes_k.Q4_K_BYTES,
    ),
    "mxfp4": Packing(
        ("weight", "scales"),
        "8",
        2048,
        codes_plain.MXFP4,
        codes_plain.MXFP4_DOT,
        codes_plain.MXFP4_VALUES,
    ),
    "mxfp8": Packing(
        ("weight", "scales"), "4", 128, codes_plain.MXFP8, "", codes_plain.MXFP8_VALUES
    ),
    "q8_0": Packing(
        ("weight", "d"), "4", 16, codes_plain.Q8_0, codes_plain.Q8_0_DOT, codes_plain.Q8_0_VALUES
    ),
}
