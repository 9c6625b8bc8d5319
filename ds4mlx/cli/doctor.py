"""`ds4mlx doctor`: what this machine and this installation are, for a person who looks for a fault.

It works where MLX does not, and says why it does not.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from pkgutil import iter_modules
from typing import Annotated, Any

import typer

from ds4mlx import __version__
from ds4mlx.cli import arguments as arg
from ds4mlx.engine.machine import host_memory, memory, mlx_fault

PACKAGES = (
    *("mlx", "mlx-metal", "mlx-cpu", "mlx-cuda-12", "mlx-cuda-13", "mlx-lm", "numpy", "tokenizers"),
    *("huggingface_hub", "pydantic", "gguf", "typer", "prompt_toolkit", "xxhash"),
)
VARIABLES = (
    *("CUDA_VISIBLE_DEVICES", "GLIBC_TUNABLES", "HF_HOME", "HF_HUB_OFFLINE", "LD_PRELOAD"),
    *("NO_COLOR", "TERM", "XDG_CACHE_HOME", "XDG_STATE_HOME"),
)
PREFIXES = ("DS4MLX_", "MLX_")
SECRET = ("KEY", "TOKEN", "SECRET")
KERNEL_ROOMS = ("products", "layer")

Facts = dict[str, Any]


def doctor(
    as_json: arg.Json = False,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="Compare every kernel with plain operations now, whatever is known."
        ),
    ] = False,
) -> None:
    """Say what this machine is, what is installed, and which kernels are used here and why.

    \b
    ds4mlx doctor
    ds4mlx doctor --compare --json

    Please put its output into a report of a fault, of a kernel that is not used on your machine too. It
    holds no keys and nothing that you wrote.
    """
    if compare:
        _compare()
    facts = examine()
    print(json.dumps(facts, indent=1) if as_json else text(facts))


def examine() -> Facts:
    """All facts by topic, ready for JSON; a topic that cannot be looked at has a `fault` instead."""
    fault = mlx_fault()
    needs_mlx: dict[str, Callable[[], Facts]] = {"mlx": _mlx, "kernels": _kernels, "model": _model}
    topics: dict[str, Callable[[], Facts]] = {
        "ds4mlx": lambda: {"version": __version__, "path": str(Path(__file__).parents[1])},
        "python": lambda: {"version": platform.python_version(), "path": sys.executable},
        "machine": _machine,
        "memory": lambda: _memory(fault is None),
        **needs_mlx,
        "packages": lambda: {name: installed(name) for name in PACKAGES if installed(name)},
        "environment": _environment,
    }
    return {
        name: {"fault": fault} if fault and name in needs_mlx else _looked_at(look)
        for name, look in topics.items()
    }


def _looked_at(look: Callable[[], Facts]) -> Facts:
    try:
        return look()
    except Exception as error:  # noqa: BLE001 - one broken part must not hide the others
        return {"fault": f"{type(error).__name__}: {' '.join(str(error).split())}"}


def installed(package: str) -> str | None:
    """The version of a package, if it is installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _machine() -> Facts:
    system = platform.mac_ver()[0] and f"macOS {platform.mac_ver()[0]}"
    return {
        "system": system or f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "processor": processor(),
        "cores": os.cpu_count(),
    }


def processor() -> str:
    """The processor's own name, as far as the system tells it."""
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _memory(with_mlx: bool) -> Facts:
    host = host_memory()
    facts = {"total_bytes": host.total, "available_bytes": host.available}
    device = memory() if with_mlx else host
    if device.total != host.total:
        facts |= {"device_total_bytes": device.total, "device_available_bytes": device.available}
    return facts


def _mlx() -> Facts:
    import mlx.core as mx

    on_gpu = mx.default_device() == mx.gpu
    name = mx.device_info().get("device_name", "unknown")
    facts = {
        "version": version("mlx"),
        "computes_on": "GPU" if on_gpu else "CPU",
        "device": str(name),
        "metal": mx.metal.is_available(),
        "cuda": mx.cuda.is_available(),
    }
    maps = Path("/proc/self/maps")
    return {**facts, "allocator": allocator(maps.read_text())} if facts["cuda"] else facts


def allocator(maps: str) -> str:
    """What gives a process its memory, by the files it has mapped: it decides how fast MLX feeds CUDA."""
    for name in ("tcmalloc", "jemalloc", "mimalloc"):
        if f"/lib{name}" in maps:
            return name
    return "the C library's; decoding is faster with LD_PRELOAD=libtcmalloc_minimal.so.4"


def _compare() -> None:
    """Compare all kernels here, at both types of activations. Raises DataError without a GPU."""
    from ds4mlx.custom_kernels import comparisons, dialect, self_check
    from ds4mlx.errors import DataError

    target = dialect.target()
    if target is None:
        raise DataError("kernels run on a GPU, and MLX has none here")
    every = comparisons.comparisons(target)
    self_check.forget()
    self_check.check(target, [(name, c.case.dtype) for c in every for name in c.kernels])


def _kernels() -> Facts:
    from ds4mlx.custom_kernels import dialect, dispatch, verdicts

    used, target = dispatch.in_use(), dialect.target()
    reason = _why(dispatch.decided(), target)
    listed = [{"name": name, "what": what, "used": used, "why": reason} for name, what in _names()]
    facts: Facts = {"used": used, "why": reason, "target": target, "kernels": listed}
    if target is not None:
        known = verdicts.here()
        facts["verdicts in"] = str(known.path)
        facts["verdicts"] = [
            {"kernel": name, "good": verdict.good, "why": verdict.why}
            for name, verdict in sorted(known.known.items())
        ]
    return facts


def _why(decided: bool | None, target: str | None) -> str:
    if target is None:
        return "MLX computes on the CPU here, for which there are no kernels"
    if decided is not None:
        return f"$DS4MLX_KERNELS is {os.environ.get('DS4MLX_KERNELS')}"
    return (
        "a kernel is used if it was as good as plain operations on this machine; see the verdicts"
    )


def _names() -> list[tuple[str, str]]:
    """(name, what it does) of every kernel."""
    names = []
    for room in KERNEL_ROOMS:
        package = import_module(f"ds4mlx.custom_kernels.{room}")
        for info in iter_modules(package.__path__):
            module = import_module(f"{package.__name__}.{info.name}")
            if hasattr(module, "Kernel"):
                names.append((info.name, (module.__doc__ or "").strip().splitlines()[0]))
    return sorted(names)


def _model() -> Facts:
    from ds4mlx.engine.default_model import embedded_directory

    named = os.environ.get("DS4MLX_MODEL")
    path = Path(named) if named else embedded_directory()
    kind = "named by $DS4MLX_MODEL" if named else "the embedded one"
    return {"default": kind, "path": str(path), "exists": path.exists()}


def _environment() -> Facts:
    """The variables that change what this program does; of a secret only that it is set."""
    names = [name for name in os.environ if name in VARIABLES or name.startswith(PREFIXES)]
    hidden = {name for name in names if any(word in name for word in SECRET)}
    return {name: "(set)" if name in hidden else os.environ[name] for name in sorted(names)}


def text(facts: Facts) -> str:
    """For people: a line a fact, in a block a topic."""
    lines = []
    for topic, known in facts.items():
        lines.append(topic)
        for name, value in known.items():
            if name == "kernels":
                lines += [f"  {each['name']:<22} {each['what']}" for each in value]
            elif name == "verdicts":
                lines += _verdict_lines(value)
            else:
                lines.append(f"  {name.removesuffix('_bytes'):<22} {_shown(name, value)}")
    return "\n".join(lines)


def _verdict_lines(verdicts: list[Facts]) -> list[str]:
    """How many kernels are good here, and each that is not."""
    good = sum(each["good"] for each in verdicts)
    none = "none compared yet: the first model loaded here does it, or --compare"
    lines = [f"  {'verdicts':<22} {f'{good} of {len(verdicts)} are good' if verdicts else none}"]
    return lines + [
        f"  {each['kernel']:<22} {each['why']}" for each in verdicts if not each["good"]
    ]


def _shown(name: str, value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return (
        f"{value / 1e9:.1f} GB"
        if name.endswith("_bytes") and isinstance(value, int)
        else str(value)
    )
