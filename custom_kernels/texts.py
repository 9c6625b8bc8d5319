"""From a kernel's text as it is written to what MLX is handed: shorter, and in the words of its target."""

import re

# Spaces beside what is no part of a word, on one side.
_SPACES = re.compile(r"(?<=\w) +(?=\W)|(?<=\W) +(?=\w)")
_BEGINNING = re.compile(r"\n(?=[#a-z])")
# What a definition defines: a macro, a type, a function.
_NAMES = re.compile(r"#define (\w+)|(?:typedef|struct) .*?(\w+)\s*(?:;|$)|(\w+)\(")
_WORD = re.compile(r"\w+")
_SHARED = re.compile(r"^(\s*)threadgroup (?=[^*&]*\[[^;]*;)", re.MULTILINE)
_SHARED_SIZED = re.compile(r"^(\s*)threadgroup ([^*&\[]*)\[[^;]*;", re.MULTILINE)


def compact(text: str) -> str:
    """A text without comments, empty lines and spaces that say nothing: MLX goes through it at every call."""
    lines = (line.partition("//")[0].strip() for line in text.splitlines())
    return "\n".join(_squeezed(line) for line in lines if line) + "\n"


def _squeezed(line: str) -> str:
    return line if line.startswith("#") or '"' in line else _SPACES.sub("", line)


def without_unused(library: str, text: str) -> str:
    """Those definitions of a library that a text, or a definition that stays, names.

    A definition begins where a line does that is not indented; what defines no name stays.
    """
    parts: list[str] = []
    for part in _BEGINNING.split(library.strip()):
        if parts and parts[-1].startswith("template") and not _defined(parts[-1]):
            parts[-1] += "\n" + part
        else:
            parts.append(part)
    names = [_defined(part) for part in parts]
    kept = [not own for own in names]
    words = set(_WORD.findall(text))
    while new := [i for i, own in enumerate(names) if not kept[i] and own & words]:
        for i in new:
            kept[i] = True
            words |= set(_WORD.findall(parts[i]))
    return "\n".join(part for part, stays in zip(parts, kept, strict=True) if stays) + "\n"


def _defined(part: str) -> set[str]:
    found = _NAMES.findall(part.partition("{")[0])
    return {name for names in found for name in names if name}


def cuda_text(text: str, dynamic: bool = False) -> str:
    """A body or header as CUDA takes it: arrays of the threadgroup are declared as shared.

    dynamic: how large they are is said where the kernel is made, and the text has one at most.
    """
    if dynamic:
        return _SHARED_SIZED.sub(r"\1extern __shared__ \2[];", text)
    return _SHARED.sub(r"\1__shared__ ", text)
