"""The one door to trained networks: what it hands over, how often it reads and builds, and that
every option that takes a network takes every format, or refuses it for a reason of substance."""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from calls import Outcome, called
from test_model_zoo import NOTE10, put

import compofa
from compofa.cli import evaluate, tools, train
from compofa.data import Normalisation
from compofa.errors import CheckpointError, SpaceError
from compofa.io import checkpoint as checkpoints
from compofa.io.checkpoint import file_hash, load_checkpoint
from compofa.io.convert import save_as
from compofa.io.formats.names import from_ours
from compofa.io.open import open_network
from compofa.networks.network_spec import FixedNetwork
from compofa.networks.zoo import network_spec
from compofa.nn.extract import extract
from compofa.nn.supernet import Supernet
from nas.cli import search
from nas.cli import tools as nas_tools

pytestmark = pytest.mark.usefixtures("few_digits")

GOLDEN = Path(__file__).parent / "golden" / "v0.1"
SUPERNETS = ("own.pt", "ofa.pth", "razor.pth", "compofa-digits")
"""Files of one network in every format, and its id."""
SPECIALISED = ("special", "special/init", "single.pt")
PLAIN = "plain.pth"
"""Weights by OFA's names without a definition."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One network in every format, and a specialised network taken from it."""
    folder = tmp_path_factory.mktemp("networks")
    opened = open_network("compofa-digits")
    for name, format in (("own.pt", "compofa"), ("ofa.pth", "ofa"), ("razor.pth", "mmrazor")):
        save_as(folder / name, opened.checkpoint, format)
    subnet = opened.spec.space.smallest.at(16)
    single = replace(
        opened.checkpoint,
        network=FixedNetwork.of(opened.spec, subnet),
        weights=extract(opened.network, subnet).state_dict(),
    )
    save_as(folder / "special", single, "ofa")
    save_as(folder / "single.pt", single, "compofa")
    elastic = Supernet(network_spec("compofa-elastic-small", 10))
    torch.save({"state_dict": from_ours(elastic.state_dict(), 4, "ofa")}, folder / PLAIN)
    return folder


@pytest.fixture
def call(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., Outcome]:
    """Run a command in a folder of its own that holds links to the networks."""
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("COMPOFA_DOWNLOADS", "http://127.0.0.1:1/ofa")

    def run(main: Callable[[Sequence[str]], int], *words: str) -> Outcome:
        return called(main, words, capsys)

    return run


# --- what it hands over ---


@pytest.mark.parametrize(
    ("source", "format"), [*zip(SUPERNETS, ("compofa", "ofa", "mmrazor", "compofa"), strict=True)]
)
def test_every_format_hands_over_the_same(source: str, format: str, folder: Path) -> None:
    wanted = load_checkpoint(folder / "own.pt")
    opened = compofa.open_network(source if "." not in source else folder / source)
    assert isinstance(opened.network, Supernet) and not opened.network.training
    assert (opened.format, opened.spec) == (format, wanted.network)
    assert replace(opened.checkpoint, weights={}) == replace(wanted, weights={})
    assert (opened.classes, opened.image_size) == (tuple("0123456789"), 16)
    assert opened.normalisation == Normalisation(wanted.mean, wanted.std)
    assert opened.digest == file_hash(opened.path) and opened.files == (opened.path,)
    expected, found = wanted.build().state_dict(), opened.network.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_a_specialised_network_comes_with_its_files(folder: Path) -> None:
    for name in ("special", "special/init", "special/net.config"):
        opened = open_network(str(folder / name))
        assert isinstance(opened.spec, FixedNetwork) and opened.format == "ofa"
        assert [path.name for path in opened.files] == ["init", "net.config", "run.config"]
        assert opened.digest == file_hash(folder / "special" / "init")
        assert opened.network.specs == opened.spec.layers


def test_weights_without_a_definition_take_the_given_one(folder: Path) -> None:
    assert open_network(folder / PLAIN).spec == network_spec("compofa-elastic-small", 10)
    spec = network_spec("ofa-small", 1000, resolutions=(8, 16))
    for arch in (spec, "ofa-small"):
        opened = open_network(folder / PLAIN, arch=arch)
        assert opened.spec.space.stages == spec.space.stages
        assert opened.spec.classes == 10, "as many as the weights have"
    assert opened.spec.space.resolutions == (224,)
    with pytest.raises(CheckpointError, match=r"plain\.pth does not fit"):
        open_network(folder / PLAIN, arch="ofa-proxyless-small")
    with pytest.raises(SpaceError, match="'ofa-tiny'"):
        open_network(folder / PLAIN, arch="ofa-tiny")
    own = load_checkpoint(folder / "own.pt").network
    for name in ("own.pt", "ofa.pth"):  # what a file says of itself holds
        assert open_network(folder / name, arch="ofa-small").spec == own


def test_what_is_no_network_is_called_what_it_is(tmp_path: Path) -> None:
    os.symlink("loop", tmp_path / "loop")
    os.symlink("nowhere", tmp_path / "dangling")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, kind in (
        ("loop", "symbolic link .*Too many levels"),
        ("dangling", "symbolic link .*No such file"),
        ("pipe", "device, pipe or socket"),
        ("folder", "a folder"),
        ("missing.pt", "nothing there"),
    ):
        with pytest.raises(CheckpointError, match=kind) as caught:
            open_network(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(SpaceError, match=r"'compofa-digit'.*compofa-digits"):
        open_network("compofa-digit")
    with pytest.raises(CheckpointError, match=r"no weights ship for compofa-small.*compofa-digits"):
        open_network("compofa-small")


# --- how often it reads and builds ---

_opened: list[str] | None = None


def _note(event: str, args: tuple[object, ...]) -> None:
    if event == "open" and _opened is not None and isinstance(args[0], str | os.PathLike):
        _opened.append(os.path.realpath(args[0]))


sys.addaudithook(_note)


@pytest.fixture
def reads() -> Iterator[list[str]]:
    """Every file opened from here on."""
    global _opened
    _opened = []
    yield _opened
    _opened = None


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many networks are built: of files, and all supernets."""
    count: Counter[str] = Counter()

    def counting(name: str, function: Callable) -> Callable:
        def counted(*args: object, **kwargs: object) -> object:
            count[name] += 1
            return function(*args, **kwargs)

        return counted

    monkeypatch.setattr(checkpoints, "build", counting("files", checkpoints.build))
    monkeypatch.setattr(Supernet, "__init__", counting("supernets", Supernet.__init__))
    return count


EVALUATE = (evaluate.main, "--samples", "2", "--calibration-images", "20", "--quiet", "--net")
COMPOUND = (
    train.main, "--task", "compound", "--epochs", "1", "--quiet", "--device", "cpu", "--output",
    "run", "--teacher-path",
)  # fmt: skip


@pytest.mark.parametrize(
    ("command", "files", "built", "supernets"),
    [
        ((*EVALUATE, "own.pt"), ["own.pt"], 1, 1),
        ((*EVALUATE, "razor.pth"), ["razor.pth"], 1, 1),
        (
            (evaluate.main, "--quiet", "--net", "special"),
            ["special/init", "special/net.config", "special/run.config"],
            1,
            0,
        ),
        ((tools.main, "convert", "own.pt", "out", "--to", "ofa"), ["own.pt"], 1, 1),
        (
            (tools.main, "convert", "special", "out", "--to", "compofa"),
            ["special/init", "special/net.config", "special/run.config"],
            1,
            0,
        ),
        (
            (tools.main, "export", "own.pt", "smallest", "--to", "torchscript", "--no-calibrate"),
            ["own.pt"],
            1,
            1,
        ),
        ((*COMPOUND, "single.pt", "--init-path", "own.pt"), ["own.pt", "single.pt"], 2, 2),
        ((*COMPOUND, "own.pt"), ["own.pt"], 1, 2),
        (
            (
                search.main, "--net", "own.pt", "--target-hardware", "cpu", "--resolutions", "8",
                "--constraints", "1e9", "--quiet", "--compare", "none", "--accuracy-predictor",
                str(GOLDEN / "accuracy.npz"),
            ),
            ["own.pt"],
            1,
            1,
        ),
    ],
    ids=lambda value: " ".join(map(str, value[1:])) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_a_command_reads_and_builds_once(
    command: tuple, files: list[str], built: int, supernets: int,
    call: Callable[..., Outcome], folder: Path, reads: list[str], builds: Counter[str],
) -> None:  # fmt: skip
    done = call(*command)
    assert done.status == 0, done.err
    known = {os.path.realpath(path): path for path in folder.rglob("*")}
    found = [str(known[path].relative_to(folder)) for path in reads if path in known]
    assert sorted(path for path in found if (folder / path).is_file()) == files
    assert (builds["files"], builds["supernets"]) == (built, supernets)


# --- every option and every format ---

OPTIONS: dict[str, tuple] = {
    "evaluate --net": (evaluate.main, "--net", "NET", "--calibration-images", "20", "--quiet"),
    "export NET": (tools.main, "export", "NET", "--to", "torchscript", "--no-calibrate"),
    "convert IN": (tools.main, "convert", "NET", "out", "--to", "compofa"),
    "collect --net": (
        nas_tools.main, "collect", "--net", "NET", "--samples", "1", "--output", "r", "--quiet",
    ),
    "train --teacher-path": (*COMPOUND, "NET", "--init-path", "own.pt"),
    "train --init-path": (*COMPOUND, "single.pt", "--init-path", "NET"),
    "finetune --init-path": (
        train.main, "--task", "finetune", "--init-path", "NET", "--epochs", "1", "--quiet",
        "--device", "cpu", "--output", "run",
    ),
}  # fmt: skip
CHOSEN = {
    ("evaluate --net", "supernet"): ("--samples", "1"),
    ("evaluate --net", "plain"): ("--samples", "1", "--dataset", "digits", "--image-size", "16"),
    ("finetune --init-path", "supernet"): ("--subnet", "smallest"),
    ("finetune --init-path", "plain"): ("--subnet", "smallest", "--image-size", "16"),
}
"""Options beside it that choose the subnet, and what weights alone do not say."""
REFUSED = {
    ("train --init-path", "specialised"): "expected the weights of a supernet",
    ("train --init-path", "id"): "expected the weights of a supernet",
    ("train --teacher-path", "id"): "expected a teacher with 10 classes",
    ("collect --net", "plain"): "imagenet",
    ("collect --net", "specialised"): "expected a supernet",
    ("collect --net", "id"): "expected a supernet",
    ("evaluate --net", "id"): "imagenet",
}
"""Refusals for a reason of substance: one network is no supernet, another one does not fit, and
weights alone do not name their data set."""
KINDS = dict.fromkeys(SUPERNETS, "supernet") | dict.fromkeys(SPECIALISED, "specialised")
KINDS |= {PLAIN: "plain", NOTE10: "id"}


@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_takes_every_format(
    option: str, source: str, call: Callable[..., Outcome], tmp_path: Path
) -> None:
    kind = KINDS[source]
    if kind == "id":
        put(tmp_path / "torch" / "hub" / "checkpoints", NOTE10)
    main, *words = OPTIONS[option]
    words = [source if word == "NET" else word for word in words]
    if option == "export NET" and kind in ("supernet", "plain"):
        words.insert(2, "smallest")
    words += CHOSEN.get((option, kind), ())
    done = call(main, *words)
    reason = REFUSED.get((option, kind))
    assert done.status == (1 if reason else 0), done.err
    if reason:
        assert reason in done.err and done.err.count("\n") == 1
