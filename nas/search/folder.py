"""The folder of a search: whose results are in it, and emptying it of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from compofa.errors import ConfigError, TableError
from compofa.io.untrusted import parse_json, read_text
from nas.tables import read_csv

RESULTS, FRONTS, OBJECTIVES = "results.csv", "pareto.csv", "objectives.csv"
SPECIALISED = "specialised.csv"
REPORT, PICTURES = "report.html", ("pareto.png", "pareto.svg")
RECORDS, PREDICTOR = "records.jsonl", "predictor.npz"
IDENTITY = ("net", "checkpoint", "device")
"""Keys of a found subnet's file that say which search found it."""


def subnet_file(budget: float) -> str:
    """Return the name of the file of the subnet that was found for a budget."""
    return f"subnet_{budget:.12g}.json"


def listed_subnets(results: Path) -> set[Path]:
    """Return the JSON files that a results.csv lists; none if it cannot be read as one."""
    try:
        header, rows = read_csv(results)[1:]
        budgets = {float(row[header.index("constraint")]) for row in rows}
    except (TableError, ValueError):
        return set()
    return {results.with_name(subnet_file(budget)) for budget in budgets}


def claim_folder(folder: Path, search: Mapping[str, str], overwrite: bool = False) -> None:
    """Check that a folder has no results of another search; with ``overwrite`` empty it instead.

    Measured records, which an interrupted search continues from, are among the results. Results of
    the same network (and checkpoint) and device are left for the search to replace.

    Args:
        folder: The folder; it need not exist.
        search: The search to come: values of :data:`IDENTITY`.
        overwrite: Whether to remove the results of any search.

    Raises:
        ConfigError: It has those of another search.
    """
    if overwrite:
        card = Path(PREDICTOR).with_suffix(".json").name
        names = (RESULTS, FRONTS, OBJECTIVES, SPECIALISED, REPORT, *PICTURES, RECORDS, PREDICTOR)
        for path in (*listed_subnets(folder / RESULTS), *(folder / n for n in (*names, card))):
            path.unlink(missing_ok=True)
        return
    earlier = _identity(folder)
    if any(earlier[key] != search.get(key, "") for key in earlier):
        was, now = (_described(each) for each in (earlier, search))
        raise ConfigError(
            f"{folder} holds the results of another search, {was}: replace them by those of {now} "
            "with --overwrite, or choose another --output"
        )


def _identity(folder: Path) -> dict[str, str]:
    """Return which search the results in a folder are of, as far as they say."""
    found: dict[str, str] = {}
    try:
        header, rows = read_csv(folder / RESULTS)[1:]
        found["net"] = rows[0][header.index("net")]
    except (TableError, ValueError, IndexError):
        return found
    for path in sorted(listed_subnets(folder / RESULTS)):
        try:
            data = parse_json(read_text(path))
        except (OSError, ValueError):
            continue
        if isinstance(data, Mapping) and "device" in data:  # earlier versions wrote none
            found.update({key: str(data.get(key, "")) for key in IDENTITY})
            break
    return found


def _described(search: Mapping[str, str]) -> str:
    checkpoint = search.get("checkpoint", "")
    net = f"{search['net']} (checkpoint {checkpoint})" if checkpoint else search["net"]
    return f"{net} on {search['device']}" if search.get("device") else net
