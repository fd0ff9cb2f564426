"""pictures.py: every odd file is decoded as its golden says, or named in one line."""

import json

import numpy as np
import pytest
from PIL import Image

from inputs.pictures import load_image
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
