"""What this machine was seen to make of every kernel, kept in a file of the user's cache directory.

A verdict holds for one chip, system, MLX, ds4mlx and text of the kernels, which the file names. Before
kernels run for the first time they are written down as being tried: where that is still there when
nobody tries them, the process has ended. A process may be ended by somebody else too, so that a kernel
is only blamed for the second one.
"""

import contextlib
import hashlib
import json
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

from ds4mlx import durable, user_files


@dataclass(frozen=True)
class Verdict:
    """Of a kernel with activations of a type: whether it is used, and if not, why, as a clause."""

    good: bool
    why: str = ""


@cache
def about() -> dict[str, str]:
    """What a verdict holds for."""
    from ds4mlx import __version__

    mac = platform.mac_ver()[0]
    info = mx.device_info()
    return {
        "chip": f"{info.get('device_name', 'unknown')} {info.get('architecture', '')}".strip(),
        "system": f"macOS {mac}" if mac else f"{platform.system()} {platform.release()}",
        "mlx": version("mlx"),
        "ds4mlx": __version__,
        "kernels": texts(),
    }


def texts() -> str:
    """A digest of the files that kernels, their wrappers and their comparisons are written in."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@dataclass
class Verdicts:
    """All that is known here, by kernel and type; and the kernels that are being tried.

    asked: of what operations asked about, the kernels that it stands for. ended: kernels that were
    being tried when a process ended.
    """

    path: Path
    known: dict[str, Verdict] = field(default_factory=dict)
    asked: dict[str, list[str]] = field(default_factory=dict)
    trying: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    lasting: bool = True  # whether they can be written

    def read(self) -> None:
        """Take over what is in the file, if it is there, whole, and of this machine and version."""
        try:
            kept = json.loads(self.path.read_text())
            if kept["about"] != about():
                return
            known = {
                name: Verdict(bool(v["good"]), str(v["why"])) for name, v in kept["known"].items()
            }
            asked = {str(name): [str(each) for each in of] for name, of in kept["asked"].items()}
            trying, ended = ([str(name) for name in kept[key]] for key in ("trying", "ended"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return
        self.known |= known
        self.asked |= asked
        self.trying, self.ended = trying, ended

    def write(self, trying: Sequence[str] = ()) -> None:
        """Write all down; `trying` are the kernels that are run next."""
        self.trying = list(trying)
        if not self.lasting:
            return
        known = {name: asdict(verdict) for name, verdict in sorted(self.known.items())}
        whole = {"about": about(), "known": known, "asked": self.asked}
        whole |= {"trying": self.trying, "ended": self.ended}
        text = json.dumps(whole, indent=1)
        try:
            durable.write_whole(self.path, text.encode())
        except OSError as error:
            self._stay(error)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """While this process is the only one that tries kernels; with what others found out before."""
        with contextlib.ExitStack() as stack:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(durable.alone(self.path.with_suffix(".lock"), wait=True))
            except OSError as error:
                self._stay(error)
            self.read()
            self._blame()
            yield

    def _blame(self) -> None:
        """Kernels that were being tried are bad if that has ended a process before."""
        bad = Verdict(False, "the process ended twice while it was compared")
        for name in self.trying:
            if name in self.ended:
                self.known.setdefault(name, bad)
        self.ended = sorted({*self.ended, *self.trying})
        self.trying = []

    def _stay(self, error: OSError) -> None:
        if self.lasting:
            note(f"the verdicts on kernels cannot be kept, and are found again next time: {error}")
        self.lasting = False


def note(text: str) -> None:
    """A line on stderr."""
    print(f"ds4mlx: {text}", file=sys.stderr)


def directory() -> Path:
    """Where verdicts are kept."""
    return user_files.cache_directory() / "kernels"


def place() -> Path:
    """The file of this machine and these versions."""
    digest = hashlib.sha256(json.dumps(about(), sort_keys=True).encode()).hexdigest()[:16]
    return directory() / f"{digest}.json"


def here() -> Verdicts:
    """The verdicts of this machine and these versions, as far as there are any."""
    verdicts = Verdicts(place())
    verdicts.read()
    return verdicts
