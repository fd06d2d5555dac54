"""What a search may claim: measured winners, fronts that are not shown, small validation sets."""

from dataclasses import replace

import numpy as np
import pytest

from compofa.io.records import EvalRecord
from compofa.networks.zoo import network_spec
from compofa.space.arrays import SubnetArrays
from compofa.space.subnet import Subnet
from nas.cost.base import params_cost
from nas.search.evolution import Evolution
from nas.search.pipeline import Outcome, Target, run_search
from nas.search.verify import small_validation, standard_error, verify, weak_ranking

QUICK = Evolution(population=10, children=20, generations=2, restarts=1)


class Size:
    """Predicts more for more depth and resolution."""

    name, unit, error = "size", "top-1 %", "none"

    def predict(self, arrays: SubnetArrays) -> np.ndarray:
        return 40 + arrays.depths @ np.array([1.0, 1.1, 1.2, 1.3, 1.4]) + arrays.resolutions / 8

    def std(self, arrays: SubnetArrays) -> np.ndarray:
        return np.ones(len(arrays))


class Cut:
    """A latency, with a cut through the space that no other cost makes."""

    name, unit, error, quantity = "cut", "ms", "exact", "latency"

    def __call__(self, arrays: SubnetArrays) -> np.ndarray:
        return (arrays.depths @ np.array([1.0, 2, 3, 2, 1]) + arrays.resolutions / 4).astype(float)


def target(coupling: bool = True) -> Target:
    spec = network_spec("compofa-small", 10, resolutions=(8, 16))
    space = spec.space if coupling else spec.space.free()
    return Target("small", spec.backbone, 10, space, Size(), Cut())


@pytest.fixture(scope="module")
def outcome() -> Outcome:
    return run_search([target()], [22.0, 26.0, 99.0])


class Bench:
    """Measures subnets by a rule, and remembers them."""

    def __init__(self, rule, images: int = 400) -> None:
        self.rule, self.images, self.asked = rule, images, []

    def __call__(self, subnets: list[Subnet]) -> list[EvalRecord]:
        self.asked += subnets
        return [
            EvalRecord(subnet, self.rule(subnet), 100.0, self.images, 1, 1, "small", "digits",
                       "validation", 0, 0, "", "cpu")
            for subnet in subnets
        ]  # fmt: skip


def test_the_best_measured_of_the_best_predicted_wins(outcome):
    first = outcome.targets[0]
    genes = first.space.enumerate_genes()
    arrays = first.space.arrays(genes)
    subnets, costs = list(first.space.subnets_of(arrays)), first.cost(arrays)
    order = np.argsort(-first.accuracy.predict(arrays), kind="stable")
    bench = Bench(lambda subnet: 90.0 - 0.01 * subnets.index(subnet))
    checked = verify(outcome, bench, 3)
    assert 3 < len(bench.asked) == len(set(bench.asked)) <= 9, "no subnet is measured twice"
    for found in checked.found:
        inside = [row for row in order if costs[row] <= found.budget]
        assert {subnets[row] for row in inside[:3]} <= set(bench.asked)
        open_to = [row for row in inside if subnets[row] in bench.asked]
        assert found.subnet == subnets[min(open_to)], "the best measured one within the budget"
        row = subnets.index(found.subnet)
        assert found.cost == costs[row] <= found.budget
        assert found.accuracy == first.accuracy.predict(arrays)[row]
    top1 = checked.measured["validation_top1"]
    assert top1 == sorted(top1), "a larger budget has all candidates of a smaller one"
    assert checked.measured["validation_top1_se"][0] == standard_error(top1[0], 400)


def test_equal_measurements_leave_the_prediction_and_one_candidate_decides_nothing(outcome):
    for count in (1, 4):
        checked = verify(outcome, Bench(lambda subnet: 50.0), count)
        assert checked.found == outcome.found
    by_luck = verify(outcome, Bench(lambda subnet: 90.0 - sum(subnet.depths)), 1)
    assert by_luck.found == outcome.found


def test_candidates_keep_to_the_limits_and_to_spaces_that_are_not_enumerated():
    few = target()
    params = params_cost(few.backbone, few.classes)
    most = float(np.median(params(few.space.arrays(few.space.enumerate_genes()))))
    bench = Bench(lambda subnet: 10.0)
    verify(run_search([few], [99.0], limits=[(params, most)]), bench, 5)
    assert len(bench.asked) == 5
    assert params(few.space.arrays_of(bench.asked)).max() <= most
    free = target(coupling=False)
    assert free.space.size > 1e6
    bench = Bench(lambda subnet: 10.0)
    verify(run_search([free], [26.0], evolution=QUICK), bench, 3)
    assert 1 <= len(bench.asked) <= 3
    assert free.cost(free.space.arrays_of(bench.asked)).max() <= 26


def test_the_standard_error_is_binomial_and_never_0():
    assert standard_error(50.0, 10_000) == pytest.approx(0.5, rel=1e-3)
    assert standard_error(25.0, 28) == pytest.approx(8.18, rel=0.03)
    assert standard_error(100.0, 30) == standard_error(0.0, 30) == pytest.approx(50 / 31)


def test_few_validation_images_are_warned_of_with_the_number_that_would_do():
    warning = small_validation(30, 42.75)
    assert "30 validation images" in warning and "± 8.9 points" in warning and "2,4" in warning
    assert small_validation(359, 98.3) is None
    assert small_validation(10_000, 60.0) is None
    for top1 in (0.0, 42.75, 90.0, 100.0):
        wanted = int(small_validation(20, top1).split("about ")[1].split()[0].replace(",", ""))
        assert 0.95 < standard_error(top1, wanted) < 1.001


def test_a_predictor_that_does_not_rank_has_no_front():
    model = Size()
    assert weak_ranking(model) is None, "not known"
    for rank, weak in ((0.3, True), (-0.2, True), (0.5, False), (0.9, False), (None, False)):
        model.spearman = rank
        assert bool(weak_ranking(model)) == weak
    model.spearman = 0.314
    assert "0.31" in weak_ranking(model) and "Spearman" in weak_ranking(model)


def test_columns_measured_before_stay(outcome):
    checked = verify(replace(outcome, measured={"x": [1.0, 2, 3]}), Bench(lambda subnet: 50.0), 1)
    assert list(checked.measured) == ["validation_top1", "validation_top1_se", "x"]
