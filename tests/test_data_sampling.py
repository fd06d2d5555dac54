import pickle
import subprocess
import sys
from itertools import chain

import numpy as np
import pytest

from compofa.data.catalog import DATASETS, Normalisation, dataset_info
from compofa.data.sampling import (
    TrainBatches,
    augmentation_seeds,
    balanced_draws,
    eval_batches,
    random_bits,
    resolution_at,
    steps_per_epoch,
)
from compofa.data.transforms import uniforms
from compofa.errors import DataError

RESOLUTIONS = (16, 20, 24)


def indices(batches):
    return [[key.index for key in batch] for batch in batches]


def test_the_list_of_data_sets_does_not_wait_for_torch():
    code = (
        "import sys, compofa.data; compofa.data.DATASETS['digits'];"
        "assert not {'torch', 'torchvision', 'sklearn', 'PIL'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_catalog_is_consistent():
    for name, info in DATASETS.items():
        assert dataset_info(name) is info and info.name == name
        assert info.eval_resolution in info.train_resolutions
        assert (info.native_size is None) == (info.augmentation == "inception")
    with pytest.raises(
        DataError, match="unknown data set 'mnist': expected one of digits, cifar10"
    ):
        dataset_info("mnist")


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        (0.5, 0.0), (0.5, -1.0), (0.5, 1e-300), (0.5, float("inf")), (0.5, float("nan")),
        (float("nan"), 1.0), (float("inf"), 1.0), (1e30, 1.0),
    ],
)  # fmt: skip
def test_normalisation_out_of_range_is_refused(mean, std):
    for place in range(3):
        means, stds = [0.5] * 3, [0.5] * 3
        means[place], stds[place] = mean, std
        with pytest.raises(DataError, match="standard deviations"):
            Normalisation(tuple(means), tuple(stds))
    Normalisation((0.0, -1.0, 127.5), (1.0, 1 / 255, 58.4))


def test_every_public_name_can_be_loaded():
    import compofa.data

    for name in compofa.data.__all__:
        assert getattr(compofa.data, name) is not None
    with pytest.raises(AttributeError):
        _ = compofa.data.nothing


def test_resolution_depends_on_seed_and_step_only():
    drawn = [resolution_at(3, step, RESOLUTIONS) for step in range(300)]
    np.random.seed(1)  # noqa: NPY002
    assert drawn == [resolution_at(3, step, RESOLUTIONS) for step in range(300)]
    assert drawn != [resolution_at(4, step, RESOLUTIONS) for step in range(300)]
    assert min(drawn.count(r) for r in RESOLUTIONS) > 70


def test_random_bits_are_splitmix64():
    # First outputs for the seed 1234567, from the published reference implementation.
    bits = random_bits(np.full(1, 1234567, np.uint64), np.arange(3))
    assert bits.tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_uniforms_are_uniform_and_independent_between_images():
    draws = uniforms(augmentation_seeds(0, 0, np.arange(20_000)), 3)
    assert draws.min() >= 0 and draws.max() < 1
    assert np.allclose(draws.mean(0), 0.5, atol=0.01)
    assert np.abs(np.corrcoef(draws.T) - np.eye(3)).max() < 0.03
    assert np.abs(np.corrcoef(draws[1:, 0], draws[:-1, 0])[0, 1]) < 0.03


def test_batches_cover_the_epoch_once_and_drop_the_rest():
    sampler = TrainBatches(103, 10, RESOLUTIONS, seed=0, epoch=0)
    batches = list(sampler)
    assert len(sampler) == len(batches) == steps_per_epoch(103, 10) == 10
    flat = list(chain(*indices(batches)))
    assert len(set(flat)) == len(flat) == 100
    assert flat != sorted(flat)
    for step, batch in enumerate(batches):
        assert {key.resolution for key in batch} == {resolution_at(0, step, RESOLUTIONS)}
    assert len({key.seed for batch in batches for key in batch}) == 100
    assert batches == list(pickle.loads(pickle.dumps(sampler)))


def test_epochs_and_seeds_differ_and_steps_count_across_epochs():
    first = list(TrainBatches(50, 5, RESOLUTIONS, seed=0, epoch=0))
    second = list(TrainBatches(50, 5, RESOLUTIONS, seed=0, epoch=1))
    assert indices(first) != indices(second)
    assert indices(first) != indices(TrainBatches(50, 5, RESOLUTIONS, seed=1, epoch=0))
    drawn = [batch[0].resolution for batch in first + second]
    assert drawn == [resolution_at(0, step, RESOLUTIONS) for step in range(20)]
    seeds = [{key.index: key.seed for batch in epoch for key in batch} for epoch in (first, second)]
    assert all(seeds[0][i] != seeds[1][i] for i in range(50))


def test_a_resumed_epoch_yields_the_remaining_batches():
    whole = list(TrainBatches(50, 5, RESOLUTIONS, seed=0, epoch=2))
    rest = TrainBatches(50, 5, RESOLUTIONS, seed=0, epoch=2, first_step=7)
    assert list(rest) == whole[7:] and len(rest) == 3


def test_ranks_take_disjoint_slices_of_the_global_batch():
    one = list(TrainBatches(100, 12, RESOLUTIONS, seed=0, epoch=1))
    ranks = [list(TrainBatches(100, 4, RESOLUTIONS, 0, 1, rank, 3)) for rank in range(3)]
    assert [list(chain(*parts)) for parts in zip(*ranks, strict=True)] == one


def test_a_data_set_smaller_than_a_batch_is_one_step():
    assert sorted(indices(TrainBatches(7, 10, RESOLUTIONS, 0, 0))[0]) == list(range(7))
    ranks = [indices(TrainBatches(7, 10, RESOLUTIONS, 0, 0, rank, 2)) for rank in range(2)]
    assert [len(rank) for rank in ranks] == [1, 1]
    assert sorted(ranks[0][0] + ranks[1][0]) == list(range(7))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4, RESOLUTIONS, 0, 0), r"\b0\b"),
        ((9, 0, RESOLUTIONS, 0, 0), "batch size.* 0"),
        ((9, 4, (), 0, 0), "resolutions"),
        ((9, 4, (0, 16), 0, 0), "resolutions"),
        ((9, 4, RESOLUTIONS, 0, 0, 2, 2), "rank.* 2"),
        ((9, 4, RESOLUTIONS, 0, 0, 0, 1, 3), "step.* 3"),
    ],
)
def test_impossible_settings_are_refused(arguments, message):
    with pytest.raises(DataError, match=message):
        TrainBatches(*arguments)


def test_evaluation_batches_keep_order_and_the_last_images():
    batches = eval_batches(range(7), 3, 16)
    assert indices(batches) == [[0, 1, 2], [3, 4, 5], [6]]
    with pytest.raises(DataError, match="batch size"):
        eval_batches(range(7), 0, 16)


# --- classes of equal shares ---

UNEQUAL = np.repeat([0, 1, 3], [70, 25, 5])
"""100 images of three classes; class 2 has none."""


def balanced(**more) -> TrainBatches:
    options = {"batch_size": 10, "resolutions": RESOLUTIONS, "seed": 0, "epoch": 0} | more
    return TrainBatches(len(UNEQUAL), targets=UNEQUAL, **options)


def test_balanced_classes_have_equal_shares_and_images_of_a_class_too():
    shares = np.zeros(4)
    for epoch in range(6):
        flat = list(chain(*indices(balanced(epoch=epoch))))
        assert len(flat) == 100, "epochs keep their length"
        counts = np.bincount(UNEQUAL[flat], minlength=4)
        assert counts[2] == 0 and sorted(counts)[1:] == [33, 33, 34]
        drawn = np.bincount(flat, minlength=100)
        for label in (0, 1, 3):
            of_class = drawn[label == UNEQUAL]
            assert of_class.max() - of_class.min() <= 1
        shares += counts
    assert max(shares) - min(shares[[0, 1, 3]]) < 6, "the odd image is not always the same class's"


def test_an_image_drawn_again_is_augmented_in_another_way():
    keys = list(chain(*balanced()))
    assert len({key.seed for key in keys}) == 100
    usual = {key.index: key.seed for key in chain(*TrainBatches(100, 10, RESOLUTIONS, 0, 0))}
    assert {usual[key.index] for key in keys} <= {key.seed for key in keys}


def test_balanced_epochs_resume_and_are_divided_among_ranks():
    whole = list(balanced(batch_size=12, epoch=2))
    assert list(balanced(batch_size=12, epoch=2, first_step=3)) == whole[3:]
    ranks = [list(balanced(batch_size=4, epoch=2, rank=r, world_size=3)) for r in range(3)]
    assert [list(chain(*parts)) for parts in zip(*ranks, strict=True)] == whole


def test_more_classes_than_images_of_an_epoch():
    draws = balanced_draws(np.array([4, 0, 9]), np.random.default_rng(0))
    assert sorted(draws) == [0, 1, 2]
