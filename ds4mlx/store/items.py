"""The two things a store keeps files of, segments and boundary records, and how files describe them."""

from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from ds4mlx.store import block_file
from ds4mlx.store.block_file import DamagedFile, Header, OtherVersion
from ds4mlx.store.directory import SEGMENTS, SUFFIX

# What a field of an entry or a header must be.
TYPES: dict[Any, Any] = {str: str, int: int, float: (int, float)}


@dataclass(frozen=True)
class Segment:
    """Rows and token ids of tokens start..end-1, behind the first `start` tokens of `parent`.

    Equal if they hold the same, whenever and however they were saved.
    """

    key: str
    model: str
    parent: str
    start: int
    end: int
    prefix: str  # public key of the first `end` tokens
    created: float = field(compare=False, default=0.0)
    label: str = field(compare=False, default="")
    text_bytes: int = field(compare=False, default=0)  # of the last block; 0 if no text is kept
    nbytes: int = field(compare=False, default=0)


@dataclass(frozen=True)
class Record:
    """The boundary record after `tokens` tokens, which lie on the chain that ends with `segment`.

    Equal as segments are.
    """

    key: str
    model: str
    segment: str
    tokens: int
    prefix: str  # public key of these tokens
    text: str = field(compare=False, default="")  # SHA1 of their text, empty if not known
    text_bytes: int = field(compare=False, default=0)
    reason: str = field(compare=False, default="cold")
    created: float = field(compare=False, default=0.0)
    nbytes: int = field(compare=False, default=0)


def segment_path(directory: Path, key: str) -> Path:
    """The file of the segment with this key."""
    return directory / SEGMENTS / (key + SUFFIX)


def read_item(path: Path, kind: type[Segment] | type[Record]) -> Segment | Record:
    """What a file's header says. Raises DamagedFile, OtherVersion or OSError."""
    with block_file.opened(path) as fd:
        item = described(block_file.read_header(fd, path), path, kind)
    if item.key != path.stem:
        raise OtherVersion(f"{path}: holds what belongs under another name")
    return item


def described(header: Header, path: Path, kind: type[Segment] | type[Record]) -> Segment | Record:
    """The segment or record that a header describes. Raises OtherVersion.

    Fields that are not known here say nothing about how the bytes lie: that stands in the model's
    fingerprint. Fields that are missing have their defaults, where they can have one.
    """
    names = {each.name for each in fields(kind)}
    meta = {name: value for name, value in header.meta.items() if name in names}
    item = exactly(kind, {**meta, "nbytes": header.nbytes}, meta.get("key"), defaults=True)
    if item is None:
        raise OtherVersion(f"{path}: its header is sound, but describes something else")
    return item


def fault(path: Path) -> Exception | None:
    """What is wrong with a file, by its own checksums; None if nothing is, or if it has gone."""
    try:
        with block_file.opened(path) as fd:
            block_file.check_blocks(fd, path, block_file.read_header(fd, path))
    except DamagedFile as error:
        return error
    except (OtherVersion, OSError):
        return None
    return None


def exactly(
    kind: type[Segment] | type[Record], values: Any, key: Any, defaults: bool = False
) -> Segment | Record | None:
    """The item with these values; None unless they are the fields of this version, of right types."""
    if not isinstance(values, dict) or values.get("key") != key:
        return None
    for each in fields(kind):
        if each.name not in values:
            if not defaults or each.default is MISSING:
                return None
        elif not isinstance(values[each.name], TYPES[each.type]):
            return None
    if values.keys() - {each.name for each in fields(kind)}:
        return None
    return kind(**values)
