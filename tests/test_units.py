"""Amounts with units and prefixes, and what the name of a column says."""

import pytest

from compofa.errors import ConfigError, did_you_mean, unknown_name
from nas.cost.units import Amount, column_quantity


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [
        ("20", "ms", 20.0),
        ("20ms", "ms", 20.0),
        ("0.02 s", "ms", 20.0),
        ("20000us", "ms", 20.0),
        ("20000µs", "ms", 20.0),
        ("5M", "parameters", 5e6),
        ("300MMACs", "MACs", 3e8),
        ("3e8", "MACs", 3e8),
        ("0.3G", "MACs", 3e8),
        ("2MB", "bytes", 2e6),
        ("2M", "bytes", 2e6),
        ("2MiB", "bytes", 2 * 1024**2),
        ("256KiB", "bytes", 256 * 1024),
        ("1.5J", "mJ", 1500.0),
        ("2", "widgets", 2.0),
        ("2kwidgets", "widgets", 2000.0),
        ("-1", "ms", -1.0),
    ],
)
def test_amounts_are_converted(text, unit, value):
    assert Amount.parse(text).to(unit) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "unit"),
    [("5M", "ms"), ("5m", "parameters"), ("2mb", "bytes"), ("3mJ", "ms"), ("1e", "ms")],
)
def test_units_of_something_else_are_refused(text, unit):
    with pytest.raises(ConfigError, match=unit):
        Amount.parse(text).to(unit)


@pytest.mark.parametrize("text", ["", "x", "MB", "2 M B", "nan", "inf", "2,5"])
def test_what_is_no_amount(text):
    with pytest.raises(ConfigError, match="number"):
        Amount.parse(text)


@pytest.mark.parametrize(
    ("column", "found"),
    [
        ("latency_ms", ("latency", "ms")),
        ("energy_mj", ("energy", "mJ")),
        ("peak_power_W", ("peak_power", "W")),
        ("ms", ("latency", "ms")),
        ("v100", ("latency", "ms")),
        ("mean_latency", ("latency", "ms")),
    ],
)
def test_columns_say_what_they_hold(column, found):
    assert column_quantity(column) == found


def test_likely_names_are_suggested_whatever_their_case():
    known = ["pixel1", "LG-G8", "v100"]
    assert "pixel1" in did_you_mean("pixle1", known) and "LG-G8" in did_you_mean("lg-g9", known)
    assert did_you_mean("nothing", known) == ""
    message = unknown_name("device", "v10", known)
    assert "did you mean v100?" in message and "pixel1, LG-G8, v100" in message
