"""The versions that uv.lock names, as constraints for pip, one a line.

A package that the lock holds in several versions, by the version of Python, is left to pip.
"""

import tomllib
from collections import Counter
from pathlib import Path


def pins(lock: Path) -> list[str]:
    """`name==version` of every package from a registry that has one version in the lock."""
    packages = tomllib.loads(lock.read_text())["package"]
    count = Counter(package["name"] for package in packages)
    return [
        f"{package['name']}=={package['version']}"
        for package in packages
        if count[package["name"]] == 1 and "registry" in package["source"]
    ]


if __name__ == "__main__":
    print("\n".join(pins(Path(__file__).parents[1] / "uv.lock")))
