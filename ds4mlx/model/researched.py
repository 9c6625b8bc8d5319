"""What researchers ask of a model, of which the work is done in `ds4mlx.research`."""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import ds4mlx
from ds4mlx.model.module import Module


class Researched(Module):
    """A model whose quantities can be recorded and changed while it runs."""

    def trace(
        self, *patterns: str, positions: Iterable[int] | None = None
    ) -> AbstractContextManager[Mapping[str, Any]]:
        """Record quantities of this model's calls inside a `with` block; see `sites` for their names.

        In a pattern `*` stands for one dotted part and `**` for any number; the name of a group, such as
        `layers.3.ffn.router`, stands for all under it. `t[name]` is (B, L, ...), the calls of the block
        joined along L, or a list of (L, ...) where sequences differ in length; compressed rows are those
        after the last call, (B, R, width), or of several states a list of (R, width). positions: which
        tokens to record, by their absolute positions; all unless given. DataError: a pattern that matches
        nothing, or a name that the trace does not have.
        """
        return _research().trace.trace(self, patterns, positions)

    def intervene(
        self, changes: Mapping[str, Any], positions: Iterable[int] | None = None
    ) -> AbstractContextManager[None]:
        """Change quantities of this model's calls inside a `with` block.

        changes: by pattern, as for `trace`, a function of the value (B, L, ...) and a `Where` that gives
        the new value, or an array that takes its place; `ds4mlx.research` has functions for what is
        often wanted. positions: at which tokens, by their absolute positions; all unless given. Blocks may
        be nested: an inner one goes on from what an outer one made. DataError: a pattern that matches
        nothing that can be changed, or a new value that does not fit.
        """
        return _research().intervene.intervene(self, changes, positions)

    def steer(
        self, steering: Any, scale: float | None = None, layers: Iterable[int] | None = None
    ) -> AbstractContextManager[None]:
        """Steer this model's calls inside a `with` block by a `ds4mlx.research.Steering`.

        scale: how much, where it is not to be the steering's own; 0 leaves the model as it is. layers: which
        of the steering's layers, from 0. Steered states are stored apart from others. DataError: a
        steering of another width, a layer that it or the model does not have, a scale that is not finite.
        """
        return _research().steering.steer(self, steering, scale, layers)

    def sites(self) -> Mapping[str, Any]:
        """What `trace` and `intervene` can name: name -> `Site` of shape, dtype and place in the paper."""
        return _research().sites.sites(self)


def _research() -> Any:
    """The room above that records and changes quantities, imported when it is first asked for."""
    return ds4mlx.research
