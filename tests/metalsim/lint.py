"""What Apple's compiler would refuse and plain C++ would not.

The kernel is compiled with address spaces as types (-DMSL_STRICT); then clang's syntax tree is
walked for the rules of the Metal language that C++ has no word for. It knows the rules in RULES;
it is a net with holes, not Apple's front end.
"""

import json
import re
import subprocess
from bisect import bisect_left
from collections.abc import Iterator

from metalsim.build import BASE, CLANG
from metalsim.text import INSTANCE, Launch, to_cpp

RULES = {
    "pointer": "pointer type must have explicit address space qualifier",
    "reference": "reference type must have explicit address space qualifier",
    "double": "'double' is not supported in Metal",
    "bfloat": "implicit conversion to bfloat",
    "static": "static local variable",
    "lambda": "lambda expression",
    "global": "program scope variable must reside in constant address space",
    "keyword": "not in the Metal language",
}
_BANNED = {
    "CXXNewExpr": "new",
    "CXXDeleteExpr": "delete",
    "CXXThrowExpr": "throw",
    "CXXTryStmt": "try",
    "GotoStmt": "goto",
    "CXXDynamicCastExpr": "dynamic_cast",
    "CXXTypeidExpr": "typeid",
}
_DEFINED = re.compile(r"^\s*#\s*define\s+(\w+)", re.MULTILINE)
_SPACE = re.compile(r"\b(thread|device|constant|threadgroup)\b|address_space")
_CONSTANT = re.compile(r"\bconstant\b|address_space\(2\)")
_THREADGROUP = re.compile(r"\bthreadgroup\b|address_space\(3\)")
# extern, as clang's C++ makes no objects that have constructors in an address space
_FLAGS = ["-fsyntax-only", "-DMSL_STRICT", "-DMSL_TG=extern", "-ferror-limit=50"]
_FUNCTIONS = ("FunctionDecl", "CXXMethodDecl", "CXXConstructorDecl")


def check(*launches: Launch) -> list[str]:
    """What would be refused, a line of a kernel each; empty if nothing.

    All kernels are looked at together, each in a namespace: most of the time goes to Metal's headers.
    """
    unit, places = strict_unit(launches)
    command = [CLANG, *map(str, BASE), *_FLAGS]
    done = subprocess.run([*command, "-"], check=False, input=unit, capture_output=True, text=True)
    # utils.h has two parameters "constant const int64_t strides[2]", which clang's C++ refuses
    errors = [e for e in done.stderr.split("\n") if "error: " in e]
    errors = [_plain(e) for e in errors if "parameter may not be qualified" not in e]
    if errors:
        return errors
    # the namespaces of the kernels only: nine tenths of the tree are the headers'
    dump = [*command, "-Xclang", "-ast-dump=json", "-Xclang", "-ast-dump-filter=kernel_", "-"]
    trees = subprocess.run(dump, check=False, input=unit, capture_output=True, text=True).stdout
    namespaces = list(_documents(trees))
    assert len(namespaces) >= len(launches), "clang has left a kernel out"
    walker = _Walker(unit)
    for namespace in namespaces:
        walker.visit(namespace, None, None)
    return [_said(launches, places, *found) for found in sorted(walker.found)]


def _documents(text: str) -> Iterator[dict]:
    """The JSON documents that follow each other in a text, a line between them."""
    decoder, at = json.JSONDecoder(), 0
    while at < len(text):
        document, end = decoder.raw_decode(text, at)
        yield document
        at = end + 1


def strict_unit(launches: tuple[Launch, ...]) -> tuple[str, list[int]]:
    """C++ that is only looked at, not run, and the line before each kernel's first."""
    parts, places = ['#include "mlx/backend/metal/kernels/utils.h"'], []
    for number, launch in enumerate(launches):
        instance = INSTANCE.search(launch.source)
        tail = f"template decltype({instance[2]}) {instance[2]};" if instance else ""
        parts.append(f"namespace kernel_{number} {{")
        places.append("\n".join(parts).count("\n") + 1)
        parts += [to_cpp(INSTANCE.sub("", launch.source)), tail, "}"]
        # a macro knows no namespace, and would go on into the next kernel
        parts += [f"#undef {name}" for name in dict.fromkeys(_DEFINED.findall(launch.source))]
    return "\n".join([*parts, ""]), places


def _said(launches, places: list[int], line: int, rule: str, what: str) -> str:
    which = bisect_left(places, line) - 1
    at = line - places[which]
    lines = launches[which].source.split("\n")
    quote = lines[at - 1].strip() if 0 < at <= len(lines) else ""
    return f"{launches[which].name}:{at}: {RULES[rule]}: {what}\n  {quote}"


def _plain(text: str) -> str:
    for n, word in ((1, "device"), (2, "constant"), (3, "threadgroup")):
        text = text.replace(f"__attribute__((address_space({n})))", word)
    return text


class _Walker:
    """Walks clang's tree, which writes a file or line only where it changes."""

    def __init__(self, unit: str):
        self.source = unit.split("\n")
        self.file, self.line = "", 0
        self.found: set[tuple[int, str, str]] = set()

    def visit(self, node, function, parent) -> None:
        if not isinstance(node, dict):
            return
        kind = node.get("kind", "")
        loc = self._at(node["loc"]) if node.get("loc") else None
        begin = end = None
        if "range" in node:
            begin = self._at(node["range"].get("begin", {}))
            end = self._at(node["range"].get("end", {}))
        where = loc or begin
        if where and where[0] == "<stdin>" and not node.get("isImplicit"):
            self._declared(node, kind, where, begin)
            self._cast(kind, where, begin, end)
            self._types(node, kind, where, parent)
            self._scopes(node, kind, where, begin, function, parent)
        inner = node if kind in _FUNCTIONS else function
        for child in node.get("inner", []):
            self.visit(child, inner, node)

    def _at(self, loc):
        for part in ("spellingLoc", "expansionLoc"):
            if part in loc:
                self._at(loc[part])
        self.file, self.line = loc.get("file", self.file), loc.get("line", self.line)
        column = loc.get("col", loc.get("expansionLoc", {}).get("col", 0))
        return self.file, self.line, column

    def _text(self, begin, end) -> str:
        """The source from begin to end, with words before it: `thread` is an empty macro here."""
        (l0, c0), (l1, c1) = begin, end
        if not 0 < l0 <= l1 <= len(self.source):
            return ""
        head = self.source[l0 - 1][: c0 - 1]
        c0 -= len(re.search(r"(?:\b(?:thread|const|constexpr|volatile)\s+)*$", head)[0])
        if l0 == l1:
            return self.source[l0 - 1][c0 - 1 : c1 - 1]
        first, last = self.source[l0 - 1][c0 - 1 :], self.source[l1 - 1][: c1 - 1]
        return "\n".join([first, *self.source[l0 : l1 - 1], last])

    def _add(self, where, rule: str, what: str = "") -> None:
        self.found.add((where[1], rule, what))

    def _declared(self, node, kind, where, begin) -> None:
        """Pointers and references say where they point."""
        if not begin:
            return
        text = self._text(begin[1:], where[1:])
        if kind in ("VarDecl", "ParmVarDecl", "FieldDecl"):
            types = node.get("type", {})
            qual = types.get("qualType", "")
            canonical = types.get("desugaredQualType", qual)
            decayed = kind == "ParmVarDecl" and canonical.rstrip().endswith("*")
            written = "*" in text or "&" in text  # members that the compiler adds are not
            points = written and ("*" in qual or "&" in qual)
            if (points or decayed) and not _SPACE.search(f"{text} {qual} {canonical}"):
                self._add(where, "reference" if "&" in qual else "pointer", node.get("name", ""))
        returns = kind in ("FunctionDecl", "CXXMethodDecl") and re.search(r"[*&]\s*$", text)
        if returns and not _SPACE.search(text):
            self._add(where, "pointer" if "*" in text else "reference", "return type")

    def _cast(self, kind, where, begin, end) -> None:
        if kind not in ("CStyleCastExpr", "CXXReinterpretCastExpr", "CXXStaticCastExpr"):
            return
        text = self._text(begin[1:], (end[1], end[2] + 1))
        match = re.match(r"\(([^()]*)\)|\w+_cast<([^>]*)>", text)
        head = (match[1] or match[2]) if match else ""
        if re.search(r"[*&]\s*$", head or "") and not _SPACE.search(head):
            self._add(where, "pointer" if "*" in head else "reference", head)

    def _types(self, node, kind, where, parent) -> None:
        """No double; nothing becomes a bfloat unasked."""
        types = node.get("type", {})
        canonical = types.get("desugaredQualType", types.get("qualType", ""))
        literal = (parent or {}).get("kind") == "UserDefinedLiteral" or kind == "DeclRefExpr"
        if re.search(r"\bdouble\b", canonical) and not literal:
            self._add(where, "double")
        if canonical != "__bf16":
            return
        floating = node.get("castKind") in ("FloatingCast", "IntegralToFloating")
        if kind == "ImplicitCastExpr" and not node.get("isPartOfExplicitCast") and floating:
            self._add(where, "bfloat", "write static_cast<bfloat16_t>(...)")
        computed = node.get("computeResultType", {}).get("qualType")
        if kind == "CompoundAssignOperator" and computed != "__bf16":
            self._add(where, "bfloat", "a compound assignment computes in float")

    def _scopes(self, node, kind, where, begin, function, parent) -> None:
        """Statics, globals, and words that the language has not."""
        if kind == "VarDecl" and begin:
            types = node.get("type", {})
            words = self._text(begin[1:], where[1:]) + " " + str(types)
            constant = _CONSTANT.search(words)
            static = node.get("storageClass") == "static" and not _THREADGROUP.search(words)
            if function and static and not constant:
                self._add(where, "static", node.get("name", ""))
            outside = ("TranslationUnitDecl", "NamespaceDecl", "VarTemplateDecl")
            if not function and (parent or {}).get("kind") in outside and not constant:
                self._add(where, "global", node.get("name", ""))
        if kind == "LambdaExpr":
            self._add(where, "lambda")
        if kind in _BANNED:
            self._add(where, "keyword", _BANNED[kind])
        if kind == "CXXMethodDecl" and node.get("virtual"):
            self._add(where, "keyword", "virtual")
