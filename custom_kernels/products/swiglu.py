"""SwiGLU with its clamps, in MLX operations and as the text that kernels call; both keep NaN."""

import mlx.core as mx

# Not min and max, which give the limit for a NaN.
HEADER = """
inline float swiglu(float gate, float up, float limit) {
  gate = gate > limit ? limit : gate;
  up = up > limit ? limit : up < -limit ? -limit : up;
  return gate / (1.0f + exp(-gate)) * up;
}
"""


def swiglu(gate: mx.array, up: mx.array, limit: float) -> mx.array:
    """silu(gate) * up, float32; both clamped from above, `up` also from below."""
    gate = mx.minimum(gate.astype(mx.float32), limit)
    up = mx.clip(up.astype(mx.float32), -limit, limit)
    return gate * mx.sigmoid(gate) * up
