"""Training that starts from trained weights: definition, classes, inputs and teacher follow."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from few import AfterEpoch

from compofa.cli.train import main
from compofa.data import Normalisation, load_dataset
from compofa.errors import CheckpointError, CompofaError
from compofa.io.checkpoint import Checkpoint, file_hash, load_checkpoint, save_checkpoint
from compofa.io.formats.names import from_ours
from compofa.io.open import open_network
from compofa.networks.network_spec import FixedNetwork
from compofa.networks.supernet_spec import NetworkSpec
from compofa.networks.zoo import network_spec
from compofa.nn.extract import extract
from compofa.nn.supernet import Supernet
from compofa.training import start as starting
from compofa.training.config import TrainConfig
from compofa.training.recipes import RECIPES, REFERENCE_BATCH, Recipe, recipe_for
from compofa.training.run import RunResult, train
from compofa.training.transfer import normalisation_of, student_network

pytestmark = pytest.mark.usefixtures("few_digits")

TINY = {
    "epochs": 1, "image_size": (8,), "batch_size": 45, "calibration_images": 30, "threads": 1,
    "warmup_epochs": 0,
}  # fmt: skip
CLASSES = tuple("0123456789")
NORM = {"mean": (0.4,) * 3, "std": (0.2,) * 3}
HEAD = ("classifier.weight", "classifier.bias")


def spec_of(net: str, classes: int, **more: Any) -> NetworkSpec:
    return network_spec(net, classes, width_mult=0.1, resolutions=(8,), **more)


def save(path: Path, spec: NetworkSpec, **more: Any) -> Path:
    generator = torch.Generator().manual_seed(0)
    weights = Supernet(spec, seed=3).state_dict()
    for name, value in weights.items():
        if name.endswith("running_mean"):
            value.copy_(torch.randn(value.shape, generator=generator))
    save_checkpoint(path, Checkpoint(spec, weights, dataset="x", image_size=8, **NORM, **more))
    return path


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compound supernet for other classes and with other inputs than the digits'."""
    folder = tmp_path_factory.mktemp("letters")
    return save(folder / "letters.pt", spec_of("compofa-elastic-small", 3), classes=("a", "b", "c"))


@pytest.fixture(scope="module")
def free(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with every choice free."""
    folder = tmp_path_factory.mktemp("free")
    return save(folder / "free.pt", spec_of("ofa-small", 3), classes=("a", "b", "c"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher from trained weights is fine-tuned for two epochs, and none is trained else."""
    recipe = recipe_for("digits")
    phases = [replace(p, epochs=2) if p.task == "finetune" else p for p in recipe.phases]
    monkeypatch.setitem(RECIPES, "digits", Recipe(tuple(phases)))


def go(output: Path, init: Path | str | None, task: str = "compound", **more: Any) -> RunResult:
    resume = {name: more.pop(name) for name in ("resume", "callbacks", "overwrite") if name in more}
    config = TrainConfig(task=task, init_path=init and str(init), **{**TINY, **more})
    return train(config, output, bar=False, **resume)


def origins(path: Path) -> dict[str, Any]:
    return load_checkpoint(path).training["origins"]


# --- the classifier, in every task ---


@pytest.mark.parametrize(
    ("task", "phase"),
    [("teacher", 1), ("supernet", 1), ("compound", 1), ("compound", 2), ("kernel", 1),
     ("depth", 1), ("expand", 2), ("finetune", 1)],
)  # fmt: skip
def test_every_task_starts_from_weights_of_other_classes(free, tmp_path, caplog, task, phase):
    caplog.set_level(logging.INFO)
    more = {"subnet": "smallest"} if task == "finetune" else {}
    taught = task not in ("teacher", "supernet", "finetune")
    more |= {"kd_ratio": 0.0} if taught else {}
    result = go(tmp_path, free, task, phase=phase, lr=0.0, **more)
    found, before = load_checkpoint(result.last), load_checkpoint(free)
    assert [path.name for path in tmp_path.iterdir()] == [result.last.parent.name], "no teacher"
    assert found.classes == CLASSES and found.network.classes == 10
    assert found.normalisation == Normalisation(**NORM), "that of the weights"
    assert caplog.text.count("new classifier for 10 classes") == 1
    assert caplog.text.count("images are normalised with mean (0.4, 0.4, 0.4)") == 1
    name = "stem.conv.weight"
    assert torch.equal(found.weights[name], before.weights[name])
    assert found.weights[HEAD[0]].shape[0] == 10 and found.weights[HEAD[0]].std() > 0


def test_the_same_classes_in_another_order_keep_their_outputs(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    turned = tuple(reversed(CLASSES))
    path = save(tmp_path / "t.pt", spec_of("compofa-small", 10), classes=turned)
    last = go(tmp_path / "run", path, lr=0.0).last
    found, before = load_checkpoint(last).weights, load_checkpoint(path).weights
    for name in HEAD:
        assert torch.equal(found[name], before[name].flip(0)), name
    assert "outputs reordered" in caplog.text and "new classifier" not in caplog.text
    digest = [str(path), file_hash(path)]
    assert origins(last) == {"teacher": digest, "start": digest}, "it knows the classes"


def test_inputs_are_those_of_the_weights(tmp_path):
    splits = load_dataset("digits")
    own = open_network(save(tmp_path / "own.pt", spec_of("compofa-small", 3)))
    assert normalisation_of(own, "own.pt", splits) == Normalisation(**NORM)
    state = from_ours(Supernet(network_spec("compofa-small", 10)).state_dict(), 4, "ofa")
    torch.save({"state_dict": state}, tmp_path / "plain.pth")
    plain = open_network(tmp_path / "plain.pth")
    assert not plain.described
    assert normalisation_of(plain, "plain.pth", splits) == splits.normalisation, "nothing is known"


# --- the definition ---


def student(init: Path, task: str = "compound", **more: Any) -> NetworkSpec:
    config = TrainConfig(task=task, init_path=str(init), **{**TINY, **more}).resolved()
    assert config.net is None
    return student_network(open_network(init), str(init), config, 10)


def test_the_network_is_that_of_the_weights(letters, free, tmp_path):
    elastic = spec_of("compofa-elastic-small", 10, dropout=0.1)
    assert student(letters) == student(letters, "supernet") == elastic
    assert student(letters, fixed_kernel=True) == spec_of("compofa-small", 10)
    assert student(free) == student(free, "kernel") == spec_of("ofa-small", 10)
    assert student(free, heuristic="simple") == elastic
    assert student(letters, "teacher") == elastic.largest_only()
    # a teacher or an earlier phase was trained for less than this one
    teacher = save(tmp_path / "teacher.pt", spec_of("ofa-small", 10).largest_only())
    assert student(teacher) == spec_of("compofa-small", 10), "the default's choices"
    assert student(teacher, "kernel") == spec_of("ofa-small", 10)
    kernel = spec_of("ofa-small", 10)
    kernel = replace(kernel, space=kernel.space.restrict(depth=(4,), expand=(6,)))
    assert student(save(tmp_path / "kernel.pt", kernel), "depth") == spec_of("ofa-small", 10)


@pytest.mark.parametrize("net", ["compofa-elastic-small", "compofa-small"])
def test_a_compound_student_starts_from_a_free_space(free, tmp_path, net):
    """With and without kernel matrices: kernels go through those of the weights."""
    last = go(tmp_path, free, net=net, width_mult=0.1, kd_ratio=0.0, lr=0.0, phase=2).last
    found, source = load_checkpoint(last).build(), load_checkpoint(free).build()
    found.classifier = source.classifier
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found.load_state_dict(
        {k: v for k, v in source.state_dict().items() if "running" in k}, strict=False
    )
    subnet = found.spec.space.smallest.at(8)
    with torch.no_grad():
        torch.testing.assert_close(found(images, subnet), source(images, subnet))


def test_what_does_not_fit_is_one_line(letters, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    opened = open_network(letters)
    one = opened.spec.space.smallest.at(8)
    single = Checkpoint(
        FixedNetwork.of(opened.spec, one), extract(opened.network, one).state_dict(), image_size=8
    )
    save_checkpoint("one.pt", single)
    cases = [
        (["--init-path", "one.pt"], ["--init-path one.pt", "supernet", "specialised"]),
        (["--init-path", "one.pt", "--net", "compofa-small"], ["--init-path one.pt", "supernet"]),
        (["--init-path", str(letters), "--net", "ofa-proxyless-small"], ["does not fit"]),
        (["--init-path", str(letters), "--image-size", "4"], ["image size"]),
        (["--init-path", "no-such-id"], ["'no-such-id'"]),
        (["--init-path", "compofa-small"], ["no weights", "compofa-small"]),
    ]
    for words, said in cases:
        assert main(["--task", "compound", "--device", "cpu", "--quiet", *words]) == 1
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and all(part in err for part in said), err
        assert not Path("runs").exists() or not [*Path("runs").rglob("*.pt")]


# --- the teacher ---


def test_the_largest_subnet_teaches_after_it_was_fine_tuned(letters, tmp_path, quick, caplog):
    caplog.set_level(logging.INFO)
    result = go(tmp_path, letters)
    said = next(line for line in caplog.messages if "--epochs and --warmup-epochs" in line)
    assert "for compound-1 only" in said and "2 epochs" in said
    assert f"--task teacher --dataset digits --init-path {letters}" in said
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [
        "compound-1", "teacher"
    ]  # fmt: skip
    teacher = tmp_path / "teacher" / "best.pt"
    digest = [str(letters), file_hash(letters)]
    assert origins(tmp_path / "teacher" / "last.pt") == {"start": digest}
    first = json.loads((tmp_path / "teacher" / "config.json").read_text())["config"]
    rate = RECIPES["digits"].phase("finetune").base_lr * 45 / REFERENCE_BATCH
    assert (first["epochs"], first["lr"], first["net"]) == (2, rate, None)
    assert origins(result.last)["teacher"] == ["teacher/best.pt", file_hash(teacher)]
    assert load_checkpoint(teacher).normalisation == Normalisation(**NORM)
    assert load_checkpoint(result.last).normalisation == Normalisation(**NORM)
    # the student begins as its teacher, and with the kernel matrices of the initial weights
    begun = load_checkpoint(go(tmp_path, letters, overwrite=True, lr=0.0).last).weights
    taught, before = load_checkpoint(teacher).weights, load_checkpoint(letters).weights
    assert all(torch.equal(begun[name], taught[name]) for name in (*HEAD, "stem.conv.weight"))
    matrices = [name for name in before if ".matrices." in name]
    assert matrices and all(torch.equal(begun[name], before[name]) for name in matrices)
    # and no teacher of other weights is taken for theirs
    other = save(
        tmp_path / "other.pt", spec_of("compofa-elastic-small", 3), classes=("x", "y", "z")
    )
    with pytest.raises(CompofaError, match=r"teacher/best\.pt.*--init-path .*other\.pt"):
        go(tmp_path, other, overwrite=True)
    # without distillation no teacher is asked for
    go(tmp_path / "alone", letters, kd_ratio=0.0)
    assert [path.name for path in (tmp_path / "alone").iterdir()] == ["compound-1"]


class StopError(Exception):
    pass


@pytest.mark.parametrize("after", ["teacher", "compound"])
def test_resumed_is_uninterrupted(letters, tmp_path, quick, monkeypatch, after):
    whole = go(tmp_path / "whole", letters, epochs=2)

    def stop(epoch: int) -> None:
        raise StopError

    if after == "compound":
        with pytest.raises(StopError):
            go(tmp_path / "cut", letters, epochs=2, callbacks=[AfterEpoch(stop)])
    else:
        with monkeypatch.context() as patch:
            real = starting.build
            patch.setattr(starting, "build", lambda spec, seed: _stop_second(real, spec, seed))
            with pytest.raises(StopError):
                go(tmp_path / "cut", letters, epochs=2)
        assert (tmp_path / "cut" / "teacher" / "best.pt").exists()
    resumed = go(tmp_path / "cut", letters, epochs=2, resume=True)
    mine, other = (load_checkpoint(result.last) for result in (resumed, whole))
    assert all(torch.equal(value, other.weights[name]) for name, value in mine.weights.items())
    assert mine.network == other.network and mine.normalisation == other.normalisation


def _stop_second(real: Any, spec: NetworkSpec, seed: int) -> Any:
    if spec.space.size > 1:  # the student, after its teacher
        raise StopError
    return real(spec, seed)


def test_the_largest_subnet_teaches_as_it_is_if_it_knows_the_classes(tmp_path, monkeypatch):
    """With statistics of its own: a supernet's mix those of all subnets."""
    path = save(tmp_path / "digits.pt", spec_of("compofa-elastic-small", 10), classes=CLASSES)
    teachers = []
    real = starting.teacher_of
    monkeypatch.setattr(
        starting, "teacher_of", lambda *args: teachers.append(real(*args)) or teachers[-1]
    )

    def stop(epoch: int) -> None:
        raise StopError

    whole = go(tmp_path / "whole", path, epochs=2)
    assert [p.name for p in (tmp_path / "whole").iterdir() if p.is_dir()] == ["compound-1"]
    with pytest.raises(StopError):
        go(tmp_path / "cut", path, epochs=2, callbacks=[AfterEpoch(stop)])
    resumed = go(tmp_path / "cut", path, epochs=2, resume=True)
    mine, other = (load_checkpoint(result.last).weights for result in (resumed, whole))
    assert all(torch.equal(value, other[name]) for name, value in mine.items())
    stored = open_network(path)
    mixed = extract(stored.network, stored.spec.space.largest).state_dict()
    first, *again = (teacher.state_dict() for teacher in teachers)
    assert len(again) == 2
    for name, value in first.items():
        assert all(torch.equal(value, each[name]) for each in again), name
        assert torch.equal(value, mixed[name]) is ("running" not in name), name


def test_without_distillation_nothing_has_to_be_trained_before(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    for task in ("compound", "kernel"):
        last = go(tmp_path / task, None, task, kd_ratio=0.0, width_mult=0.1).last
        assert origins(last) == {} and f"{task}-1" == last.parent.name
        assert [path.name for path in (tmp_path / task).iterdir()] == [last.parent.name]
    assert caplog.text.count("random weights") == 2
    with pytest.raises(CompofaError, match="compound-1"):
        go(tmp_path / "later", None, phase=2, kd_ratio=0.0)


def test_trained_widths_stay_what_they_are(free, tmp_path):
    """Channels are sorted within the groups that the weights were trained for."""
    last = go(tmp_path, free, kd_ratio=0.0, lr=0.0).last
    found, before = load_checkpoint(last).build(), load_checkpoint(free).build()
    found.classifier = before.classifier
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    subnet = replace(before.spec.space.smallest, resolution=8)
    moved = before.state_dict()["stages.1.0.project.conv.weight"]
    assert not torch.equal(found.state_dict()["stages.1.0.project.conv.weight"], moved)
    for net in (found, before):
        net.train().dropout.p = 0.0
    with torch.no_grad():
        torch.testing.assert_close(found(images, subnet), before(images, subnet), atol=1e-4, rtol=0)


def test_a_published_id_starts_any_task(tmp_path):
    last = go(tmp_path, "compofa-digits", image_size=(16,)).last
    found = load_checkpoint(last)
    assert found.network.space == network_spec("compofa-small", 10, resolutions=(16,)).space
    with pytest.raises(CheckpointError, match="no weights ship"):
        go(tmp_path / "x", "ofa-small")
