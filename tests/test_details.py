import base64
import csv
import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_workers import together
from torch import nn

from compofa.data import BrokenImages, FilesSource, MemorySource, load_dataset
from compofa.details.folder import write_details
from compofa.details.outcomes import Observer, Outcomes
from compofa.details.page import EXAMPLES
from compofa.details.pictures import plot_confusion, plot_per_class
from compofa.details.tables import per_class
from compofa.distributed.backend import Backend, SingleProcess
from compofa.evaluate import Evaluator, measure_accuracy
from compofa.networks.zoo import network_spec
from compofa.nn.calibrate import calibrate
from compofa.nn.supernet import Supernet


def outcomes(classes: int, images: int, right: float = 0.7) -> Outcomes:
    """Return random outcomes, of which about a share of ``right`` is."""
    generator = np.random.default_rng(classes)
    targets = np.sort(generator.integers(0, classes, images))
    other = (targets + generator.integers(1, classes, images)) % classes
    predicted = np.where(generator.random(images) < right, targets, other)
    probabilities = generator.random((2, images), dtype=np.float32)
    return Outcomes(np.arange(images), targets, predicted, *probabilities)


def rows(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


# --- what is kept of an evaluation ---


class Logits(nn.Module):
    """Gives the logits that it is asked for: the images are the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, :, 0, 0] * self.scale


def test_outcomes_are_those_that_are_counted() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 7, generator=generator)
    logits[3] = 1  # all are largest
    targets = torch.randint(7, (40,), generator=generator)
    batches = list(zip(logits[:, :, None, None].split(15), targets.split(15), strict=True))
    observer = Observer()
    found = measure_accuracy(Logits(), batches, observe=observer)
    assert found == measure_accuracy(Logits(), batches)
    kept = observer.outcomes(np.arange(100, 140), SingleProcess())
    assert kept.top1 == found.top1
    probabilities = logits.softmax(1).numpy()
    assert kept.images.tolist() == list(range(100, 140))
    assert kept.targets.tolist() == targets.tolist()
    np.testing.assert_allclose(kept.probabilities, probabilities.max(1), rtol=1e-6)
    np.testing.assert_allclose(
        kept.true_probabilities, probabilities[np.arange(40), targets], rtol=1e-6
    )


def test_outcomes_are_the_same_on_all_ranks(few_digits, tmp_path, monkeypatch) -> None:
    """Unreadable images are left out, and each outcome stays with its image."""
    monkeypatch.setattr(BrokenImages, "limit", 1.0)
    splits = load_dataset("digits")
    paths = []
    for index, pixels in enumerate(splits.test.images):
        paths.append(f"{index}.png".encode())
        Image.fromarray(pixels.transpose(1, 2, 0)).save(tmp_path / f"{index}.png")
    for index in (4, 17):
        (tmp_path / f"{index}.png").write_bytes(b"no image")
    source = FilesSource(tmp_path, np.array(paths), splits.test.targets, 8)
    net = Supernet(network_spec("compofa-small", 10, width_mult=0.25, resolutions=(8,)), 5)
    subnet = net.spec.space.largest.at(8)
    net.classifier.weight.data *= 20
    generator = torch.Generator().manual_seed(0)
    network = calibrate(net, [torch.randn(20, 3, 8, 8, generator=generator)], subnet)

    def measure(backend: Backend | None) -> tuple[Any, Outcomes]:
        evaluator = Evaluator(splits, "test", batch_size=4, backend=backend)
        evaluator.source = source
        observer = Observer()
        accuracy = evaluator.accuracy(network, subnet, observer)
        return accuracy, evaluator.outcomes(observer)

    accuracy, alone = measure(None)
    assert alone.images.tolist() == [i for i in range(30) if i not in (4, 17)]
    assert alone.targets.tolist() == splits.test.targets[alone.images].tolist()
    assert alone.top1 == accuracy.top1 and len({*alone.predicted.tolist()}) > 1
    for ranks in (3, 29):  # of which some have no images that can be read
        for _, found in together(ranks, measure):
            assert found.images.tolist() == alone.images.tolist()
            assert found.predicted.tolist() == alone.predicted.tolist()
            np.testing.assert_allclose(found.probabilities, alone.probabilities, rtol=1e-4)


# --- tables ---


def test_figures_of_classes_by_hand() -> None:
    said = Outcomes(
        np.arange(6), np.array([0, 0, 0, 1, 1, 3]), np.array([0, 0, 1, 1, 0, 0]),
        np.ones(6, np.float32), np.zeros(6, np.float32),
    )  # fmt: skip
    assert said.confusion(4).tolist() == [[2, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    assert said.confused_pairs(4) == [(0, 1, 1), (1, 0, 1), (3, 0, 1)]
    cat, dog, owl, fox = per_class(said, ("cat", "dog", "owl", "fox"))
    assert (cat.images, cat.top1, cat.precision) == (3, pytest.approx(200 / 3), 50)
    assert cat.f1 == pytest.approx(2 / (1 / 50 + 3 / 200))
    assert (dog.images, dog.top1, dog.precision, dog.f1) == (2, 50, 50, 50)
    assert (owl.images, owl.top1, owl.precision) == (0, None, None), "nothing to take them of"
    assert (fox.images, fox.top1, fox.precision, fox.f1) == (1, 0, None, 0)


def test_the_folder(tmp_path) -> None:
    said = outcomes(3, 90)
    classes = ("cat", "a, b", "<script>alert(1)</script>")
    pixels = np.random.default_rng(0).integers(0, 256, (90, 3, 8, 8)).astype(np.uint8)
    source = MemorySource(pixels, said.targets)
    for _ in range(2):  # into the same folder
        write_details(tmp_path, said, classes, source, "test", "net & data")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"per_class.csv", "confusion.csv", "images.csv", "per_class.png",
                     "confusion.png", "images.html"}  # fmt: skip
    header, *table = rows(tmp_path / "per_class.csv")
    assert header == ["class", "images", "top1", "recall", "precision", "f1"]
    assert [row[0] for row in table] == [*classes] and sum(int(row[1]) for row in table) == 90
    header, *matrix = rows(tmp_path / "confusion.csv")
    assert header[1:] == [row[0] for row in matrix] == [*classes]
    assert [[int(x) for x in row[1:]] for row in matrix] == said.confusion(3).tolist()
    header, *images = rows(tmp_path / "images.csv")
    assert header == ["image", "true", "predicted", "probability", "true_probability"]
    assert len(images) == 90 and images[5][0] == "test[5]"
    assert [row[1] == row[2] for row in images] == said.right.tolist()


# --- the page ---


def test_the_page_is_safe_and_stands_alone(tmp_path) -> None:
    said = outcomes(3, 90)
    classes = ("cat", "dog", '<script>alert("1")</script>')
    pixels = np.random.default_rng(0).integers(0, 256, (90, 3, 8, 8)).astype(np.uint8)
    write_details(tmp_path, said, classes, MemorySource(pixels, said.targets), "test", "<b>net</b>")
    page = (tmp_path / "images.html").read_text()
    assert "<script" not in page and "<b>" not in page and "http:" not in page
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)[1]
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'"
    assert " style=" not in page and not re.search(r"\bon\w+=", page)
    assert "prefers-color-scheme: dark" in style and "width=device-width" in page
    pictures = re.findall(r"<img [^>]*>", page)
    assert all(' alt="' in each and 'src="data:image/' in each for each in pictures)
    wrong = int((~said.right).sum())
    assert len(pictures) == EXAMPLES + min(EXAMPLES, wrong) + EXAMPLES


def test_the_examples_are_the_extremes(tmp_path) -> None:
    said = outcomes(3, 90)
    pixels = np.zeros((90, 3, 8, 8), np.uint8)
    write_details(tmp_path, said, "abc", MemorySource(pixels, said.targets), "test", "net")
    page = (tmp_path / "images.html").read_text()
    right, wrong, unsure = (
        [int(each) for each in re.findall(r'title="test\[(\d+)\]"', part)]
        for part in page.split("<h2>")[1:]
    )
    sure = said.probabilities
    assert said.right[right].all() and not said.right[wrong].any()
    assert sure[right].min() >= np.delete(sure, right)[np.delete(said.right, right)].max()
    assert [*sure[wrong]] == sorted(sure[wrong], reverse=True)
    assert sorted(unsure) == sorted(np.argsort(sure)[:EXAMPLES].tolist())


def test_images_that_are_gone_are_left_out_of_the_page(tmp_path) -> None:
    said = outcomes(2, 4)
    paths = np.array([b"0.png", b"1.png", b"2.png", b"3.png"])
    Image.new("RGB", (300, 200)).save(tmp_path / "1.png")
    source = FilesSource(tmp_path, paths, said.targets)
    write_details(tmp_path / "out", said, ("cat", "dog"), source, "test", "net")
    page = (tmp_path / "out" / "images.html").read_text()
    assert page.count("<img") == 2 and page.count("unreadable") == 6


# --- pictures ---


@pytest.mark.parametrize("classes", [2, 10, 40, 200])
def test_pictures_of_any_number_of_classes(tmp_path, classes) -> None:
    said = outcomes(classes, 10 * classes)
    names = [f"class with a rather long name and $x_1$ {index}" for index in range(classes)]
    plot_confusion(tmp_path / "confusion.png", said, names)
    plot_per_class(tmp_path / "classes.png", per_class(said, names), said.top1)
    for name in ("confusion.png", "classes.png"):
        with Image.open(tmp_path / name) as image:
            assert image.format == "PNG" and max(image.size) < 2500, image.size
            assert len(set(image.convert("L").tobytes())) > 20, "something is drawn"


def test_a_perfect_network_confuses_nothing(tmp_path) -> None:
    said = outcomes(60, 120, right=1.0)
    plot_confusion(tmp_path / "confusion.png", said, [str(index) for index in range(60)])
    assert said.confused_pairs(60) == [] and said.top1 == 100
