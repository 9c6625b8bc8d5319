"""Number codes of the official files: E4M3, E8M0, packed E2M1, BF16; and what must not occur."""

from pathlib import Path

import numpy as np

from ds4mlx.errors import DataError

GROUP = 32


def _e4m3_values() -> np.ndarray:
    """Value of each of the 256 codes: sign, exponent of bias 7, three bits; 0x7F and 0xFF are NaN."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    size = np.where(
        exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    )
    size[code & 127 == 127] = np.nan
    return np.where(code > 127, -size, size).astype(np.float32)


E4M3 = _e4m3_values()
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
# Both values of a byte of packed FP4: the low nibble is the even column.
E2M1_PAIRS = np.stack([E2M1[np.arange(256) & 15], E2M1[np.arange(256) >> 4]], axis=-1)


def decode_e8m0(codes: np.ndarray) -> np.ndarray:
    """2^(code - 127), float32."""
    return np.ldexp(np.float32(1), codes.astype(np.int32) - 127)


def decode_fp8(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """E4M3 codes (r, n) with E8M0 codes (r, ceil(n / 32)) -> float32 (r, n)."""
    return _scaled(E4M3[codes], scales)


def decode_fp4(packed: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Packed E2M1 (r, n / 2) with E8M0 codes (r, n / 32) -> float32 (r, n)."""
    return _scaled(E2M1_PAIRS[packed].reshape(len(packed), -1), scales)


def _scaled(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return values * np.repeat(decode_e8m0(scales), GROUP, axis=1)[:, : values.shape[1]]


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """BF16 bit patterns uint16 -> float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Finite float32 -> BF16 bit patterns uint16, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def check(stored: np.ndarray, dtype: str, path: Path, name: str) -> None:
    """Refuse NaN and infinite weights and NaN scales: no right checkpoint has any."""
    bad = {
        "F8_E8M0": lambda: (stored == 255).any(),
        "F8_E4M3": lambda: ((stored & 127) == 127).any(),
        "BF16": lambda: ((stored & 0x7F80) == 0x7F80).any(),
        "F32": lambda: not np.isfinite(stored).all(),
    }
    if dtype in bad and bad[dtype]():
        what = "the NaN scale byte 255" if dtype == "F8_E8M0" else "a value that is not finite"
        raise DataError(f"{path}: tensor {name} holds {what}")


def check_ids(table: np.ndarray, count: int, path: Path, name: str) -> np.ndarray:
    """Expert ids as int32; DataError if one is not in 0..count-1 or twice in a row."""
    if ((table < 0) | (table >= count)).any():
        raise DataError(f"{path}: tensor {name} names an expert outside 0..{count - 1}")
    if (np.diff(np.sort(table, axis=1), axis=1) == 0).any():
        raise DataError(f"{path}: tensor {name} names an expert twice for one token")
    return table.astype(np.int32)
