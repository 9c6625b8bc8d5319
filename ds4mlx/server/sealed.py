"""Thoughts in a form that clients carry and send back without showing it.

It is no secret: only the thought itself, so that nothing has to be kept for a client's sake.
"""

import base64
import zlib

_MARK = "ds4mlx-thought-"
# A thought is shorter than any context; a longer text under our mark was not written here.
_MOST = 8 << 20


def seal(thought: str) -> str:
    """An opaque text that `unseal` turns back into the thought."""
    return _MARK + base64.b64encode(zlib.compress(thought.encode())).decode()


def unseal(sealed: object) -> str:
    """The thought; empty for anything that `seal` has not made, such as another model's."""
    if not isinstance(sealed, str) or not sealed.startswith(_MARK):
        return ""
    try:
        packed = base64.b64decode(sealed.removeprefix(_MARK), validate=True)
        return zlib.decompressobj().decompress(packed, _MOST).decode()
    except (ValueError, zlib.error):
        return ""
