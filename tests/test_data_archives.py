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
    """Two classes in two parts, beside files and folders to ignore."""
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
    """The same data set as a folder and as a tar file."""
    folder = fill(tmp_path / "data")
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        tar.add(folder, ".")
    return folder, tmp_path / "data.tar"


def contents(source: FilesSource) -> list[tuple[bytes, int, bytes]]:
    return [
        (bytes(source.paths[i]), int(source.targets[i]), source.load(i).tobytes())
        for i in range(len(source))
    ]


def test_a_tar_is_read_like_the_folder_in_it(both: tuple[Path, Path]) -> None:
    on_disk, in_tar = (load_dataset("imagefolder", path, validation_images=3) for path in both)
    assert on_disk.classes == in_tar.classes == ("a", "b")
    for part in ("train", "validation", "test"):
        expected, found = getattr(on_disk, part), getattr(in_tar, part)
        assert len(expected) and contents(found) == contents(expected)
    assert [len(in_tar.train), len(in_tar.validation), len(in_tar.test)] == [7, 3, 4]


def test_sources_are_picklable_and_resize(both: tuple[Path, Path]) -> None:
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


def test_other_files_are_refused_in_one_line(both: tuple[Path, Path], tmp_path: Path) -> None:
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
        assert "folder" in str(caught.value)


# --- damage and links ---


def write_tar(path: Path, *members: tuple[str, bytes | str, bytes]) -> Path:
    """Write members, given as name, content (or link target) and type."""
    with tarfile.open(path, "w") as tar:
        for name, content, kind in members:
            info = tarfile.TarInfo(name)
            info.type = kind
            if isinstance(content, str):
                info.linkname = content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


FILE, HARD, SYMBOLIC, FIFO = tarfile.REGTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE
DOG = ("dog/0.png", png(9), FILE)


def refused(path: Path, *words: str) -> None:
    with pytest.raises(DataError) as caught:
        read_classes(TarFolder.open(path), None)
    message = str(caught.value)
    assert "\n" not in message and path.name in message
    assert all(word in message for word in words), message


def test_every_changed_byte_of_a_header_is_detected(
    both: tuple[Path, Path], tmp_path: Path
) -> None:
    path = write_tar(
        tmp_path / "a.tar", *((f"{name}/{i}.png", png(i), FILE) for name in "ab" for i in range(3))
    )
    whole = path.read_bytes()
    expected = contents(read_classes(TarFolder.open(path), None)[1])
    with tarfile.open(path) as tar:
        headers = [member.offset for member in tar]
    generator = np.random.default_rng(0)
    noticed = 0
    for _ in range(300):
        place = int(generator.choice(headers)) + int(generator.integers(512))
        damaged = bytearray(whole)
        damaged[place] ^= int(generator.integers(1, 256))
        path.write_bytes(damaged)
        try:
            found = contents(read_classes(TarFolder.open(path), None)[1])
        except DataError as error:
            noticed += 1
            assert "\n" not in str(error)
        else:
            assert found == expected
    assert noticed > 280  # the others change padding of the checksum field


def test_truncated_and_concatenated_tars_are_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", ("cat/0.png", png(1), FILE), DOG)
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        second = tar.getmembers()[1]
    end = second.offset + 1024
    path.write_bytes(whole[: end + 1024])
    assert len(read_classes(TarFolder.open(path), None)[1]) == 2
    for content, words in [
        (whole[:end], "truncated"),  # no end
        (whole[: end - 1], "end"),
        (whole[: second.offset], "truncated"),
        (whole + whole, "end"),
        (whole[: second.offset] + bytes(512) + whole[second.offset + 512 :], "end"),
    ]:
        path.write_bytes(content)
        refused(path, words)


def test_links_are_resolved(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "a.tar",
        ("store/1.png", png(1), FILE),
        ("store/more/2.png", png(2), FILE),
        ("train/cat/hard.png", "store/1.png", HARD),
        ("train/cat/soft.png", "../../store/./more/2.png", SYMBOLIC),
        ("train/cat/twice.png", "soft.png", SYMBOLIC),
        ("train/cat/hard-soft.png", "train/cat/soft.png", HARD),
        ("train/dog", "../store", SYMBOLIC),
        ("val", "train", SYMBOLIC),
        ("train/cat/old.png", "nowhere", SYMBOLIC),
        ("train/cat/old.png", png(5), FILE),
    )
    root = TarFolder.open(path)
    for part in ("train", "val"):
        classes, source = read_classes(root / part, None)
        assert classes == ("cat", "dog")
        red = [source.load(i).getpixel((0, 0))[0] for i in range(len(source))]
        assert [source.path(i).rpartition(f"/{part}/")[2] for i in range(len(source))] == [
            "cat/hard-soft.png", "cat/hard.png", "cat/old.png", "cat/soft.png", "cat/twice.png",
            "dog/1.png", "dog/more/2.png",
        ]  # fmt: skip
        assert red == [2, 1, 5, 2, 2, 1, 2]
    unpacked = tmp_path / "unpacked"
    with tarfile.open(path) as tar:
        tar.extractall(unpacked, filter="data")
    assert contents(read_classes(unpacked / "val", None)[1]) == contents(source)


@pytest.mark.parametrize(
    ("member", "name"),
    [
        (("cat/x.png", "../../etc/x.png", SYMBOLIC), "cat/x.png"),
        (("cat/x.png", "/etc/x.png", SYMBOLIC), "cat/x.png"),
        (("cat/x.png", "y.png", SYMBOLIC), "cat/x.png"),
        (("cat/x.png", "../dog/0.png/more", SYMBOLIC), "cat/x.png"),
        (("cat/x.png", "x.png", SYMBOLIC), "cat/x.png"),
        (("cat/up", "..", SYMBOLIC), "cat"),
        (("cat/x.png", "cat/later.png", HARD), "cat/later.png"),
        (("cat/x.png", "dog", HARD), "dog"),
        (("cat/x.png", b"", FIFO), "cat/x.png"),
        (("../x.png", png(1), FILE), "../x.png"),
        (("dog", png(1), FILE), "dog"),
        (("dog/0.png/1.png", png(1), FILE), "dog/0.png"),
    ],
)
def test_unsupported_members_are_refused(tmp_path: Path, member, name: str) -> None:
    refused(write_tar(tmp_path / "a.tar", DOG, ("cat/0.png", png(1), FILE), member), name)


def test_sparse_files_are_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", DOG, ("cat/0.png", png(1), tarfile.GNUTYPE_SPARSE))
    refused(path, "cat/0.png", "sparse")
