"""What modules and the plain bodies of kernels have in common: RMSNorm and the rotary turn."""

import mlx.core as mx

# cos and sin, float32, each (L, rope_dims / 2).
Angles = tuple[mx.array, mx.array]


def rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
    """RMSNorm with or without a weight; x: (..., n) in any float type."""
    weight = None if weight is None else weight.astype(mx.float32)
    return mx.fast.rms_norm(x.astype(mx.float32), weight, eps).astype(x.dtype)


def rotate(x: mx.array, angles: Angles, inverse: bool = False) -> mx.array:
    """Turn the channel pairs (2i, 2i + 1) of x's last rope_dims channels.

    x: (L, c) or (L, H, c), any float type; angles: (L, rope_dims / 2) each. float32 inside.
    """
    cos, sin = (a if x.ndim == 2 else a[:, None] for a in angles)
    sin = -sin if inverse else sin
    dims = 2 * cos.shape[-1]
    pairs = x[..., -dims:].astype(mx.float32).reshape(*x.shape[:-1], dims // 2, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    turned = mx.stack([a * cos - b * sin, a * sin + b * cos], axis=-1)
    turned = turned.reshape(*x.shape[:-1], dims).astype(x.dtype)
    return mx.concatenate([x[..., :-dims], turned], axis=-1)
