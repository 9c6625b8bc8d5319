"""Writes what the documentation takes from the code: `python docs/generate.py`.

Help texts become docs/commands.md, docstrings docs/api.md and docs/tree.md, and the rooms' first
sentences the tree in README.md. A test compares all of them with the code.
"""

import ast
import importlib
import inspect
import os
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOTE = "<!-- Written by docs/generate.py: change the code's own text, then run it again. -->"
PUBLIC = ("ds4mlx", "ds4mlx.chat", "ds4mlx.convert", "ds4mlx.research")
ROOMS = {"ds4mlx": "the package", "convert": "", "custom_kernels": ""}
BESIDE = {
    "tests/": "the suite; faults/ seeds mistakes, metalsim/ runs Metal text on a CPU",
    "oracle/": "checkpoints to test with, and a NumPy model of the same definition",
    "benchmarks/": "scripts that measure, and the numbers they gave, with the device",
    "notebooks/": "to read in order, with their plots",
    "train/": "makes the embedded model (PyTorch, one NVIDIA GPU)",
    "docs/": "one short page a task",
}


def outputs() -> dict[Path, str]:
    """The text of every generated file, by its path."""
    readme = ROOT / "README.md"
    return {
        ROOT / "docs/commands.md": commands(),
        ROOT / "docs/api.md": api(),
        ROOT / "docs/tree.md": tree(),
        readme: between(readme.read_text(), "tree", f"```\n{rooms()}\n```"),
    }


def between(text: str, name: str, content: str) -> str:
    """A text with what stands between its two comments of a name replaced."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    return re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{content}\n{end}", text, flags=re.DOTALL)


def commands() -> str:
    """Every command's help text, in the order of `ds4mlx --help`."""
    os.environ.update(COLUMNS="100", NO_COLOR="1", TERM="dumb")
    from typer.main import get_command

    from ds4mlx.cli.main import app

    pages = [
        NOTE,
        "# Commands",
        "What `--help` says. Results go to standard output, progress and notes to standard error. The exit "
        "code is 0 when a command is done, 1 when the data, the model or the machine is at fault, 2 "
        "when it was called wrongly, and 130 when it was interrupted.",
    ]
    for names, command in walk(get_command(app), ("ds4mlx",)):
        context = command.make_context(names[-1], [], resilient_parsing=True)
        context.info_name = " ".join(names)
        context.terminal_width = context.max_content_width = 100
        text = command.get_help(context).replace(str(Path.home()), "~").strip()
        pages.append(
            f"{'##' if len(names) < 3 else '###'} {' '.join(names)}\n\n```text\n{text}\n```"
        )
    return "\n\n".join(pages) + "\n"


def walk(command, names: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], object]]:
    """A command and all those below it, by their full names."""
    yield names, command
    for name, below in getattr(command, "commands", {}).items():
        if not below.hidden:
            yield from walk(below, (*names, name))


def api() -> str:
    """Signatures and docstrings of the public names."""
    pages = [NOTE, "# Python", "The public names. Everything else may change without notice."]
    for module_name in PUBLIC:
        module = importlib.import_module(module_name)
        pages.append(f"## {module_name}\n\n{prose(inspect.getdoc(module))}")
        for name in sorted(module.__all__, key=str.lower):
            pages.extend(entry(name, getattr(module, name)))
    return "\n\n".join(pages) + "\n"


def entry(name: str, thing: object) -> Iterator[str]:
    """One public name: a class with its public methods, a function, or a value."""
    text = prose(inspect.getdoc(thing))
    if inspect.isclass(thing):
        yield f"### class {name}\n\n{text}"
        for method in (each for own in parts(thing) for each in definition(own).body):
            if isinstance(method, ast.FunctionDef) and listed(method):
                title = signature(method, f"{name}.")
                yield f"#### `{title}`\n\n{prose(ast.get_docstring(method))}"
    elif inspect.isfunction(inspect.unwrap(thing)):
        yield f"### `{signature(definition(thing))}`\n\n{text}"
    else:
        yield f"### {name}\n\n{text}"


def parts(thing: type) -> list[type]:
    """A class and those that it is put together from, without the base of all modules."""
    ours = [each for each in thing.__mro__ if each.__module__.startswith("ds4mlx.")]
    return [each for each in ours if each.__name__ != "Module"]


def listed(method: ast.FunctionDef) -> bool:
    """Whether a method is for users: documented, and not private."""
    public = not method.name.startswith("_") or method.name in ("__init__", "__call__")
    return public and ast.get_docstring(method) is not None


def definition(thing) -> ast.FunctionDef | ast.ClassDef:
    """The syntax tree of a class or a function, so that annotations stand as they were written."""
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(thing)))
    node = ast.parse(source).body[0]
    assert isinstance(node, ast.FunctionDef | ast.ClassDef), source
    return node


def signature(node: ast.FunctionDef | ast.ClassDef, owner: str = "") -> str:
    """`name(arguments) -> result`; of a method after its class, of a property without brackets."""
    assert isinstance(node, ast.FunctionDef), node.name
    arguments = node.args
    if owner and arguments.args and arguments.args[0].arg in ("self", "cls"):
        arguments.args.pop(0)
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    if any(ast.unparse(d).endswith("property") for d in node.decorator_list):
        return f"{owner}{node.name}{result}"
    name = owner.rstrip(".") if node.name == "__init__" else owner + node.name
    return f"{name}({ast.unparse(arguments)}){'' if node.name == '__init__' else result}"


def prose(text: str | None) -> str:
    """A docstring as Markdown: what is indented, or looks like code, becomes a block of code."""
    blocks = re.split(r"\n\s*\n", (text or "").strip())
    return "\n\n".join(fenced(block) if is_code(block) else block for block in blocks if block)


def is_code(block: str) -> bool:
    return block.startswith("    ") or bool(re.match(r"(from|import) \S+|[\w, ]+ = ", block))


def fenced(block: str) -> str:
    return f"```\n{textwrap.dedent(block)}\n```"


def first_sentence(path: Path) -> str:
    """The first sentence of a module's docstring, on one line, without its full stop."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    sentence = re.split(r"(?<=\.)\s", " ".join(text.split("\n\n")[0].split()), maxsplit=1)[0]
    return sentence.rstrip(".:")


def tree() -> str:
    """Every file of the package with what it owns."""
    pages = [NOTE, "# Every file", "The first sentence of each file's docstring, room by room."]
    for top in ROOMS:
        for folder in folders(ROOT / top):
            name = folder.relative_to(ROOT)
            lines = [
                f"- `{path.name}`: {first_sentence(path)}"
                for path in sorted(folder.glob("*.py"))
                if path.name != "__init__.py" and first_sentence(path)
            ]
            head = first_sentence(folder / "__init__.py")
            pages.append(f"## {name}/\n\n{head}.\n\n" + "\n".join(lines))
    return "\n\n".join(pages) + "\n"


def folders(top: Path) -> Iterator[Path]:
    """A folder and the packages below it, links left out."""
    yield top
    for below in sorted(top.iterdir()):
        if (below / "__init__.py").is_file() and not below.is_symlink():
            yield from folders(below)


def rooms() -> str:
    """The rooms of the package, one a line, with the first sentence of each."""
    lines = ["ds4mlx/"]
    for folder in folders(ROOT / "ds4mlx"):
        if folder.name != "ds4mlx":
            name = folder.relative_to(ROOT / "ds4mlx")
            lines.append(line(f"    {name}/", first_sentence(folder / "__init__.py")))
    for name in ("convert/", "custom_kernels/"):
        lines.append(line(name, first_sentence(ROOT / name / "__init__.py")))
    lines += [line(name, text) for name, text in BESIDE.items()]
    return "\n".join(lines)


def line(name: str, text: str) -> str:
    return f"{name:<20}{text}"


if __name__ == "__main__":
    for file, content in outputs().items():
        if not file.exists() or file.read_text() != content:
            file.write_text(content)
            print(file.relative_to(ROOT))
