"""How an editable install finds the package; everything else is in pyproject.toml.

For a map of packages setuptools would install an import hook. Python asks it only after the path, on
which a clone called `ds4mlx`, a folder without an `__init__.py`, counts as a package of that name for
whoever works beside it. A clone has the links that the map stands for, so here its root is put on
the path instead: a package that is found there goes before such a folder wherever that is.
"""

from setuptools import setup
from setuptools.command.editable_wheel import editable_wheel


class OnThePath(editable_wheel):
    """Installs the clone's root as an entry of the path."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.package_dir = {"": "."}


setup(cmdclass={"editable_wheel": OnThePath})
