"""Files of second moments for tests: random ones, and spoiled ones."""

import numpy as np

from ds4mlx.convert.moments import tensor_shapes, write_moments
from ds4mlx.convert.official import OfficialSource


def correlated(columns, seed=0, rows=2000):
    """Sums of x x^T of inputs whose spectrum falls, float32 (columns, columns)."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((columns, columns)) / np.sqrt(np.arange(1, columns + 1))[:, None]
    x = rng.standard_normal((rows, columns)) @ mix
    return (x.T @ x).astype(np.float32)


def arrays_for(source, per_expert=False, counts=None):
    """What a collection over the official checkpoint would write, with random sums."""
    opened = OfficialSource(source)
    entries = {e.name: e for entries in opened.inventory.values() for e in entries}
    arrays = {}
    for seed, (name, shape) in enumerate(tensor_shapes(opened.config, per_expert).items()):
        if name.endswith("ffn_norm"):
            arrays[name] = opened.values(entries[f"{name}.weight"], 0, 0, shape[0])
        elif name.endswith("counts"):
            arrays[name] = np.array(counts or [9999] * shape[0], np.float32)
        else:
            count = shape[0] if len(shape) == 3 else 1
            sums = np.stack([correlated(shape[-1], seed + n) for n in range(count)])
            arrays[name] = sums.reshape(shape)
    return arrays


def written(path, arrays, tokens=5000):
    write_moments(path, arrays, tokens, "a run")
    return path
