"""The sizes of the model that a benchmark is asked to make."""

from ds4mlx import ModelConfig
from ds4mlx.bench.synth import config_like
from ds4mlx.engine.default_model import EMBEDDED


def shapes(layers: int, small: bool) -> tuple[ModelConfig, str]:
    """A config of so many layers of Flash, or the embedded model's, and what it is called in results."""
    if small:
        return ModelConfig.from_file(EMBEDDED / "config.json"), "embedded"
    return config_like("flash", layers), f"{layers} layers of Flash"
