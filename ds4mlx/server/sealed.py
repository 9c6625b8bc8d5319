"""Thoughts in a form that clients carry and send back without showing it.

It is no secret: only the thought itself, so that nothing has to be kept for a client's sake. It is
not packed either: what clients send in its place cannot become larger than it came.
"""

import base64

_MARK = "ds4mlx-thought-"


def seal(thought: str) -> str:
    """An opaque text that `unseal` turns back into the thought."""
    return _MARK + base64.b64encode(thought.encode()).decode()


def unseal(sealed: object) -> str:
    """The thought; empty for anything that `seal` has not made, such as another model's."""
    if not isinstance(sealed, str) or not sealed.startswith(_MARK):
        return ""
    try:
        return base64.b64decode(sealed.removeprefix(_MARK), validate=True).decode()
    except ValueError:
        return ""
