import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from compofa.data import load_dataset
from compofa.data.archives import TarFolder
from compofa.data.decoding import UnreadableImageError
from compofa.data.folders import read_classes
from compofa.data.sources import FilesSource
from compofa.errors import DataError


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4), (value % 256, value // 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def fill(folder: Path) -> Path:
    """Two classes in two parts, with what else lies about in folders."""
    value = 0
    for part, each in (("train", 5), ("val", 2)):
        for name in ("b", "a"):
            for i in range(each):
                place = folder / part / name / ("deep" if i else "")
                place.mkdir(parents=True, exist_ok=True)
                (place / f"{i}.png").write_bytes(png(value := value + 1))
            (folder / part / name / "notes.txt").write_text("no image")
            (folder / part / name / ".hidden.png").write_bytes(b"")
        (folder / part / ".git").mkdir()
        (folder / part / ".git" / "x.png").write_bytes(b"")
        (folder / part / "README.png").write_bytes(b"")
    return folder


@pytest.fixture
def both(tmp_path: Path) -> tuple[Path, Path]:
    """The same as a folder and as a tar."""
    folder = fill(tmp_path / "data")
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        tar.add(folder, ".")
    return folder, tmp_path / "data.tar"


def contents(source: FilesSource) -> list[tuple[bytes, int, bytes]]:
    return [
        (bytes(source.paths[i]), int(source.targets[i]), source.load(i).tobytes())
        for i in range(len(source))
    ]


def test_a_tar_is_read_as_the_folder_it_holds(both: tuple[Path, Path]) -> None:
    on_disk, in_tar = (load_dataset("imagefolder", path, validation_images=3) for path in both)
    assert on_disk.classes == in_tar.classes == ("a", "b")
    for part in ("train", "validation", "test"):
        expected, found = getattr(on_disk, part), getattr(in_tar, part)
        assert len(expected) and contents(found) == contents(expected)
    assert [len(in_tar.train), len(in_tar.validation), len(in_tar.test)] == [7, 3, 4]


def test_sources_travel_to_workers_and_resize(both: tuple[Path, Path]) -> None:
    _, source = read_classes(TarFolder.open(both[1]) / "val", 3)
    copy = pickle.loads(pickle.dumps(source))
    images, kept, broken = copy.load_all(np.arange(4))
    assert (images.shape, kept, broken) == ((4, 3, 3, 3), [0, 1, 2, 3], ())
    assert np.array_equal(copy.subset(np.array([2])).load(0), source.load(2))


def test_broken_images_are_named(both: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "broken.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in (("a/0.png", png(1)), ("b/1.png", b"no image")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    _, source = read_classes(TarFolder.open(path), None)
    assert source.load(0).size == (5, 4)
    with pytest.raises(UnreadableImageError, match=r"broken\.tar/b/1\.png"):
        source.load(1)
    path.unlink()
    with pytest.raises(UnreadableImageError, match=r"broken\.tar/a/0\.png"):
        source.load(0)


def test_what_is_no_tar_of_images_is_one_line(both: tuple[Path, Path], tmp_path: Path) -> None:
    content = both[1].read_bytes()
    (tmp_path / "text.tar").write_text("not a tar")
    (tmp_path / "empty.tar").write_bytes(b"")
    (tmp_path / "cut.tar").write_bytes(content[:700])
    with tarfile.open(tmp_path / "packed.tar.gz", "w:gz") as tar:
        tar.add(both[0], ".")
    with tarfile.open(tmp_path / "none.tar", "w"):
        pass
    for name in ("text.tar", "empty.tar", "cut.tar", "packed.tar.gz", "none.tar"):
        with pytest.raises(DataError) as caught:
            load_dataset("imagefolder", tmp_path / name)
        assert "\n" not in str(caught.value) and name in str(caught.value)
        assert "expected a folder" in str(caught.value)
