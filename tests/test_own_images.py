"""Settings that follow from own images, from the network a run starts from and from free memory."""

import json
import logging
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from calls import called
from PIL import Image

from compofa.cli.evaluate import main as evaluate
from compofa.cli.tools import main as tools
from compofa.cli.train import main
from compofa.data import load_dataset
from compofa.data.catalog import DATASETS, DatasetInfo
from compofa.data.survey import Survey, survey
from compofa.errors import ConfigError, DataError
from compofa.io.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from compofa.networks.zoo import NETWORKS, network_spec, size_warning, warn_of_size
from compofa.nn.supernet import Supernet
from compofa.training import adviser as adviser_module
from compofa.training.adviser import Adviser
from compofa.training.config import TrainConfig
from compofa.training.memory import ERROR, FIXED, Need, free_bytes
from compofa.training.own_images import (
    COUPLED,
    FREE,
    Before,
    examples,
    network_for,
    resolutions,
    suggest,
)
from compofa.training.plan import plan
from compofa.training.resume import resumed_plan

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "own-images.md"


def photos(folder: Path, size: tuple[int, int], counts: list[int]) -> Path:
    """Class folders of links to one image, so that many are made quickly."""
    folder.mkdir()
    image = folder.parent / f"{folder.name}.png"
    Image.new("RGB", size, (90, 20, 7)).save(image)
    for number, count in enumerate(counts):
        place = folder / f"class{number:03d}"
        place.mkdir()
        for index in range(count):
            os.link(image, place / f"{index:05d}.png")
    return folder


def settings(folder: Path, task: str = "teacher", **given) -> TrainConfig:
    return TrainConfig(task=task, dataset="imagefolder", data_path=str(folder), **given)


@pytest.fixture
def memory(monkeypatch):
    """Pretends that so many bytes are free."""

    def pretend(free):
        monkeypatch.setattr(adviser_module, "free_bytes", lambda device: free)

    pretend(64_000_000_000)
    return pretend


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def found(train: int, side: int, classes: int = 10, **more) -> Survey:
    names, share = tuple(f"{n:03d}" for n in range(classes)), train // classes
    usual = {"fewest": share, "most": share, "side": side, "sides": (side, side), "files": True}
    return Survey(train, train // 9, names, **{**usual, **more})


# --- the survey and what follows from it ---

KINDS = {  # side of the images, images per class, then network, resolutions, batch, epochs
    "ten": ((50, 40), [5, 5], "compofa-small", (24, 28, 32, 40), 6, 120),
    "small": ((64, 64), [200] * 10, "compofa-medium", (40, 48, 56, 64), 64, 120),
    "large": ((1600, 1200), [30] * 10, "compofa-medium", (80, 96, 112, 128), 16, 120),
    "many classes": ((64, 80), [10] * 200, "compofa-medium", (40, 48, 56, 64), 64, 120),
    "imbalanced": ((64, 64), [1000, 10], "compofa-medium", (40, 48, 56, 64), 32, 120),
    "24 px": ((24, 24), [60] * 10, "compofa-small", (12, 16, 20, 24), 16, 120),
}


@pytest.mark.parametrize("kind", KINDS)
def test_suggestions_for_folders(kind, tmp_path, memory):
    size, counts, net, sizes, batch, most_epochs = KINDS[kind]
    folder = photos(tmp_path / "photos", size, counts)
    adviser = Adviser(settings(folder))
    config = adviser.resolve(adviser.given)
    held = adviser.found
    assert held.train + held.validation < sum(counts) == len([*folder.rglob("*.png")])
    assert held.side == min(size) and len(held.classes) == len(counts) and held.files
    assert (config.net, config.image_size, config.eval_size) == (net, sizes, sizes[-1])
    assert config.batch_size == batch <= max(2, held.train)
    steps = max(1, held.train // batch)
    assert most_epochs / 4 <= config.epochs <= most_epochs
    assert config.epochs == pytest.approx(120 * min(1, max(0.25, 32 / steps)), abs=1)
    assert config.lr == pytest.approx(3.2 * batch / 2048)
    assert 0 < config.warmup_epochs < config.epochs / 10
    assert 1 <= config.validate_every <= config.epochs / 5 and config.workers == 0
    text = "\n".join(line for _, line in adviser.notes["teacher"])
    for option in ("--net", "--image-size", "--batch-size", "--epochs", "--lr", "--workers"):
        assert option in text
    assert ("per class" in text) == (kind in ("imbalanced", "many classes") and held.imbalance >= 2)


def test_large_sets_need_few_epochs_and_their_own_resolution():
    config = settings(Path("DIR"))
    few, many = (
        {name: each.value for name, each in suggest(config, found(train, 500)).items()}
        for train in (2_000, 500_000)
    )
    assert few["net"] == "compofa-medium" and max(few["image_size"]) == 128
    assert many["net"] == "compofa" and max(many["image_size"]) == many["eval_size"] == 224
    assert many["epochs"] < few["epochs"] and many["batch_size"] > few["batch_size"]
    assert many["epochs"] * 500_000 > few["epochs"] * 2_000 and many["validate_every"] == 1


@pytest.mark.parametrize("side", [8, 24, 31, 48, 49, 64, 100, 128, 129, 200, 224, 5000])
@pytest.mark.parametrize("networks", [COUPLED, FREE])
def test_networks_can_take_what_is_suggested(side, networks):
    for train in (8, 2_000, 200_000):
        row = suggest(settings(Path("DIR"), "compound"), found(train, side))
        sizes = row["image_size"].value
        spec = network_spec(network_for(max(sizes), networks))
        for size in sizes:
            spec.check_resolution(size)
        assert sizes == tuple(sorted({*sizes})) and max(sizes) <= max(16, side)
        assert NETWORKS[row["net"].value].serves(max(sizes)) or side < 48


def test_resolutions_are_multiples_of_four():
    assert resolutions(224) == (140, 168, 196, 224)
    assert resolutions(16) == (8, 12, 16)


def test_what_is_given_wins(tmp_path, memory):
    folder = photos(tmp_path / "photos", (64, 64), [20] * 2)
    given = {
        "net": "compofa-small", "image_size": (16, 32), "batch_size": 7, "epochs": 3, "lr": 0.5,
        "warmup_epochs": 0, "validate_every": 2, "workers": 1, "eval_size": 24, "threads": 2,
    }  # fmt: skip
    adviser = Adviser(settings(folder, **given))
    config = adviser.resolve(adviser.given)
    assert {name: getattr(config, name) for name in given} == given
    part = Adviser(settings(folder, image_size=(200,), epochs=7))
    config = part.resolve(part.given)
    assert config.net == "compofa" and config.eval_size == 200 and config.epochs == 7
    text = "\n".join(line for _, line in part.notes["teacher"])
    assert "--net" in text and "--epochs " not in text and "--image-size" not in text
    for task, net in (("teacher", "compofa-small"), ("progressive", "ofa-small")):
        small = Adviser(settings(folder, task, image_size=(16, 24)))  # too small for the others
        assert {phase.net for phase in plan(small.given, small.resolve)} == {net}
    low = Adviser(settings(folder, eval_size=24))
    assert low.resolve(low.given).eval_size == 24


def test_complete_settings_are_not_suggested_again(tmp_path, memory):
    folder = photos(tmp_path / "photos", (64, 64), [20] * 2)
    first = Adviser(settings(folder))
    config = first.resolve(first.given)
    folder.rename(tmp_path / "moved")  # reading it again would be an error
    again = Adviser(config, resume=True)
    assert again.resolve(config) == config and again.notes["teacher"] == []


def test_data_sets_without_a_recipe_keep_their_sizes(tmp_path, memory, monkeypatch):
    folder = photos(tmp_path / "photos", (64, 64), [20] * 2)
    own = DatasetInfo(
        name="own", description="", train_resolutions=(32, 48), eval_resolution=48,
        augmentation="inception", network="compofa-proxyless", needs_path=True,
    )  # fmt: skip
    monkeypatch.setitem(DATASETS, "own", own)
    adviser = Adviser(replace(settings(folder), dataset="own"))
    config = adviser.resolve(adviser.given)
    assert (config.net, config.image_size, config.eval_size) == ("compofa-proxyless", (32, 48), 48)
    assert config.batch_size == 16 and config.epochs == 120


def test_published_recipes_stay(memory):
    adviser = Adviser(TrainConfig(task="teacher", dataset="imagenet", data_path="none"))
    config = adviser.resolve(adviser.given)
    assert replace(config, workers=0) == adviser.given.resolved()
    assert (config.batch_size, config.epochs, config.lr) == (256, 180, 0.325)


def test_headers_are_read_from_archives_and_unreadable_images_are_skipped(tmp_path):
    import tarfile

    folder = photos(tmp_path / "photos", (30, 20), [9, 9])
    (folder / "class000" / "00000.png").unlink()
    (folder / "class000" / "00000.png").write_bytes(b"no image")
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(folder, "photos")
    for path in (folder, tmp_path / "photos.tar"):
        assert survey(load_dataset("imagefolder", path)).side == 20
    for path in folder.rglob("*.png"):
        path.unlink()
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match="none among"):
        survey(load_dataset("imagefolder", folder))


# --- the network that a run starts from ---


def write_run(config: TrainConfig, folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"config": config.to_json()}))


def test_the_second_task_takes_network_and_sizes_of_the_teacher(here, memory):
    folder = photos(here / "photos", (64, 64), [20] * 2)
    teacher = Adviser(settings(folder))
    before = teacher.resolve(teacher.given)
    alone = Adviser(settings(folder, "compound"))
    assert alone.resolve(alone.given).image_size == before.image_size
    write_run(before, here / "runs" / "imagefolder-compofa-medium" / "teacher")

    grown = photos(here / "grown", (24, 24), [30] * 2)
    folder.rename(here / "old")
    grown.rename(folder)
    after = Adviser(settings(folder, "compound"))
    config = after.resolve(after.given)
    assert (config.net, config.image_size) == ("compofa-medium", (40, 48, 56, 64))
    warned = [text for level, text in after.notes["compound-1"] if level == logging.WARNING]
    assert len(warned) == 1
    assert "compofa-small" in warned[0] and "12,16,20,24" in warned[0]
    named = Adviser(settings(folder, "compound"), output=here / "other")
    assert named.resolve(named.given).net == "compofa-small"


def test_weights_decide_network_and_resolution(tmp_path, memory):
    folder = photos(tmp_path / "photos", (64, 64), [20] * 2)
    spec = network_spec("compofa-elastic-medium", 5, resolutions=(128,))
    path = tmp_path / "trained.pt"
    weights = Supernet(spec).state_dict()
    save_checkpoint(path, Checkpoint(spec, weights, tuple("abcde"), image_size=128))
    adviser = Adviser(settings(folder, "compound", init_path=str(path), kd_ratio=0.0))
    config = adviser.resolve(adviser.given)
    assert config.net is None and config.eval_size == 64  # the network is that of the weights
    scratch = Adviser(settings(folder, "compound"))
    usual = scratch.resolve(scratch.given)
    assert config.epochs < usual.epochs and config.lr < usual.lr
    # also in a run that was stopped while its teacher was trained
    again = Adviser(adviser.given, output=tmp_path / "run", resume=True)
    assert again.resolve(again.given) == config


def test_a_phase_after_one_that_followed_weights_has_its_network(here, memory):
    folder = photos(here / "photos", (64, 64), [20] * 2)
    spec = network_spec("compofa-elastic", 2, resolutions=(128,))
    first = replace(settings(folder, "compound"), image_size=(112, 128), eval_size=128)
    place = here / "runs" / "photos-compound" / "compound-1"
    place.mkdir(parents=True)
    data = {"config": first.to_json(), "network": spec.to_json()}
    (place / "config.json").write_text(json.dumps(data))
    second = Adviser(settings(folder, "compound", phase=2))
    config = second.resolve(second.given)
    assert (config.net, config.image_size) == ("compofa-elastic", (112, 128))


@pytest.mark.parametrize(("side", "expected"), [(24, 128), (64, 128), (180, 176), (800, 224)])
def test_sizes_near_those_of_the_weights(side, expected):
    before = Before("--init-path", "compofa-elastic", 224, initial=True, same_classes=False)
    row = suggest(settings(Path("DIR"), "compound"), found(2_000, side), before)
    sizes = row["image_size"].value
    assert max(sizes) == expected and all(map(NETWORKS["compofa-elastic"].serves, sizes))


# --- memory ---


@pytest.mark.parametrize(
    ("net", "size"),
    [("compofa-small", 16), ("compofa-medium", 32), ("ofa-proxyless-small", 16),
     ("ofa-resnet50-small", 16)],
)  # fmt: skip
def test_activations_kept_for_backward_are_as_estimated(net, size):
    spec = network_spec(net, 10, resolutions=(size,))
    layers = spec.layers_of(spec.space.largest)
    model, batch, kept = Supernet(spec).train(), 4, {}
    owned = {p.data_ptr() for p in model.parameters()}

    def remember(tensor):
        storage = tensor.untyped_storage()
        if tensor.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    bound = model.bind(spec.space.largest)
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        loss = bound(images.to(memory_format=torch.channels_last)).sum()
    assert loss.requires_grad
    estimate = batch * Need.of(layers).kept
    assert sum(kept.values()) == pytest.approx(estimate, rel=ERROR)


def test_a_step_grows_with_what_it_holds():
    spec = network_spec("compofa-medium", 10, resolutions=(64,))
    need = Need.of(spec.layers_of(spec.space.largest))
    small, large = need.step(8), need.step(64)
    assert large - FIXED > 6 * (small - FIXED - 4 * need.weights)
    assert need.step(64, amp=True) < large < need.step(64, workers=2)
    assert need.step(64, teacher=True) - large == need.weights
    assert need.validation(64, 2000) > need.validation(64, 200)


def test_the_batch_is_reduced_and_the_learning_rate_with_it(tmp_path, memory):
    folder = photos(tmp_path / "photos", (64, 64), [200] * 10)
    memory(900_000_000)
    adviser = Adviser(settings(folder, calibration_images=100))
    config = adviser.resolve(adviser.given)
    assert 2 <= config.batch_size < 64
    assert config.lr == pytest.approx(3.2 * config.batch_size / 2048)
    need = Need.of(config.network(10).layers_of(config.network(10).space.largest.at(64)))
    assert need.step(config.batch_size) <= 900_000_000 / (1 + ERROR)
    assert need.step(2 * config.batch_size) > 900_000_000 / (1 + ERROR)
    warned = [text for level, text in adviser.notes["teacher"] if level == logging.WARNING]
    assert len(warned) == 1
    assert f"--batch-size {config.batch_size} instead of 64" in warned[0] and "900 MB" in warned[0]


def test_a_published_default_is_changed_with_a_warning(memory):
    memory(12_000_000_000)
    adviser = Adviser(TrainConfig(task="teacher", dataset="imagenet", data_path="none"))
    config = adviser.resolve(adviser.given)
    assert config.batch_size < 256 and config.epochs == 180
    assert config.lr == pytest.approx(2.6 * config.batch_size / 2048)
    assert [level for level, text in adviser.notes["teacher"] if "instead of 256" in text] == [
        logging.WARNING
    ]


@pytest.mark.parametrize(
    ("given", "free", "expected"),
    [
        ({"batch_size": 256}, 2_000_000_000, ["--batch-size", "256", "2.0 GB", "at most"]),
        ({"image_size": (2048,)}, 1_000_000_000, ["2048", "--image-size"]),
        ({"batch_size": 4}, 500_000_000, ["--calibration-images"]),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, memory, given, free, expected):
    folder = photos(tmp_path / "photos", (64, 64), [200] * 10)
    memory(free)
    calibration = 2000 if "--calibration-images" in expected else 8
    adviser = Adviser(settings(folder, calibration_images=calibration, **given))
    with pytest.raises(ConfigError) as error:
        adviser.resolve(adviser.given)
    assert "\n" not in str(error.value)
    for part in expected:
        assert part in str(error.value)
    resumed = Adviser(settings(folder, calibration_images=calibration, **given), resume=True)
    config = resumed.resolve(resumed.given)  # settings of a resumed run stay
    assert any(level == logging.WARNING for level, _ in resumed.notes["teacher"])
    assert all(getattr(config, name) == value for name, value in given.items())


@pytest.mark.parametrize("resume", [True, None])
def test_a_phase_that_continues_keeps_its_batch_and_warns(tmp_path, memory, resume):
    folder = photos(tmp_path / "photos", (64, 64), [20] * 2)
    first = Adviser(settings(folder))
    config = first.resolve(first.given)
    run = tmp_path / "run"
    write_run(config, run / "teacher")
    (run / "teacher" / "last.pt").touch()
    memory(90_000_000)
    again = Adviser(TrainConfig(), run, resume=resume)
    given = {"task": "teacher"}
    assert resumed_plan(again, given, run) == (config,)
    (note,) = again.notes["teacher"]
    assert note[0] == logging.WARNING and "90 MB are free" in note[1]


def test_ranks_of_a_machine_share_its_memory(memory):
    memory(40_000_000_000)
    given = TrainConfig(task="teacher", dataset="imagenet", data_path="none")
    one, four = (Adviser(given, ranks=ranks).resolve(given).batch_size for ranks in (1, 4))
    assert four < one


def test_without_a_gpu_its_memory_is_unknown(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert free_bytes("cuda") is None


def test_free_memory_respects_control_groups(tmp_path):
    def write(path, text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    assert free_bytes("cpu", tmp_path) is None
    write("proc/meminfo", "MemTotal: 9000 kB\nMemAvailable:   8000 kB\n")
    assert free_bytes("cpu", tmp_path) == 8_192_000
    write("proc/self/cgroup", "0::/job/step\n")
    write("sys/fs/cgroup/job/step/memory.max", "max\n")
    write("sys/fs/cgroup/job/memory.max", "5000000\n")
    write("sys/fs/cgroup/job/memory.current", "3000000\n")
    write("sys/fs/cgroup/job/memory.stat", "anon 1\ninactive_file 500000\n")
    assert free_bytes("cpu", tmp_path) == 2_500_000
    write("proc/self/cgroup", "4:cpu,cpuacct:/\n3:memory:/box\n")
    write("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    write("sys/fs/cgroup/memory/memory.usage_in_bytes", "7\n")
    assert free_bytes("cpu", tmp_path) == 8_192_000
    write("sys/fs/cgroup/memory/box/memory.limit_in_bytes", "1000000\n")
    write("sys/fs/cgroup/memory/box/memory.usage_in_bytes", "2000000\n")
    assert free_bytes("cpu", tmp_path) == 0


# --- networks and their sizes ---


def test_every_network_says_its_sizes():
    for name, row in NETWORKS.items():
        low, high = row.sizes
        assert network_spec(name, resolutions=(high,)).min_resolution <= low < high
        assert size_warning(name, low) == size_warning(name, high) == "", name


def test_a_network_far_from_its_sizes():
    assert "compofa-medium" in size_warning("compofa-small", 64)
    assert "compofa-small" in size_warning("compofa", 32)
    spec = network_spec("compofa", 10, resolutions=(32,))
    assert warn_of_size(spec, 32, "net.pt").startswith("net.pt ")
    assert warn_of_size(spec, 160, "net.pt") == ""


def test_the_list_of_networks_says_what_they_are_for(capsys):
    done = called(tools, ["zoo", "--like", "compofa-medium"], capsys)
    line = next(line for line in done.out.splitlines() if line.startswith("compofa-medium "))
    row = NETWORKS["compofa-medium"]
    assert "{}-{} px".format(*row.sizes) in line and row.description in line


def test_an_evaluation_far_from_the_sizes_warns(few_digits, here, capsys, caplog):
    words = "--net compofa-digits --samples 1 --calibration-images 8 --device cpu --quiet"
    for size, warned in ((16, 0), (64, 1)):
        caplog.clear()
        done = called(evaluate, [*words.split(), "--image-size", str(size)], capsys)
        assert done.status == 0, done.err
        warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert len(warnings) == warned and all("compofa-medium" in text for text in warnings)


def test_a_far_network_is_named_before_training(tmp_path, memory):
    folder = photos(tmp_path / "photos", (64, 64), [20] * 2)
    adviser = Adviser(settings(folder, net="compofa-small"))
    adviser.resolve(adviser.given)
    warned = [text for level, text in adviser.notes["teacher"] if level == logging.WARNING]
    assert len(warned) == 1 and "compofa-medium" in warned[0]


def test_the_table_of_the_documentation():
    """``COMPOFA_WRITE_DOCS=1 pytest tests/test_own_images.py -k documentation`` writes it."""
    table, text = "\n".join(examples()), PAGE.read_text()
    begin, end = (text.index(f"<!-- {word} of the table -->") for word in ("begin", "end"))
    begin += len("<!-- begin of the table -->\n")
    if "COMPOFA_WRITE_DOCS" in os.environ:
        PAGE.write_text(f"{text[:begin]}{table}\n{text[end:]}")
    assert PAGE.read_text()[begin:].startswith(f"{table}\n<!-- end of the table -->")


# --- the whole ---


def test_from_photos_to_a_supernet(here, capsys, caplog):
    folder = photos(here / "photos", (20, 26), [20] * 3)
    quick = ["--epochs", "1", "--width-mult", "0.1", "--calibration-images", "8", "--quiet"]
    words = ["--dataset", "imagefolder", "--data-path", "photos", "--device", "cpu", *quick]
    caplog.set_level(logging.INFO)
    for task in ("teacher", "compound"):
        caplog.clear()
        done = called(main, ["--task", task, *words], capsys)
        assert done.status == 0, done.err
        lines = caplog.messages
        place = {word: next(i for i, line in enumerate(lines) if word in line)
                 for word in ("--net ", "--batch-size ", "epoch 1/1")}  # fmt: skip
        assert place["--net "] < place["--batch-size "] < place["epoch 1/1"]
        assert not any("--epochs " in line for line in lines)
    run = Path("runs/photos-compofa-small")
    nets = [load_checkpoint(run / name / "best.pt") for name in ("teacher", "compound-1")]
    assert {net.image_size for net in nets} == {16} and nets[1].network.space.size == 243
    assert plan(settings(folder, "progressive"), Adviser(settings(folder, "progressive")).resolve)
