"""Image files of any mode are decoded to RGB as by an image viewer, or refused with a reason."""

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from compofa.data.decoding import UnreadableImageError, decode_rgb


def test_every_mode_becomes_rgb(tmp_path):
    grey = np.tile(np.arange(0, 256, 16, dtype=np.uint8), (16, 1))
    picture = Image.fromarray(grey)
    for mode, suffix in [
        ("L", "png"), ("LA", "png"), ("RGBA", "png"), ("P", "png"), ("P", "gif.png"),
        ("CMYK", "tif"), ("1", "png"), ("RGB", "png"),
    ]:  # fmt: skip
        path = tmp_path / f"{mode}.{suffix}"
        options = {"format": "gif"} if suffix == "gif.png" else {}
        picture.convert(mode).save(path, **options)
        image = decode_rgb(path)
        assert image.mode == "RGB" and image.size == (16, 16)
        if mode != "1":
            assert np.abs(np.asarray(image)[..., 0].astype(int) - grey).max() <= 8
    # A palette with transparency, which makes Pillow warn.
    picture.convert("P").save(tmp_path / "t.png", transparency=bytes(range(256)))
    assert decode_rgb(tmp_path / "t.png").mode == "RGB"
    # 16 bit
    Image.fromarray(grey.astype(np.uint16) * 256).save(tmp_path / "deep.png")
    assert np.array_equal(np.asarray(decode_rgb(tmp_path / "deep.png"))[..., 0], grey)


GREY = np.tile(np.arange(0, 256, 16, dtype=np.uint8), (16, 1))


def decoded(path: Path) -> np.ndarray:
    return np.asarray(decode_rgb(path))


def refused(path: Path, *words: str) -> None:
    with pytest.raises(UnreadableImageError) as caught:
        decode_rgb(path)
    assert all(word in caught.value.reason for word in words), caught.value.reason


# --- depth ---


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_of_ambiguous_range_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(GREY.astype(np.uint16) * 16).save(path)  # 12 bits of 16: 14 levels of 255
    refused(path, "12")
    Image.fromarray(GREY.astype(np.uint16)).save(path)
    refused(path, "12")
    Image.fromarray(GREY.astype(np.uint16) * 257).save(path)
    assert np.array_equal(decoded(path)[..., 0], GREY)
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(path)
    assert decoded(path).max() == 0


def test_floating_point(tmp_path: Path) -> None:
    path = tmp_path / "x.tif"
    Image.fromarray(GREY.astype(np.float32) / 255).save(path)
    assert np.array_equal(decoded(path)[..., 1], GREY)
    for scale, offset in ((1, 0), (1 / 255, 0.5), (np.nan, 0), (-1 / 255, 0)):
        Image.fromarray((GREY * scale + offset).astype(np.float32)).save(path)
        refused(path, "floating-point")


def test_grey_images_of_other_types_are_refused(tmp_path: Path) -> None:
    Image.fromarray(GREY.astype(np.int32) * 1000).save(tmp_path / "x.tif")
    refused(tmp_path / "x.tif", "32", "240000")


def test_a_stated_range_is_used(tmp_path: Path) -> None:
    """PGM states the maximal value; a 12-bit TIFF packs its samples."""
    path = tmp_path / "x.pgm"
    deep = (GREY.astype(np.uint16) * 4).astype(">u2")
    path.write_bytes(b"P5 16 16 1020\n" + deep.tobytes())
    assert np.abs(decoded(path)[..., 0].astype(int) - GREY).max() <= 1
    packed = bytearray()
    for left, right in (GREY.astype(int) * 4095 // 255).reshape(-1, 2):
        packed += bytes((left >> 4, (left & 15) << 4 | right >> 8, right & 255))
    write_tiff(tmp_path / "x.tif", bytes(packed), {258: 12, 277: 1, 262: 1})
    assert np.abs(decoded(tmp_path / "x.tif")[..., 0].astype(int) - GREY).max() <= 1


def test_white_is_zero_tiffs_are_inverted(tmp_path: Path) -> None:
    deep = (GREY.astype("<u2") * 257).tobytes()
    write_tiff(tmp_path / "x.tif", deep, {258: 16, 277: 1, 262: 0})
    assert np.array_equal(decoded(tmp_path / "x.tif")[..., 0], 255 - GREY)


@pytest.mark.parametrize("shift", [8, 4, 0])
def test_colour_of_sixteen_bits(tmp_path: Path, shift: int) -> None:
    deep = np.repeat(GREY[..., None].astype("<u2"), 3, axis=2) << shift
    write_tiff(tmp_path / "x.tif", deep.tobytes(), {258: (16, 16, 16), 277: 3, 262: 2})
    if shift == 8:
        assert np.array_equal(decoded(tmp_path / "x.tif")[..., 2], GREY)
    else:
        refused(tmp_path / "x.tif", "12")


def write_tiff(path: Path, pixels: bytes, tags: dict) -> None:
    """Write a TIFF of 16 x 16 pixels that Pillow cannot write."""
    directory = ImageFileDirectory_v2()
    for tag, value in {256: 16, 257: 16, 259: 1, 278: 16, 273: 0, 279: len(pixels), **tags}.items():
        directory[tag] = value
    file = io.BytesIO()
    directory.save(file)  # followed by the pixels, at the offset in tag 273
    file.write(pixels)
    path.write_bytes(file.getvalue())


# --- orientation, transparency, frames ---


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_exif_orientation_is_applied(tmp_path: Path, suffix: str) -> None:
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :8], upright[8:, 24:] = (255, 0, 0), (0, 0, 255)
    lying = {  # stored pixels per EXIF orientation
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.swapaxes(0, 1), 6: np.rot90(upright), 7: np.rot90(upright, 2).swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }  # fmt: skip
    for orientation, pixels in lying.items():
        exif = Image.Exif()
        exif[274] = orientation
        path = tmp_path / f"{orientation}.{suffix}"
        options = {"webp": {"lossless": True}, "jpg": {"quality": 100}}.get(suffix, {})
        Image.fromarray(np.ascontiguousarray(pixels)).save(path, exif=exif, **options)
        found = decoded(path).astype(int)
        assert found.shape == upright.shape
        assert (
            np.abs(found - upright)[4, 4].max() < 40 and np.abs(found - upright)[12, 28].max() < 40
        )


def test_damaged_exif_is_ignored(tmp_path: Path) -> None:
    for number, exif in enumerate((b"Exif\0\0XX*\0\0", b"Exif\0\0II*\0\xff\0\0\0", b"Exif\0\0")):
        path = tmp_path / f"{number}.jpg"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Image.fromarray(GREY).save(path, exif=exif)
        assert decoded(path).shape == (16, 16, 3)


def test_transparent_images_are_composited_on_white(tmp_path: Path) -> None:
    ink = np.zeros((8, 8, 4), np.uint8)
    ink[2:6, 2:6, 3] = 255  # black on transparent: all black if alpha is dropped
    ink[0, 0] = (0, 0, 0, 128)
    picture = Image.fromarray(ink)
    picture.save(tmp_path / "rgba.png")
    picture.convert("LA").save(tmp_path / "la.png")
    picture.save(tmp_path / "rgba.webp", lossless=True, exact=True)
    for name in ("rgba.png", "la.png", "rgba.webp"):
        found = decoded(tmp_path / name)
        assert found[7, 7].tolist() == [255] * 3 and found[3, 3].tolist() == [0] * 3
        assert 126 <= found[0, 0, 0] <= 128
    palette = Image.fromarray(ink[..., 3] // 255).convert("P")
    palette.putpalette([9, 9, 9, 1, 2, 3])
    for name in ("p.png", "p.gif"):
        palette.save(tmp_path / name, transparency=0)
        found = decoded(tmp_path / name)
        assert found[7, 7].tolist() == [255] * 3 and found[3, 3].tolist() == [1, 2, 3]
    Image.new("RGB", (4, 4), (5, 6, 7)).save(tmp_path / "rgb.png", transparency=(5, 6, 7))
    assert decoded(tmp_path / "rgb.png").min() == 255


@pytest.mark.parametrize("suffix", ["gif", "tif", "webp", "png"])
def test_the_first_frame_is_decoded(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    options = {"lossless": True} if suffix == "webp" else {}
    path = tmp_path / f"x.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    with Image.open(path) as image:
        assert image.n_frames == 2
    assert decoded(path)[4, 4].tolist() == [255, 0, 0]


@pytest.mark.parametrize("mode", ["RGB", "P"])
def test_the_checksums_of_a_png_are_checked(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "x.png"
    Image.effect_noise((48, 48), 90).convert(mode).save(path)
    whole = path.read_bytes()
    assert decode_rgb("x", io.BytesIO(whole)).size == (48, 48)
    for damaged in (
        whole[:-200] + bytes(200),  # the last rows of pixels, and their CRC
        whole[:-17] + bytes([whole[-17] ^ 1]) + whole[-16:],
        whole[:-12],
    ):
        path.write_bytes(damaged)
        refused(path, "PNG")


def test_reasons_are_one_line_each(tmp_path: Path) -> None:
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("text")
    (tmp_path / "folder.png").mkdir()
    Image.effect_noise((64, 64), 50).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:999])
    for name, words in (
        ("empty", "empty"), ("text", "JPEG"), ("folder", "file"), ("gone", "No such"),
        ("cut", "runcated"),
    ):  # fmt: skip
        refused(tmp_path / f"{name}.png", words)
