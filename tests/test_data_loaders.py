import os
import pickle
import random
import tarfile
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from compofa.data import (
    BrokenImages,
    Normalisation,
    calibration_loader,
    dataset_info,
    eval_loader,
    load_dataset,
    train_loader,
)
from compofa.data import transforms as tf
from compofa.data.augmentation import AugmentationSettings
from compofa.data.sampling import augmentation_seeds
from compofa.data.sources import MemorySource
from compofa.data.torchvision_shim import import_torchvision
from compofa.errors import DataError
from compofa.seeds import rng

DIGITS = dataset_info("digits")
PHOTOS = dataset_info("imagefolder")
HALVES = Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


@pytest.fixture
def photos(tmp_path):
    """12 photographs of 2 classes in train and 4 in val, some of them grey."""
    for part, count in (("train", 6), ("val", 2)):
        for label, mode in (("cat", "RGB"), ("dog", "L")):
            folder = tmp_path / part / label
            folder.mkdir(parents=True)
            for i in range(count):
                noise = rng(part, label, i).integers(0, 256, (9, 12, 3), dtype=np.uint8)
                image = Image.fromarray(noise).resize((80 + i, 60)).convert(mode)
                image.save(folder / f"{i}.jpg")
    return load_dataset("imagefolder", tmp_path, validation_images=0)


def options(**more):
    return {"batch_size": 4, "resolutions": (16, 24, 32), "seed": 1, "epoch": 0} | more


def global_states():
    return (
        random.getstate(),
        tuple(np.random.get_state()[1]),  # noqa: NPY002
        torch.get_rng_state().tolist(),
    )


def same(left, right):
    left, right = list(left), list(right)
    return len(left) == len(right) > 0 and all(
        a.images.equal(b.images) and a.targets.equal(b.targets) and a[2:] == b[2:]
        for a, b in zip(left, right, strict=True)
    )


def test_batches_of_digits(digits):
    batches = list(train_loader(digits.train, DIGITS, **options(batch_size=100)))
    assert len(batches) == 10
    assert {batch.resolution for batch in batches} == {16, 24, 32}
    for batch in batches:
        assert batch.images.shape == (100, 3, batch.resolution, batch.resolution)
        assert batch.images.dtype == torch.float32 and batch.targets.dtype == torch.int64
        assert abs(float(batch.images.mean())) < 0.2 and 0.7 < float(batch.images.std()) < 1.2
        assert batch.broken == ()


@pytest.mark.parametrize(("workers", "context"), [(0, None), (2, "fork"), (2, "spawn")])
def test_batches_do_not_depend_on_workers_or_global_seeds(photos, workers, context):
    expected = list(train_loader(photos.train, PHOTOS, **options()))
    random.seed(5)
    np.random.seed(6)  # noqa: NPY002
    torch.manual_seed(7)
    states = global_states()
    loader = train_loader(photos.train, PHOTOS, **options(workers=workers, context=context))
    assert same(loader, expected)
    assert global_states() == states
    assert not same(train_loader(photos.train, PHOTOS, **options(seed=2)), expected)


@pytest.mark.parametrize("name", ["digits", "cifar10", "fashion-mnist"])
def test_in_memory_images_are_the_same_with_workers(digits, name):
    info = dataset_info(name)
    n, size = 30, info.native_size
    images = rng(0).integers(0, 256, (n, 3, size, size), dtype=np.uint8)
    source = MemorySource(images, np.arange(n) % 10)
    torch.manual_seed(3)
    states = global_states()
    settings = options(batch_size=7)
    expected = list(train_loader(source, info, **settings))
    assert same(train_loader(source, info, workers=2, context="fork", **settings), expected)
    assert global_states() == states
    # An image's augmentation does not depend on the batch it is in.
    alone = list(train_loader(source, info, **settings | {"batch_size": 1, "resolutions": (20,)}))
    together = next(
        iter(train_loader(source, info, **settings | {"batch_size": 30, "resolutions": (20,)}))
    )
    assert torch.cat([batch.images for batch in alone]).equal(together.images)


def test_a_resumed_epoch_and_ranks_see_the_same_images(digits):
    settings = options(batch_size=200)
    whole = list(train_loader(digits.train, DIGITS, **settings))
    assert same(train_loader(digits.train, DIGITS, first_step=3, **settings), whole[3:])
    half = options(batch_size=100)
    ranks = [train_loader(digits.train, DIGITS, rank=r, world_size=2, **half) for r in range(2)]
    for batch, left, right in zip(whole, *ranks, strict=True):
        assert torch.cat([left.images, right.images]).equal(batch.images)


def test_evaluation_is_every_image_once_in_order(digits):
    batches = list(eval_loader(digits.test, DIGITS, resolution=16, batch_size=100))
    assert [len(batch.targets) for batch in batches] == [100, 100, 100, 60]
    assert torch.cat([b.targets for b in batches]).numpy().tolist() == digits.test.targets.tolist()
    ranks = [
        list(eval_loader(digits.test, DIGITS, resolution=16, batch_size=50, rank=r, world_size=7))
        for r in range(7)
    ]
    assert sum(len(batch.targets) for rank in ranks for batch in rank) == 360
    assert same(eval_loader(digits.test, DIGITS, resolution=16, batch_size=100), batches)


def test_normalisation_can_be_replaced(digits):
    settings = {"resolution": 16, "batch_size": 360}
    own = next(iter(eval_loader(digits.test, DIGITS, **settings))).images
    half = next(iter(eval_loader(digits.test, DIGITS, normalisation=HALVES, **settings))).images
    assert float(half.min()) == -1 and float(half.max()) == 1
    mean, std = DIGITS.normalisation.mean[0], DIGITS.normalisation.std[0]
    torch.testing.assert_close(own * std + mean, half * 0.5 + 0.5)


def test_calibration_images_are_a_fixed_subset(digits):
    def targets(seed, n_images=100, resolution=16):
        loader = calibration_loader(
            digits.train,
            DIGITS,
            resolution=resolution,
            batch_size=64,
            seed=seed,
            n_images=n_images,
        )
        return torch.cat([batch.targets for batch in loader]).tolist()

    assert len(targets(0)) == 100 and targets(0) == targets(0, resolution=20) != targets(1)
    assert sorted(targets(0, 5000)) == sorted(digits.train.targets.tolist())


def test_impossible_settings_are_refused(digits):
    empty = digits.train.subset(np.arange(0))
    with pytest.raises(DataError, match="empty"):
        eval_loader(empty, DIGITS, resolution=16, batch_size=4)
    with pytest.raises(DataError, match="calibration"):
        calibration_loader(empty, DIGITS, resolution=16, batch_size=4, seed=0)
    with pytest.raises(DataError, match=r"workers.*-1"):
        train_loader(digits.train, DIGITS, workers=-1, **options())
    with pytest.raises(DataError, match=r"\b0\b"):
        train_loader(empty, DIGITS, **options())


# --- transforms ---


def seeds(n, seed=0):
    return augmentation_seeds(seed, 0, np.arange(n))


def test_random_affine_without_movement_is_a_resize(digits):
    images = torch.from_numpy(digits.test.images[:20])
    still = tf.random_affine(images, seeds(20), 8, degrees=0, shift=0, scale=(1, 1))
    torch.testing.assert_close(still, images / 255, atol=1e-5, rtol=0)
    moved = tf.random_affine(images, seeds(20), 16)
    assert moved.shape == (20, 3, 16, 16) and moved.min() >= 0 and moved.max() <= 1
    assert (tf.random_affine(images[:1].repeat(20, 1, 1, 1), seeds(20), 16).std(0) > 0).any()


def test_random_affine_moves_by_at_most_its_share():
    images = torch.zeros(500, 3, 40, 40, dtype=torch.uint8)
    images[:, :, 19:21, 19:21] = 255
    moved = tf.random_affine(images, seeds(500), 40, degrees=0, scale=(1, 1))[:, 0]
    mass = moved.sum((1, 2))
    centre = (moved.sum(1) * torch.arange(40.0)).sum(1) / mass - 19.5
    assert centre.abs().max() <= 5 + 1e-3
    assert centre.min() < -4 and centre.max() > 4
    turned = tf.random_affine(images, seeds(500), 40, shift=0)[:, 0]
    assert turned[:, 19:21, 19:21].mean() > 0.9  # rotation and scaling keep the centre


def test_random_crop_moves_and_mirrors():
    n, pad = 400, 4
    images = torch.zeros(n, 3, 32, 32, dtype=torch.uint8)
    images[:, :, 10, 20] = 200
    crops = tf.random_crop(images, seeds(n), pad, flip=False)
    assert crops.shape == images.shape and crops.dtype == torch.uint8
    position = crops[:, 0].flatten(1).argmax(1)
    rows, columns = position // 32, position % 32
    assert set(rows.tolist()) == set(range(6, 15)) and set(columns.tolist()) == set(range(16, 25))
    flipped = tf.random_crop(images, seeds(n), pad, flip=True)
    mirrored = (flipped != crops).flatten(1).any(1)
    assert 150 < int(mirrored.sum()) < 250
    assert flipped[mirrored].equal(crops[mirrored].flip(-1))


def test_resize_is_bilinear():
    images = torch.from_numpy(rng(0).integers(0, 256, (4, 3, 8, 8), dtype=np.uint8))
    expected = torch.nn.functional.interpolate(images.float(), size=16, mode="bilinear")
    assert (tf.resize(images, 16).float() - expected).abs().max() <= 1
    assert tf.resize(images, 8) is images


def test_photograph_for_evaluation_is_the_middle():
    image = Image.new("RGB", (256, 512))
    image.paste((255, 255, 255), (16, 144, 240, 368))
    assert tf.centre_crop(image, 224).float().mean() == 255
    assert tf.centre_crop(image, 160).shape == (
        3,
        160,
        160,
    )  # after resizing to ceil(160 / 0.875) = 183
    assert tf.centre_crop(Image.new("RGB", (20_000, 2)), 224).shape == (3, 224, 224)
    wide = torch.zeros(3, 2, 9_000, dtype=torch.uint8)
    assert tf.centre_crop(wide, 32).shape == (3, 32, 32)


def test_photograph_for_training_depends_on_its_seed():
    noise = rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    first = tf.random_resized_crop(image, 1, 32)
    assert first.shape == (3, 32, 32) and first.dtype == torch.uint8
    assert first.equal(tf.random_resized_crop(image, 1, 32))
    assert not first.equal(tf.random_resized_crop(image, 2, 32))
    assert tf.random_resized_crop(torch.zeros(3, 9, 9, dtype=torch.uint8), 1, 4).shape == (3, 4, 4)


def test_memory_source_with_photograph_transforms():
    images = rng(0).integers(0, 256, (6, 3, 40, 40), dtype=np.uint8)
    source = MemorySource(images, np.arange(6) % 2)
    info = replace(PHOTOS, name="small")
    batch = next(iter(train_loader(source, info, **options(batch_size=6))))
    assert batch.images.shape == (6, 3, batch.resolution, batch.resolution)


# --- what may be added to the augmentation ---

MORE = AugmentationSettings(auto_augment="randaugment", random_erasing=0.5)


@pytest.mark.parametrize("name", ["digits", "cifar10", "fashion-mnist", "imagefolder"])
def test_added_augmentation_depends_on_the_image_alone(photos, name):
    info, source, augment = dataset_info(name), photos.train, MORE
    if name == "imagefolder":
        augment = AugmentationSettings("trivialaugment", 0.5, crop_scale=0.3, color_jitter=0.4)
    else:
        size = info.native_size
        images = rng(0).integers(0, 256, (12, 3, size, size), dtype=np.uint8)
        source = MemorySource(images, np.arange(12) % 2)
    states = global_states()
    settings = options(batch_size=6, resolutions=(20,), augment=augment)
    expected = list(train_loader(source, info, **settings))
    assert same(train_loader(source, info, workers=2, context="fork", **settings), expected)
    assert global_states() == states
    alone = list(train_loader(source, info, **settings | {"batch_size": 1}))
    together = torch.cat([batch.images for batch in expected])
    assert torch.equal(torch.cat([batch.images for batch in alone]), together)
    usual = list(train_loader(source, info, **settings | {"augment": None}))
    changed = (torch.cat([batch.images for batch in usual]) != together).flatten(1).any(1)
    assert changed.sum() > 6
    assert together.isfinite().all() and together.shape == (12, 3, 20, 20)


def test_added_augmentation_reaches_spawned_workers(photos):
    loader = train_loader(photos.train, PHOTOS, **options(augment=MORE)).loader
    sent = pickle.loads(pickle.dumps(loader.dataset))
    for keys in loader.batch_sampler:
        batch, other = loader.dataset.__getitems__(keys), sent.__getitems__(keys)
        assert torch.equal(batch.images, other.images)


def test_erasing_sets_a_rectangle_to_the_mean_colour():
    images = torch.ones(40, 3, 16, 16)
    erased = tf.random_erasing(images, augmentation_seeds(0, 0, np.arange(40)), 0.5)
    holes = erased == 0
    assert torch.equal(erased[~holes], images[~holes])
    assert 10 < holes.flatten(1).any(1).sum() < 30
    for hole in holes[holes.flatten(1).any(1)]:
        rows, columns = hole[0].any(1), hole[0].any(0)
        assert torch.equal(hole, (rows[:, None] & columns).expand_as(hole)), "a rectangle"
        assert 0 < hole[0].float().mean() < 0.4
    assert tf.random_erasing(images, augmentation_seeds(0, 0, np.arange(40)), 0.0) is images


def test_photographs_are_augmented_as_published_by_default():
    v2 = import_torchvision().transforms.v2
    noise = rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    published = v2.Compose([
        v2.RandomResizedCrop(32, scale=(0.08, 1.0)), v2.RandomHorizontalFlip(),
        v2.ColorJitter(brightness=32 / 255, saturation=0.5), v2.PILToTensor(),
    ])  # fmt: skip
    for seed in range(3):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            expected = published(Image.fromarray(noise))
        assert torch.equal(tf.random_resized_crop(Image.fromarray(noise), seed, 32), expected)


def test_crop_scale_and_colour_jitter_of_photographs():
    image = Image.new("RGB", (64, 64))
    image.paste((255, 0, 0), (0, 0, 32, 64))
    whole = AugmentationSettings(crop_scale=1.0, color_jitter=0.0)
    for seed in range(4):  # the whole image, perhaps flipped, and no other colours
        crop = tf.random_resized_crop(image, seed, 64, whole)
        assert crop[1:].max() == 0 and {0, 255} == set(crop[0].unique().tolist())
        assert crop[0].float().mean() == 127.5
    strong = AugmentationSettings(crop_scale=1.0, color_jitter=1.0)
    means = {float(tf.random_resized_crop(image, s, 64, strong).float().mean()) for s in range(6)}
    assert len(means) == 6


# --- broken images ---


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_make_the_batch_smaller(photos, workers):
    victims = [photos.train.path(2), photos.train.path(8)]
    Path(victims[0]).write_bytes(b"")
    whole = Path(victims[1]).read_bytes()
    Path(victims[1]).write_bytes(whole[: len(whole) // 2])
    batches = list(train_loader(photos.train, PHOTOS, workers=workers, **options()))
    assert sum(len(batch.targets) for batch in batches) == 10
    assert all(len(batch.images) == len(batch.targets) for batch in batches)
    broken = [path for batch in batches for path in batch.broken]
    assert sorted(path for path, _ in broken) == sorted(victims)
    assert dict(broken)[victims[0]] == "empty" and "truncated" in dict(broken)[victims[1]]
    with pytest.raises(DataError, match="2 of 12"):
        BrokenImages(len(photos.train)).add(broken)


def test_targets_stay_with_their_images(photos):
    """The second class is grey, and the unreadable image is the first of the batch."""
    Path(photos.test.path(0)).write_text("text")
    (batch,) = eval_loader(photos.test, PHOTOS, resolution=32, batch_size=9, normalisation=HALVES)
    assert batch.targets.tolist() == [0, 1, 1]
    grey = [(image - image[:1]).abs().max() < 0.1 for image in batch.images]
    assert grey == [False, True, True]


def test_a_batch_of_broken_images_is_empty(photos):
    for i in range(4):
        Path(photos.test.path(i)).write_bytes(b"")
    (batch,) = eval_loader(photos.test, PHOTOS, resolution=32, batch_size=4)
    assert batch.images.shape == (0, 3, 32, 32) and batch.images.dtype == torch.float32
    assert len(batch.targets) == 0 and len(batch.broken) == 4


# --- speed ---


# --- real images ---


def test_real_photographs(tmp_path):
    data = os.environ.get("COMPOFA_REFERENCE_DATA")
    if not data:
        pytest.skip("COMPOFA_REFERENCE_DATA is not set")
    counts: dict[str, int] = {}
    with tarfile.open(Path(data) / "images" / "tin40x500.tar") as archive:
        for member in archive:
            folder = member.name.rpartition("/")[0]
            counts[folder] = counts.get(folder, 0) + 1
            if member.isfile() and counts[folder] <= 3 and len(counts) <= 200:
                archive.extract(member, tmp_path, filter="data")
    splits = load_dataset("imagefolder", tmp_path, validation_images=40)
    assert len(splits.classes) == 40 and len(splits.train) == 80 and len(splits.test) == 120
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in train_loader(splits.train, PHOTOS, **options(batch_size=40)):
            assert batch.images.shape[0] == 40 and batch.broken == ()
            assert batch.images.isfinite().all() and abs(float(batch.images.mean())) < 1
