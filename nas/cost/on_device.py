"""Measure the latency of ONNX files on this device and write it to the table beside them.

Needs Python 3.8 or newer and onnxruntime (which brings NumPy), and nothing else:

  python measure.py
  python measure.py --threads 4 --repeats 100

What the table has already is kept, so an interrupted run continues.
"""

# `nas sample` copies this file to its output folder as measure.py: it imports nothing of the
# project, and runs on older versions of Python than the project does.

from __future__ import annotations

import argparse
import csv
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

FILE, LATENCY = "file", "latency_ms"
SAMPLES, SETUP = "samples_ms", "measured_with"
"""Columns of the table: the ONNX file; the latency of a batch; the medians of the rounds that it
comes from, separated by spaces; how they were measured."""


STATISTICS = {"median": 0.5, "min": 0.0}
"""What is kept of a file's runs, as a quantile."""

STEADY = 0.1
"""Interquartile range of the runs, relative to their median, above which there is a warning."""


class Failure(Exception):
    """An error that the user can mend; its text is one line."""


def open_session(model: Any, threads: int = 0, provider: str = "CPUExecutionProvider") -> Any:
    """Open an ONNX model, a path or its bytes, in ONNX Runtime.

    Args:
        model: The model.
        threads: Threads of one operator; 0 for ONNX Runtime's default, one per core.
        provider: Execution provider.
    """
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, providers=[provider])


def times_ms(session: Any, warmup: int, repeats: int) -> list[float]:
    """Return the time of each of ``repeats`` runs on random images of the model's shape, ms."""
    import numpy

    entry = session.get_inputs()[0]
    images = numpy.random.default_rng(0).random(entry.shape, dtype=numpy.float32)
    found = []
    for index in range(warmup + repeats):
        start = time.perf_counter()
        session.run(None, {entry.name: images})
        if index >= warmup:
            found.append((time.perf_counter() - start) * 1e3)
    return found


def quantile(values: Sequence[float], share: float) -> float:
    """Return a quantile, interpolated: 0 is the least, 0.5 the median."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = min(int(at), len(ordered) - 2) if len(ordered) > 1 else 0
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def read_rows(path: str) -> tuple[list[str], list[dict[str, str]]]:
    """Return the columns and rows of the table."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns, rows = list(reader.fieldnames or ()), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise Failure(f"cannot read {path}: {error}") from None
    missing = [name for name in (FILE, LATENCY, SAMPLES, SETUP) if name not in columns]
    if missing:
        raise Failure(f"{path}: expected a table of `nas sample`, missing {', '.join(missing)}")
    for line, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise Failure(f"{path}, line {line}: expected {len(columns)} fields")
    return columns, rows


def write_rows(path: str, columns: Sequence[str], rows: Sequence[dict[str, str]]) -> None:
    """Replace the table at once: it is never half written."""
    folder = os.path.dirname(os.path.abspath(path))
    handle, draft = tempfile.mkstemp(".draft", ".latency.", folder)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        os.chmod(draft, 0o644)
        os.replace(draft, path)
    except OSError as error:
        os.unlink(draft)
        raise Failure(f"cannot write {path}: {error.strerror or error}") from None


def from_benchmark(args: argparse.Namespace) -> int:
    """Read the table's latencies from what TFLite's benchmark_model printed; returns their number.

    One file per row, named after its ONNX file, with a line such as ``Inference timings in us:
    Init: 6174, First inference: 5033, Warmup (avg): 4563.9, Inference (avg): 4561.5``.
    """
    columns, rows = read_rows(args.csv)
    for line, row in enumerate(rows, 2):
        path = os.path.join(args.from_benchmark, os.path.splitext(row[FILE])[0] + ".txt")
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                found = re.findall(r"Inference \(avg\): ([0-9.]+(?:e[+-]?[0-9]+)?)", file.read())
        except OSError as error:
            raise Failure(f"cannot read {path} of line {line}: {error.strerror}") from None
        if not found:
            raise Failure(f"{path}: expected a line with 'Inference (avg): ' of benchmark_model")
        row[LATENCY] = f"{float(found[-1]) / 1000:.6g}"
        row[SAMPLES], row[SETUP] = row[LATENCY], "TFLite benchmark_model, mean"
    write_rows(args.csv, columns, rows)
    return len(rows)


def measure(args: argparse.Namespace) -> int:
    """Measure what the table lacks; returns the number of its rows."""
    try:
        import numpy
        import onnxruntime
    except ImportError as error:
        raise Failure(f"needs {error.name}: pip install onnxruntime") from None
    known = onnxruntime.get_available_providers()
    if args.provider not in known:
        raise Failure(f"--provider: expected one of {', '.join(known)}, got {args.provider}")
    if min(args.repeats, args.rounds) < 1 or args.warmup < 0 or args.threads < 0:
        raise Failure("expected at least 1 repeat and round, and no negative warm-up or threads")
    threads = f"{args.threads} threads" if args.threads else f"all of {os.cpu_count()} threads"
    setup = f"onnxruntime {onnxruntime.__version__} {args.provider} {threads} {args.statistic}"
    columns, rows = read_rows(args.csv)
    other = sorted({row[SETUP] for row in rows if row[LATENCY].strip()} - {setup})
    if other:
        raise Failure(
            f"{args.csv}: expected rows measured with {setup!r} as this run is, got {other[0]!r}: "
            f"give the same options, or empty the columns {LATENCY} and {SAMPLES}"
        )
    folder, spreads, count = os.path.dirname(os.path.abspath(args.csv)), [], 0
    draws = numpy.random.default_rng(0)
    total = sum(max(args.rounds - len(row[SAMPLES].split()), 0) for row in rows)
    for index in range(args.rounds):
        for place in draws.permutation(len(rows)).tolist():  # a drift affects all files alike
            row = rows[place]
            if len(row[SAMPLES].split()) > index:
                continue
            path = os.path.join(folder, row[FILE])
            if not os.path.isfile(path):
                raise Failure(f"{path}: expected the ONNX file of line {place + 2}, got none")
            try:
                session = open_session(path, args.threads, args.provider)
                times = times_ms(session, args.warmup, args.repeats)
            except Exception as error:  # noqa: BLE001 - its errors have no class in common
                reason = " ".join(str(error).split())[:200]
                raise Failure(f"{path}: ONNX Runtime cannot run it: {reason}") from None
            share = STATISTICS[args.statistic]
            samples = [*row[SAMPLES].split(), f"{quantile(times, share):.6g}"]
            row[LATENCY] = f"{quantile([float(value) for value in samples], share):.6g}"
            row[SAMPLES], row[SETUP] = " ".join(samples), setup
            write_rows(args.csv, columns, rows)
            spreads.append((quantile(times, 0.75) - quantile(times, 0.25)) / quantile(times, 0.5))
            count += 1
            if not args.quiet:
                sys.stdout.write(f"{count}/{total}  {row[FILE]}  {samples[-1]} ms\n")
                sys.stdout.flush()
    if spreads and quantile(spreads, 0.5) > STEADY:
        sys.stderr.write(
            f"measure.py: warning: the runs of a file vary by {100 * quantile(spreads, 0.5):.0f} % "
            "(interquartile range): end other programs, or give --statistic min\n"
        )
    return len(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    beside = os.path.join(os.path.dirname(os.path.abspath(__file__)), "latency.csv")
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--csv", default=beside, help="table (default: latency.csv beside this script)")
    p.add_argument("--threads", type=int, default=0, help="threads; 0 for one per core")
    p.add_argument("--warmup", type=int, default=5, help="runs that are not timed (default: 5)")
    p.add_argument(
        "--repeats", type=int, default=20, help="timed runs per file and round (default: 20)"
    )
    p.add_argument("--rounds", type=int, default=3, help="passes over all files (default: 3)")
    p.add_argument(
        "--provider", default="CPUExecutionProvider", help="ONNX Runtime execution provider"
    )
    p.add_argument(
        "--statistic",
        choices=sorted(STATISTICS),
        default="median",
        help="what to keep of runs and rounds: median (default), or min, which is steadier where "
        "other programs run",
    )
    p.add_argument(
        "--from-benchmark",
        metavar="DIR",
        help="run nothing; read what TFLite's benchmark_model printed, NAME.txt for NAME.onnx",
    )
    p.add_argument("--quiet", action="store_true", help="print no line per file")
    args = p.parse_args(argv)
    try:
        count = from_benchmark(args) if args.from_benchmark else measure(args)
    except Failure as error:
        sys.stderr.write(f"measure.py: error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("measure.py: interrupted; run it again to continue\n")
        return 130
    sys.stdout.write(f"{count} files measured: {args.csv}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
