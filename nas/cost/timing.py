"""Timing of modules on this machine, and the cache of all samples.

Torch is imported when something is timed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compofa.errors import CompofaError, ConfigError, TableError
from compofa.io.atomic import write_text_atomic
from compofa.io.locks import exclusive
from compofa.io.untrusted import parse_json, read_text

if TYPE_CHECKING:
    import torch

_LOG = logging.getLogger(__name__)


RUNTIMES = ("torch", "onnxruntime")
"""What can run networks on this machine: torch in eager mode, ONNX Runtime as exported."""


@dataclass(frozen=True)
class Settings:
    """How to time.

    Attributes:
        device: Name of the device (:mod:`nas.cost.devices`), part of the cache's key.
        torch_device: Where torch runs the modules.
        batch: Images per batch.
        rounds: Passes over all layers; a layer's latency is the mean of its two best samples.
        visit_ms: Time per layer and round, at least five runs; the best one is the sample.
        networks: Random subnets timed end to end to fit the line, and as many again to check it; in
            ONNX Runtime the subnets that the model is fitted to.
        seed: Seed of those subnets.
        runtime: What runs them, one of :data:`RUNTIMES`.
    """

    device: str = "cpu"
    torch_device: str = "cpu"
    batch: int = 1
    rounds: int = 5
    visit_ms: float = 5.0
    networks: int = 10
    seed: int = 0
    runtime: str = "torch"

    def __post_init__(self) -> None:
        if self.batch < 1 or self.rounds < 1 or self.visit_ms <= 0 or self.networks < 3:
            raise ConfigError(
                "expected a batch of at least 1, 1 round, a visit above 0 ms and 3 networks, got "
                f"{self.batch}, {self.rounds}, {self.visit_ms:g} and {self.networks}"
            )


def machine(settings: Settings) -> dict[str, Any]:
    """Return what a latency depends on besides the layer: the key of the cache.

    Raises:
        ConfigError: This machine has no such device.
    """
    import torch

    kind = torch.device(settings.torch_device).type
    versions = {"torch": torch.__version__}
    if settings.runtime == "onnxruntime":
        versions = {"onnxruntime": metadata.version("onnxruntime")}
    if kind != "cpu" and not torch.get_device_module(kind).is_available():
        raise ConfigError(f"expected a {kind.upper()} device for {settings.device}, got none")
    return {
        "device": settings.device,
        "processor": torch.cuda.get_device_name() if kind == "cuda" else _cpu_name(),
        **versions,
        "threads": torch.get_num_threads(),
        "batch": settings.batch,
    }


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def cache_folder() -> Path:
    """Return the folder of timings: ``$XDG_CACHE_HOME/compofa``, or ``~/.cache/compofa``.

    Raises:
        ConfigError: There is neither.
    """
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(root) if root else Path.home() / ".cache") / "compofa"
    except RuntimeError:
        raise ConfigError(
            "expected a home folder for the cache of timings, got none: set HOME or XDG_CACHE_HOME"
        ) from None


class Samples:
    """Timings of one machine: an append-only file of JSON lines ``{"key": ..., "ms": ...}``.

    Where they cannot be written, as on a full disk, a warning is logged and they stay in memory.

    Args:
        folder: Folder of the caches, one file per machine and batch size.
        identity: What :func:`machine` returned.

    Raises:
        TableError: The file holds something else.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, Any]) -> None:
        text = json.dumps(identity, sort_keys=True)
        self.path = _samples_path(folder, identity)
        self.values: dict[str, list[float]] = {}
        self._writable = True
        lines = []
        if os.path.isfile(self.path):
            try:
                lines = read_text(self.path).splitlines(True)
            except (OSError, ValueError) as error:
                raise TableError(f"{self.path}: expected timings, got: {error}") from None
            if lines and not lines[-1].endswith("\n"):
                _LOG.warning("%s: the last line was cut off and is dropped", self.path)
                lines.pop()
                self._rewrite(lines)
        if not lines:
            lines = [text + "\n"]
            self._rewrite(lines)
        for number, line in enumerate(lines, 1):
            try:
                data = parse_json(line)
                if number == 1:
                    if data != dict(identity):
                        raise ValueError("of another machine")
                    continue
                key, ms = data["key"], float(data["ms"])
                if not (isinstance(key, str) and 0 < ms < float("inf")):
                    raise ValueError(line.strip()[:80])
            except (ValueError, KeyError, TypeError) as error:
                raise TableError(
                    f"{self.path}, line {number}: expected a timing, got: {error}"
                ) from None
            self.values.setdefault(key, []).append(ms)

    @classmethod
    @contextmanager
    def alone(cls, folder: str | Path, identity: Mapping[str, Any]) -> Iterator[Samples]:
        """Lock the file, waiting for a process that holds it, and read what it has measured."""
        with ExitStack() as stack:
            with suppress(CompofaError):  # nothing to lock where nothing can be written
                stack.enter_context(exclusive(_samples_path(folder, identity), wait=True))
            yield cls(folder, identity)

    def add(self, key: str, ms: float) -> None:
        """Append a sample to the file."""
        self.values.setdefault(key, []).append(ms)
        if not self._writable:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "ms": round(ms, 6)}) + "\n")
        except OSError as error:
            self._stop_writing(f"cannot write {self.path}: {error.strerror or error}")

    def _rewrite(self, lines: Sequence[str]) -> None:
        try:
            write_text_atomic(self.path, "".join(lines))
        except CompofaError as error:
            self._stop_writing(str(error))

    def _stop_writing(self, reason: str) -> None:
        """Write nothing more, since a half line may be at the end of the file."""
        self._writable = False
        _LOG.warning("further timings are not kept for later runs: %s", reason)

    def count(self, key: str) -> int:
        """Return the number of samples of ``key``."""
        return len(self.values.get(key, ()))

    def latency_ms(self, key: str) -> float:
        """Return the mean of the two best samples of ``key``, ms.

        Other programs can only make a run slower, so the best samples are the layer's own; the
        second guards against an error of the timer.
        """
        return float(np.mean(sorted(self.values[key])[:2]))


def _samples_path(folder: str | Path, identity: Mapping[str, Any]) -> Path:
    text = json.dumps(identity, sort_keys=True)
    digest = hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
    return Path(folder) / f"latency-{identity['device']}-{digest}.jsonl"


class Stopwatch:
    """Times modules on the device of the settings."""

    def __init__(self, settings: Settings) -> None:
        import torch

        self._torch = torch
        self.settings = settings
        self.device = torch.device(settings.torch_device)
        self._synchronize = (
            torch.get_device_module(self.device.type).synchronize
            if self.device.type != "cpu"
            else lambda: None
        )

    def run(
        self, module: torch.nn.Module, shape: Sequence[int], visit_ms: float | None = None
    ) -> float:
        """Return the least time of a call of ``module`` on images of ``shape``, ms."""
        visit_ms = visit_ms or self.settings.visit_ms
        torch = self._torch
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(tuple(shape), generator=generator).to(self.device)
        if images.dim() == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            self._time(module, images)  # the first call chooses kernels
            once = self._time(module, images)
            runs = int(np.clip(visit_ms / max(once, 1e-3), 5, 100))
            if self.device.type != "cpu":  # back to back, as layers in a network
                return min(self._time(module, images, runs) for _ in range(3))
            return min(self._time(module, images) for _ in range(runs))

    def _time(self, module: torch.nn.Module, images: torch.Tensor, runs: int = 1) -> float:
        self._synchronize()
        start = time.perf_counter()
        for _ in range(runs):
            module(images)
        self._synchronize()
        return (time.perf_counter() - start) * 1e3 / runs

    def ready(self, build: Callable[[], torch.nn.Module]) -> torch.nn.Module:
        """Build a module for timing, leaving torch's global generator unchanged."""
        torch = self._torch
        with torch.random.fork_rng(devices=[]):
            module = build()
        return module.eval().to(self.device, memory_format=torch.channels_last)
