"""pictures.py: every odd file is decoded as its golden says, or named in one line."""

import io
import json
import os
import socket
import struct
import subprocess
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from inputs.pictures import image_size, load_image
from tests.tools.environment import shared


def test_every_golden_image_decodes_so_or_is_named():
    images = shared("assets/images")
    files = json.loads((images / "golden_decode.json").read_text())["files"]
    assert len(files) > 100
    for name, golden in files.items():
        if "error" in golden:
            with pytest.raises(ValueError) as e:
                load_image(images / name)
            assert "\n" not in str(e.value) and type(e.value) is ValueError, name
            continue
        image = load_image(images / name)
        assert image.mode == "RGB" and list(image.size) == golden["transposed_size"], name
        assert list(image.getpixel((0, 0))) == golden["transposed_corner"], name
        mean = np.asarray(image, np.float64).mean((0, 1))
        assert np.abs(mean - golden["rgb_mean"]).max() < 1e-4, (
            name
        )  # the golden is rounded to 4 digits


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "empty file"),
        (b"\n<!DOCTYPE html><html>404</html>", "an HTML page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "an XML text"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "a Git LFS pointer"),
        (bytes(500), "only zero bytes"),
        (b"hello, I am text", "not an image"),
        (b"GIF89a\x00\x00\x10\x00\x00\x00\x00;", "a side of zero pixels"),
    ],
)
def test_a_file_that_is_no_image_is_named(tmp_path, content, reason):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        load_image(tmp_path / "a.jpg")


def test_missing_folder_truncated_and_absurd_images(tmp_path, monkeypatch):
    def reason(name):
        with pytest.raises(ValueError) as e:
            load_image(tmp_path / name)
        return str(e.value)

    assert reason("none.jpg") == "no such file or directory"
    assert reason("") == "is a directory"
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    for name in ("whole.jpg", "whole.png", "whole.webp"):
        noise.save(tmp_path / name)
        assert load_image(tmp_path / name).size == (64, 64)
        raw = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(raw[: len(raw) // 2])
        assert reason(name).startswith(("truncated", "damaged")), name
    Image.new("L", (1, 500)).save(tmp_path / "thin.png")
    Image.new("L", (1, 501)).save(tmp_path / "thinner.png")
    assert load_image(tmp_path / "thin.png").size == (1, 500)
    assert "1 x 501 pixels, a side ratio" in reason("thinner.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)  # Pillow only warns up to twice this
    assert "more than 400 pixels" in reason("thin.png")


def test_exif_turns_and_damaged_exif_does_not_matter(tmp_path):
    image = Image.new("RGB", (4, 2))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    image.save(tmp_path / "damaged.png", exif=b"Exif\0\0\xff\xff\xff\xff\0\0\0\x08")
    assert load_image(tmp_path / "turned.png").size == (2, 4)
    assert load_image(tmp_path / "damaged.png").size == (4, 2)


# ---- what a file may cost


def png(width, height):
    """Return a PNG of one bit a pixel, all black: a few kB, however large it is."""

    def chunk(kind, content):
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    line = bytes((width + 7) // 8 + 1)
    lines = zlib.compressobj(9)
    packed = b"".join(lines.compress(line) for _ in range(height)) + lines.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "WEBP", "PNG"])
def test_the_size_that_is_told_before_is_that_of_the_picture(kind, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    file = io.BytesIO()
    Image.new("RGB", (20, 32)).save(file, kind, exif=exif)
    told = []
    image = load_image(file.getvalue(), told.append)
    assert told == [image.size] and image_size(file.getvalue()) == image.size


def test_a_picture_is_refused_before_it_is_decoded(monkeypatch):
    def refuse(size):
        assert size == (64, 48)
        raise ValueError("too many pixels")

    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="^too many pixels$"):
        load_image(png(64, 48), refuse)
    with pytest.raises(ValueError, match="a side ratio over 500"):
        load_image(png(501, 1))


def test_formats_that_are_not_of_data_sets_are_not_opened(tmp_path, monkeypatch):
    """Pillow would start Ghostscript for PostScript."""
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("started a program"))
    monkeypatch.setattr(subprocess, "check_call", lambda *a, **k: pytest.fail("started a program"))
    for kind, what in (("EPS", "a PostScript file"), ("ICO", "not an image"), ("TGA", "not an")):
        Image.new("RGB", (32, 32)).save(tmp_path / "a.png", kind)
        with pytest.raises(ValueError, match=what):
            load_image(tmp_path / "a.png")
    with pytest.raises(ValueError, match="an SVG drawing"):
        load_image(b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>')


def test_a_jpeg_of_thousands_of_scans_and_a_tiff_of_one_huge_tile_are_refused():
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "JPEG", progressive=True)
    whole = file.getvalue()
    assert load_image(whole).size == (64, 64)
    with pytest.raises(ValueError, match="64 x 64 pixels in 3000[0-9]{3} scans"):
        load_image(whole + b"\xff\xda" * 3_000_000)

    side = 32_000  # the tile's; the picture has 64 x 64 pixels
    tags = {256: 64, 257: 64, 258: 8, 259: 8, 262: 1, 322: side, 323: side, 324: 200, 325: 99}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    tiff = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    packed = zlib.compress(bytes(64 * 64))
    with pytest.raises(ValueError, match="^a tile of 1024000000 pixels$"):
        load_image(tiff.ljust(200, b"\0") + packed)


@pytest.mark.parametrize("kind", ["fifo", "device", "socket", "folder"])
def test_only_regular_files_are_opened(tmp_path, kind):
    place = tmp_path / "a.png"
    if kind == "fifo":
        os.mkfifo(place)
    elif kind == "device":
        place.symlink_to("/dev/zero")
    elif kind == "folder":
        place.mkdir()
    else:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(place))
    with pytest.raises(ValueError, match="not a regular file|is a directory|no such device"):
        load_image(place)


@pytest.mark.parametrize("name", ["a\0b.png", "\ud83d.png", "x" * 5000])
def test_a_name_that_no_file_can_have_is_one_line(tmp_path, name):
    with pytest.raises(ValueError, match="^not a file name$|^file name too long$"):
        load_image(tmp_path / name)
