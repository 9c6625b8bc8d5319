"""The sizes that a benchmark is asked for: of the model to make, and numbers in a list."""

from ds4mlx import ModelConfig
from ds4mlx.bench.synth import config_like
from ds4mlx.engine.default_model import EMBEDDED


def shapes(layers: int, small: bool) -> tuple[ModelConfig, str]:
    """A config of so many layers of Flash, or the embedded model's, and what it is called in results."""
    if small:
        return ModelConfig.from_file(EMBEDDED / "config.json"), "embedded"
    return config_like("flash", layers), f"{layers} layers of Flash"


def numbers(text: str) -> list[int]:
    """Numbers with commas between them, perhaps none."""
    return [int(each) for each in text.split(",") if each]
