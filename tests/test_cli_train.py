import json
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from calls import Outcome, called
from PIL import Image

from compofa.cli.train import main, options_page, parser
from compofa.io.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from compofa.networks.zoo import network_spec
from compofa.nn.elastic import centre
from compofa.nn.supernet import Supernet
from compofa.training.config import TrainConfig
from compofa.training.recipes import RECIPES, SMALL_IMAGES, Recipe
from compofa.training.run import train
from compofa.training.trainer import Trainer

ROOT = Path(__file__).parent.parent
QUICK = shlex.split(
    "--epochs 1 --image-size 8 --batch-size 45 --dynamic-batch-size 1 --calibration-images 30 "
    "--width-mult 0.1 --device cpu --quiet"
)


@pytest.fixture(scope="module", autouse=True)
def quick(few_digits) -> Iterator[None]:
    """A teacher that is trained for one epoch."""
    teacher, *others = SMALL_IMAGES.phases
    cheap = Recipe((replace(teacher, epochs=1, warmup_epochs=0), *others), quick=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES, "digits", cheap)
        yield
    logging.captureWarnings(False)


@pytest.fixture
def call(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Outcome]:
    """The command in an empty folder of its own, as a function."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    return lambda *argv: called(main, argv, capsys)


def photos(folder: Path, per_class: int = 15, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            Image.new("RGB", (8, 8), (90 * number, i, 7)).save(folder / name / f"{i:02d}.png")
    return folder


# --- a run ---


def test_compound_trains_its_teacher_first(call):
    words = "--task compound --phase 1 --fixed_kernel --heuristic simple --price 2 --power 300"
    done = call(*words.split(), *QUICK, "--epochs", "2")
    assert done.status == 0, done.err
    run = Path("runs/digits-compofa-small")
    assert [path.name for path in sorted(run.iterdir())] == ["compound-1", "teacher"]
    for folder, epochs in ((run / "teacher", 1), (run / "compound-1", 2)):
        names = {path.name for path in folder.iterdir()}
        assert ("previous.pt" in names) == (epochs > 1)
        assert names - {"previous.pt"} == {
            "best.pt", "last.pt", "config.json", "metrics.jsonl", "summary.json", "tensorboard",
        }  # fmt: skip
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["epoch"] for line in lines] == list(range(epochs))
        assert [line["step"] for line in lines] == [2 * (epoch + 1) for epoch in range(epochs)]
        assert lines[-1]["train"].keys() == {"loss", "top1", "images_per_s", "lr", "skipped"}
        settings = json.loads((folder / "config.json").read_text())
        assert settings["config"].keys() == {field.name for field in fields(TrainConfig)}
        assert settings["network"]["classes"] == 10

    folder = run / "compound-1"
    summary = json.loads((folder / "summary.json").read_text())
    hours = summary["seconds"] / 3600
    assert summary["cpu_hours"] == pytest.approx(hours) and hours > 0
    assert summary["cost"] == pytest.approx(2 * hours)
    assert summary["co2_lbs"] == pytest.approx(hours * 0.3 * 1.58 * 0.954)
    assert summary["best"].keys() == {"smallest", "largest"}
    for word in ("smallest subnet: ", "largest subnet: ", "cpu hours", "cost", "co2 lbs"):
        assert word in done.out
    assert f"eval_sampled_config.py --net {folder / 'best.pt'}" in done.out
    checkpoint = load_checkpoint(folder / "best.pt")
    assert checkpoint.network.space.size == 243 and checkpoint.dataset == "digits"
    assert checkpoint.classes == tuple("0123456789") and checkpoint.image_size == 8
    assert load_checkpoint(run / "teacher" / "best.pt").network.space.size == 1

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "train/lr", "validation/largest/top1"} <= tags
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4]


def test_the_script(tmp_path):
    command = [sys.executable, "-W", "error", str(ROOT / "train_ofa_net.py"), "--task", "teacher"]
    settings = "--epochs=1 --image_size=8 --batch_size=256 --calibration-images 64 --name mine"
    done = subprocess.run(
        [*command, *settings.split(), "--device", "cpu"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("largest subnet: ")
    assert (tmp_path / "runs" / "mine" / "teacher" / "best.pt").exists()
    for part in ("1078", "359", "epoch 1/1: loss", "img_s="):
        assert part in done.stderr, "what it is about to do, how it went, and a bar meanwhile"


@pytest.mark.parametrize(
    ("heuristic", "size"), [("2:3,3:4", 2**5), ("none", (3**2 + 3**3 + 3**4) ** 5)]
)
def test_other_couplings(call, heuristic, size):
    done = call("--heuristic", heuristic, "--name", "own", *QUICK)
    assert done.status == 0, done.err
    checkpoint = load_checkpoint("runs/own/compound-1/best.pt")
    assert checkpoint.network.space.size == size
    depth = max(checkpoint.network.space.stages[0].depths)
    assert f"stages.4.{depth - 1}.project.bn.bias" in checkpoint.weights
    assert f"stages.4.{depth}.project.bn.bias" not in checkpoint.weights


def test_another_backbone(call):
    done = call("--net", "ofa-proxyless-small", "--name", "own", *QUICK)
    assert done.status == 0, done.err
    network = load_checkpoint("runs/own/compound-1/best.pt").network
    assert network.backbone.name == "proxyless_small_images" and network.kernel_transform
    assert network.space.largest.depths == (4, 4, 4, 4, 4, 1)


# --- teachers ---


def test_where_teachers_take_long_the_command_is_named(call, tmp_path):
    folder = photos(tmp_path / "my photos")
    words = ["--dataset", "imagefolder", "--data-path", str(folder), "--net", "compofa-small"]
    words += ["--heuristic", "2:3,3:4", "--fixed_kernel", "--output", "out dir", *QUICK]
    done = call(*words)
    assert done.status == 1 and done.err.count("\n") == 1
    assert "out dir/teacher/best.pt" in done.err and "--teacher-path" in done.err
    command = shlex.split(done.err[done.err.index("train_ofa_net.py --") :])[1:]
    assert not Path("out dir").exists()
    assert call(*command, *QUICK).status == 0, "the command that was named"
    elsewhere = call(*words, "--output", "other")
    assert elsewhere.status == 1 and "--output 'out dir' has one" in elsewhere.err
    assert call(*words).status == 0, "and with that teacher it goes on"
    assert load_checkpoint("out dir/compound-1/best.pt").classes == ("cat", "dog")


def test_the_second_phase_names_the_first(call):
    done = call("--phase", "2", *QUICK)
    assert done.status == 1 and done.err.count("\n") == 1
    assert "--task compound --phase 1" in done.err and "--init-path" in done.err


def save(path: Path, classes: int, net_id: str = "compofa-small") -> Path:
    spec = network_spec(net_id, classes, width_mult=0.1)
    save_checkpoint(path, Checkpoint(spec, Supernet(spec).state_dict()))
    return path


def test_a_teacher_with_other_classes(call, tmp_path):
    path = save(tmp_path / "teacher.pt", classes=7)
    done = call("--teacher-path", str(path), *QUICK)
    assert done.status == 1 and done.err.count("\n") == 1
    assert "10 classes" in done.err and "7" in done.err
    assert list(Path.cwd().iterdir()) == []


OFA = (  # how Once-for-All calls the parts; the order matters
    ("stem.", "first_conv."), ("first.", "blocks.0.mobile_inverted_conv."),
    ("final_expand.", "final_expand_layer."), ("mix.", "feature_mix_layer."),
    ("classifier.", "classifier.linear."), (".depthwise.", ".depth_conv."),
    (".project.", ".point_linear."), (".expand.bn", ".inverted_bottleneck.bn"),
    (".expand.conv", ".inverted_bottleneck.conv"), (".se.", ".depth_conv.se.fc."),
)  # fmt: skip


def as_ofa(name: str) -> str:
    if name.startswith("stages."):
        _, stage, block, rest = name.split(".", 3)
        index = 1 + 4 * int(stage) + int(block)
        name = f"blocks.{index}.mobile_inverted_conv.{rest}"
    for ours, theirs in OFA:
        if name.startswith(ours) or not ours[0].isalpha():
            name = name.replace(ours, theirs, 1)
    return name


def test_a_foreign_teacher_with_large_kernels(tmp_path):
    spec = replace(network_spec("ofa-small", 10, width_mult=0.1), kernel_transform=False)
    teacher = Supernet(spec, seed=5)
    path = tmp_path / "ofa_D4_E6_K7"
    torch.save({"state_dict": {as_ofa(k): v for k, v in teacher.state_dict().items()}}, path)
    config = TrainConfig(
        phase=2, teacher_path=str(path), init_path=str(path), lr=0.0, epochs=1, image_size=(8,),
        batch_size=45, dynamic_batch_size=1, calibration_images=30, width_mult=0.1,
    )  # fmt: skip
    result = train(config, tmp_path / "run", bar=False)
    found = load_checkpoint(result.last)  # of a run that learns nothing: what it began with
    checked = 0
    for name, value in teacher.named_parameters():
        mine = found.weights[name]
        if name.endswith("depthwise.conv.weight") and name.startswith("stages."):
            assert value.shape[-1] == 7 and mine.shape[-1] == (5 if name[7] in "14" else 3)
            value, checked = centre(value, mine.shape[-1]), checked + 1
        assert torch.equal(mine, value), name
    assert checked == 20


@pytest.mark.parametrize(
    "data",
    [
        {"state_dict": [1, 2]},
        {1: torch.ones(2)},
        {"classifier.linear.bias": 3},
        {"classifier.linear.bias": torch.tensor(1.0)},
        {"state_dict": {}},
        {"format": "other"},
        [torch.ones(2)],
    ],
)
@pytest.mark.parametrize("option", ["--teacher-path", "--init-path"])
def test_a_teacher_that_is_none(call, tmp_path, data, option):
    path, good = tmp_path / "x.pt", save(tmp_path / "good.pt", 10)
    torch.save(data, path)
    done = call("--teacher-path", str(good), option, str(path), *QUICK)
    assert done.status == 1 and done.err.count("\n") == 1
    assert str(path) in done.err and list(Path.cwd().iterdir()) == []


# --- bad input ---


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--dataset mnist", ["'mnist'", "fashion-mnist"]),
        ("--net resnet50", ["'resnet50'", "compofa-elastic"]),
        ("--task tacher", ["'tacher'", "teacher, compound"]),
        ("--phase 3", ["phase 1 or 2", "3"]),
        ("--heuristic deep", ["'deep'"]),
        ("--image-size 4", ["image size", "8 to 2048", "4"]),
        ("--width-mult 0", ["width multiplier"]),
        ("--resume", ["runs/digits-compofa-small/compound-1/last.pt"]),
        ("--teacher-path none.pt", ["none.pt"]),
        ("--device tpu", ["--device: ", "cpu, cuda or mps", "'tpu'"]),
        ("--dataset imagefolder", ["--data-path: ", "imagefolder"]),
        (
            "--dataset imagefolder --net compofa-small --data-path none --task teacher",
            ["none "],
        ),
        ("--validation-images 5000", ["validation images", "5000"]),
        ("--kd-type kl", ["--kd-type: ", "ce or mse", "'kl'"]),
        (
            "--epochs -1 --lr -2 --batch-size 0 --workers -3 --label-smoothing 2",
            ["--epochs", "--lr", "--batch-size", "--workers", "--label-smoothing"],
        ),
        ("--optimizer AdamW", ["--optimizer: did you mean adamw?", "'AdamW'"]),
        ("--logger mlfow", ["--logger: did you mean mlflow?", "'mlfow'"]),
        ("--task finetune --init-path compofa-digits --subnet larges", ["did you mean largest?"]),
        ("--epochs two", ["--epochs: ", "'two'"]),
        ("--image-size 8x8", ["--image-size: ", "'8x8'"]),
        ("--epoch 3", ["--epoch 3"]),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(call, words, expected):
    done = call(*QUICK, *words.split())
    assert done.status in (1, 2)
    assert done.err.count("\n") == 1 and done.err.endswith("\n") and done.out == ""
    assert done.err.startswith("train_ofa_net.py: error: ")
    for part in expected:
        assert part in done.err
    assert list(Path.cwd().iterdir()) == []


def test_a_class_without_images(call, tmp_path):
    folder = photos(tmp_path / "photos")
    (folder / "owl").mkdir()
    words = ["--dataset", "imagefolder", "--net", "compofa-small", "--task", "teacher"]
    done = call(*words, "--data-path", str(folder), *QUICK)
    assert done.status == 1 and done.err.count("\n") == 1
    assert str(folder / "owl") in done.err
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize("place", ["runs", "runs/digits-compofa-small/compound-1"])
def test_an_unwritable_folder_is_found_before_training(call, place, monkeypatch):
    monkeypatch.setattr(Trainer, "train_epoch", lambda *args: pytest.fail("began to train"))
    Path(place).parent.mkdir(parents=True, exist_ok=True)
    Path(place).write_text("in the way")
    done = call(*QUICK)
    assert done.status == 1 and done.err.count("\n") == 1
    assert "runs" in done.err
    assert Path(place).read_text() == "in the way"


def test_an_existing_run_is_refused(call):
    Path("runs/digits-compofa-small/teacher").mkdir(parents=True)
    Path("runs/digits-compofa-small/teacher/last.pt").write_bytes(b"")
    done = call("--task", "teacher", *QUICK)
    assert done.status == 1 and done.err.count("\n") == 1
    assert "--resume" in done.err and "--overwrite" in done.err


# --- options ---


def test_hyphens_and_underscores_alike():
    hyphens = "--data-path a_b --kd-type=mse --no-fixed-kernel --image-size 8,12 --batch-size 3"
    underscores = "--data_path a_b --kd_type=mse --no_fixed_kernel --image_size 8,12 --batch_size 3"
    one, other = (parser().parse_args(words.split()) for words in (hyphens, underscores))
    assert one == other and one.data_path == "a_b" and one.fixed_kernel is False
    assert one.image_size == (8, 12)


def test_every_setting_has_its_option_with_the_same_default():
    args = vars(parser().parse_args([]))
    for field in fields(TrainConfig):
        assert field.name in args, field.name
        if field.name != "device":
            assert args[field.name] == field.default, field.name


def test_the_page_of_options_is_that_of_the_command():
    """``COMPOFA_WRITE_DOCS=1 pytest tests/test_cli_train.py -k page_of_options`` writes it."""
    page = ROOT / "docs" / "options.md"
    if "COMPOFA_WRITE_DOCS" in os.environ:
        page.write_text(options_page())
    assert page.read_text() == options_page()


def test_help_is_quick():
    program = (
        "import sys\nsys.argv = ['train_ofa_net.py', '--help']\n"
        "from compofa.cli.train import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "print([m for m in ('torch', 'sklearn', 'tqdm', 'PIL') if m in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.endswith("[]\n") and done.stderr == ""
    assert "--teacher-path FILE" in done.stdout and "(default: digits)" in done.stdout
