"""Latency of this machine: what is timed, what is kept, and what happens in between."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from compofa.errors import ConfigError, TableError
from compofa.networks.backbones import MOBILENET_V3_SMALL_IMAGES
from nas.cost.devices import load_cost
from nas.cost.lookup import TableCost
from nas.cost.measured import measure, space_layers
from nas.cost.timing import Samples, Settings, Stopwatch, machine

TINY = MOBILENET_V3_SMALL_IMAGES.scaled(0.25)
SPACE = TINY.compound_space(resolutions=(16, 24))
QUICK = Settings(rounds=1, visit_ms=0.01, networks=3)


def parameters(module):
    return sum(weight.numel() for weight in module.parameters()) / 1e4 + 0.01


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file become larger than ``size`` bytes, as on a disk that fills up."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def fake_times(monkeypatch):
    """Make a layer take its parameters' time, and a network twice its layers' and 3 ms."""
    calls = []

    def run(self, module, shape, visit_ms=None):
        calls.append(shape)
        assert not module.training
        with torch.inference_mode():
            module(torch.zeros(tuple(shape)))
        if not hasattr(module, "specs"):
            return parameters(module)
        return 3 + 2 * sum(parameters(module.get_submodule(spec.name)) for spec in module.specs)

    monkeypatch.setattr(Stopwatch, "run", run)
    return calls


def test_every_layer_of_the_space_is_listed_once():
    layers = space_layers(TINY, SPACE, 10)
    assert set(layers) == {16, 24}
    for group in layers.values():
        assert len(set(group)) == len(group) == 6 + 3 * 5 * 2


def test_sums_follow_end_to_end_latency(tmp_path, fake_times):
    cost = measure(TINY, SPACE, 10, QUICK, tmp_path, progress=False)
    assert cost.line == pytest.approx((3, 2))
    assert "0.0 % " in cost.error and "3 random subnets" in cost.error
    arrays = SPACE.arrays(SPACE.enumerate_genes())
    assert np.isfinite(cost(arrays)).all()
    cost.export(tmp_path / "tables", SPACE)
    assert TableCost(tmp_path / "tables", TINY, 10)(arrays) == pytest.approx(cost(arrays))


def test_a_line_that_falls_below_zero_is_not_taken(tmp_path, fake_times):
    cost = measure(TINY, SPACE, 10, QUICK, tmp_path, progress=False)
    arrays = SPACE.arrays(SPACE.enumerate_genes())
    cost.line = (0.0, 1.0)
    sums = cost(arrays)
    cost.fit_line(arrays, 2 * sums - 0.5 * sums.min())
    assert cost.line == pytest.approx((-0.5 * sums.min(), 2))
    cost.fit_line(arrays, 2 * sums - 1.5 * sums.min())
    assert cost.line[0] == 0 < cost.line[1], "half of the least would take less than no time"


def test_nothing_is_timed_twice(tmp_path, fake_times):
    first = measure(TINY, SPACE, 10, QUICK, tmp_path, progress=False)
    count = len(fake_times)
    again = measure(TINY, SPACE, 10, QUICK, tmp_path, progress=False)
    assert len(fake_times) == count
    assert again.line == pytest.approx(first.line, rel=1e-3)
    more = SPACE.restrict(resolutions=(16, 24, 32))
    measure(TINY, more, 10, QUICK, tmp_path, progress=False)
    keys = [key for key in Samples(tmp_path, machine(QUICK)).values if "input:" in key]
    assert len(keys) == 36 * 3 - 4  # mix and classifier do not depend on the resolution


def test_an_interrupted_run_continues(tmp_path, fake_times, monkeypatch):
    whole = Stopwatch.run

    def stops(self, module, shape, visit_ms=None):
        if len(fake_times) == 20:
            raise KeyboardInterrupt
        return whole(self, module, shape, visit_ms)

    with monkeypatch.context() as patch:
        patch.setattr(Stopwatch, "run", stops)
        with pytest.raises(KeyboardInterrupt):
            measure(TINY, SPACE, 10, QUICK, tmp_path, progress=False)
    (path,) = tmp_path.iterdir()
    with path.open("a") as file:
        file.write('{"key": "Conv-inp')  # a line that the interruption cut off
    cost = measure(TINY, SPACE, 10, QUICK, tmp_path, progress=False)
    layers = len({layer for group in space_layers(TINY, SPACE, 10).values() for layer in group})
    assert len(fake_times) <= layers + 6
    assert cost.line == pytest.approx((3, 2))


def test_batches_and_threads_have_their_own_file(tmp_path):
    one, two = (machine(Settings(batch=batch)) for batch in (1, 2))
    assert one["batch"] == 1
    assert one["torch"] == torch.__version__
    assert Samples(tmp_path, one).path != Samples(tmp_path, two).path
    assert Samples(tmp_path, {**one, "threads": 99}).path != Samples(tmp_path, one).path


@pytest.mark.parametrize("line", ["[]", '{"key": "a"}', '{"key": "a", "ms": -1}', "x"])
def test_a_broken_cache_is_named(tmp_path, line):
    samples = Samples(tmp_path, {"device": "cpu"})
    samples.add("a", 1.5)
    with samples.path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(TableError, match="line 3: "):
        Samples(tmp_path, {"device": "cpu"})


@pytest.mark.parametrize("room", [0, 150, 500])
def test_a_full_disk_under_the_cache_does_not_end_a_measurement(tmp_path, fake_times, caplog, room):
    whole = measure(TINY, SPACE, 10, QUICK, tmp_path / "whole", progress=False)
    with largest_file(room):
        cost = measure(TINY, SPACE, 10, QUICK, tmp_path / "full", progress=False)
    assert len(caplog.records) == 1 and str(tmp_path) in caplog.messages[0]
    assert cost.line == pytest.approx(whole.line)
    caplog.clear()
    again = measure(TINY, SPACE, 10, QUICK, tmp_path / "full", progress=False)
    assert again.line == pytest.approx(whole.line)
    (path,) = (tmp_path / "full").iterdir()
    lines = (tmp_path / "whole" / path.name).read_text().splitlines()
    assert sorted(path.read_text().splitlines()) == sorted(lines)


def test_a_cache_that_cannot_be_made_does_not_end_a_measurement(tmp_path, fake_times, caplog):
    (tmp_path / "file").write_text("")
    assert measure(TINY, SPACE, 10, QUICK, tmp_path / "file", progress=False).line[1] > 0
    assert str(tmp_path) in caplog.messages[0] and len(caplog.records) == 1


def test_real_timing_leaves_the_generator_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    space = SPACE.restrict(resolutions=(16,), depths=(2,))
    small = space.restrict(kernels=(3, 5))
    cost = load_cost("cpu", TINY, 10, space=small, cache=tmp_path, progress=False)
    assert torch.equal(torch.rand(3), expected)
    assert (cost(small.arrays(small.enumerate_genes())) > 0).all()
    (path,) = tmp_path.iterdir()
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_layers_that_were_not_measured_are_named(tmp_path, fake_times):
    cost = measure(TINY, SPACE, 10, QUICK, tmp_path, progress=False)
    with pytest.raises(TableError, match="input:48x48x3"):
        cost(SPACE.restrict(resolutions=(48,)).arrays(SPACE.enumerate_genes()[:1]))


@pytest.mark.parametrize("bad", [{"device": "tpu"}, {"batch": -1}, {"rounds": 0}, {"networks": 1}])
def test_settings_are_checked(bad):
    with pytest.raises(ConfigError, match="expected"):
        Settings(**bad)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a GPU")
def test_a_missing_gpu_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="CUDA"):
        measure(TINY, SPACE, 10, Settings("gpu"), tmp_path)
