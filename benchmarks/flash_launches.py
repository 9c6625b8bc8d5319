"""Whatever Flash launches, once: 8 layers, random weights. For `prebuild.py`, which compiles it all.

MLX_PTX_CACHE_DIR=DIR python benchmarks/prebuild.py benchmarks/flash_launches.py [--recipe q2]
"""

import argparse

import mlx.core as mx

from ds4mlx.bench.synth import RECIPES, config_like, synth_model
from ds4mlx.bench.whole_model import synthetic_state
from ds4mlx.custom_kernels import dispatch

LAYERS = 8
CHUNKS, DEPTHS, BATCHES = (512, 2048, 4096, 9), (100, 4096, 65536), (1, 2, 4, 8)


def main() -> None:
    """Chunks and steps at several depths."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", choices=RECIPES, default="q2")
    model = synth_model(config_like("flash", LAYERS), parser.parse_args().recipe)
    with dispatch.kernels():
        for chunk in CHUNKS:
            state = model.make_cache()
            for _ in range(2):
                mx.eval(model.last_logits(mx.ones((1, chunk), mx.int32), state))
        for depth in DEPTHS:
            for batch in BATCHES:
                states = [synthetic_state(model, depth) for _ in range(batch)]
                mx.eval(mx.argmax(model.step(mx.ones((batch,), mx.int32), states), axis=-1))


if __name__ == "__main__":
    main()
