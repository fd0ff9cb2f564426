"""Fuzz what comes in as data: rows in all containers, pictures, videos, and indexes beside them.

    python -m tests.tools.fuzz.data --count 500 --seed 0

Each case makes a file that is a good one with a few changes, and then does with it what
`data.py check` and training do. A row is refused with one line, or makes a sample whose tensors
have the shapes that the tiling promises.
"""

from __future__ import annotations

import csv
import io
import json
import os
import random
import struct
import tarfile
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data
from config import Stage, Train, UserError
from inputs import index
from inputs.image_processor import ImageProcessor
from inputs.rows import open_rows
from inputs.sample import SampleSpec
from inputs.shards import shard
from inputs.templates import byte_tokenizer
from inputs.tiling import MODES
from packing import IMAGE_TOKEN
from tests.tools.fuzz import ODD, Case, Violation, main, mutate, mutate_bytes, odd_json
from tests.tools.sample_rows import make_sample, row
from training.check import check_rows

PICTURES = {
    "JPEG": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "AVIF": "avif",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tif",
    "PPM": "ppm",
    "JPEG2000": "jp2",
    "EPS": "eps",
    "TGA": "tga",
    "ICO": "ico",
}
FILMS = {"mp4": "mpeg4", "mkv": "mpeg4", "avi": "mpeg4", "webm": "libvpx", "ts": "mpeg2video"}

# What a film is not, and what FFmpeg would follow to other files and addresses.
PLAYLISTS = {
    "m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{url}\n#EXT-X-ENDLIST\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
    "m=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    "concat": "ffconcat version 1.0\nfile '{url}'\n",
    "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period>'
    "<AdaptationSet><Representation><BaseURL>{url}</BaseURL></Representation></AdaptationSet>"
    "</Period></MPD>",
}


# ------------------------------------------------------------------------------------- good files


@cache
def spec(mode: str, crop: bool) -> SampleSpec:
    """Return a small spec of an image mode, with the processor of CLIP or of SigLIP."""
    processor = ImageProcessor(24, crop=24 if crop else 0)
    grids = ((1, 2), (2, 1), (2, 2)) if MODES[mode].tiled else ()
    views = MODES[mode](9, processor=processor, grids=grids, frames=3)
    return SampleSpec(byte_tokenizer(), "plain", 4096, views)


@cache
def picture(kind: str, turn: int) -> bytes:
    """Return the bytes of a picture file of a format; `turn` is the orientation in its EXIF."""
    pixels = np.random.default_rng(0).integers(0, 255, (20, 32, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    if kind == "GIF":
        image = image.quantize(16)
    file = io.BytesIO()
    options = {}
    if turn > 1 and kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        exif = Image.Exif()
        exif[0x0112] = turn
        options["exif"] = exif
    if kind in ("GIF", "WEBP", "PNG", "TIFF") and turn % 2:
        options |= {"save_all": True, "append_images": [image.rotate(180)] * 3}
    image.save(file, kind, **options)
    return file.getvalue()


@cache
def film(ending: str) -> bytes:
    """Return the bytes of a film of 12 frames; b"" if this FFmpeg cannot write one."""
    import av

    if FILMS[ending] not in av.codecs_available:
        return b""
    file = io.BytesIO()
    form = {"mkv": "matroska", "ts": "mpegts"}.get(ending, ending)
    with av.open(file, "w", format=form) as out:
        stream = out.add_stream(FILMS[ending], rate=25)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for i in range(12):
            pixels = np.full((32, 48, 3), 20 * i, np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode())
    return file.getvalue()


# ------------------------------------------------------------------------------------- what is run


def use(file: Path, mode: str = "square", crop: bool = False):
    """Make the sample of every row of a file, twice: measured, and with its pixels."""
    rows = open_rows(file)
    chosen = spec(mode, crop)
    refused = None
    for i in range(min(len(rows), 8)):
        try:
            sample = make_sample(rows, i, chosen)
        except UserError as e:
            refused = e
            continue
        positions = sum(chosen.views.positions(item.shape) for item in sample.items)
        if int((sample.ids == IMAGE_TOKEN).sum()) != positions:
            raise Violation(f"row {i} has not {positions} image positions")
        for item in sample.items:
            side = chosen.views.processor.side
            if item.pixels.shape != (item.shape.views, 3, side, side):
                raise Violation(f"row {i}: pixels of {tuple(item.pixels.shape)}")
        measured = make_sample(rows, i, chosen, pixels=False)
        if not torch.equal(measured.ids, sample.ids):
            raise Violation(f"row {i} is counted in another way than it is made")
    if refused:
        raise refused


def check(file: Path):
    """Check a file as the command does, in this process, and train a step on it."""
    rows = open_rows(file)
    chosen = spec("square", False)
    bad = check_rows(rows, chosen)
    steps = data.Steps(rows, chosen, Stage(global_batch=len(rows)), Train(on_bad_row="skip"))
    step = steps[0]
    if bad != len(set(step.skipped)) and bad < len(rows):
        raise Violation(f"check finds {bad} bad rows, training {len(set(step.skipped))}")
    if step.error and bad < len(rows):
        raise Violation(step.error)


# ------------------------------------------------------------------------------------------- cases


def case_of_rows(rng: random.Random, folder: Path) -> Case:
    """Make a file of rows of which some values are wrong, or whose bytes are."""
    (folder / "a.jpg").write_bytes(picture("JPEG", 1))
    rows = [row(i, image="a.jpg") for i in range(3)]
    way = rng.choice(("value", "value", "value", "bytes", "text"))
    ending = rng.choice(("json", "jsonl"))
    what = ""
    if way == "value":
        odd = (*ODD, "../a.jpg", "/dev/zero", "data:image/png;base64,AA", "a\0b", "\x9b31m" * 9)
        for _ in range(rng.randint(1, 3)):
            rows, change = mutate(rows, rng, odd)
            what += f"{change}; "
            if not isinstance(rows, list):
                break

    if ending == "json" or not isinstance(rows, list):
        content = json.dumps(rows).encode()
    else:
        content = "\n".join(json.dumps(one) for one in rows).encode()
    if way == "bytes":
        content, what = mutate_bytes(content, rng)
    elif way == "text":
        content, what = odd_json(rng)
        if rng.random() < 0.5:
            content = b"[" + content + b"]"
    content = content.decode("utf-8", "surrogateescape").encode("utf-8", "surrogateescape")

    file = folder / f"rows.{ending}"
    file.write_bytes(content)
    return Case(f"rows, {way}", f"{ending}: {what[:200]}", partial(check, file))


def case_of_picture(rng: random.Random, folder: Path) -> Case:
    """Make a picture whose bytes or sizes are wrong, and a row that names it."""
    kind = rng.choice(sorted(PICTURES))
    content = picture(kind, rng.randint(1, 8))
    what = "whole"
    for _ in range(rng.randint(0, 3)):
        content, what = mutate_bytes(content, rng)
    if rng.random() < 0.3:
        content, what = lie_about_size(content, rng)
    name = f"a.{PICTURES[kind]}"
    (folder / name).write_bytes(content)
    (folder / "rows.json").write_text(json.dumps([row("x", image=name)]))
    mode = rng.choice(("square", "pad", "tiles", "anyres", "anyres_max"))
    run = partial(use, folder / "rows.json", mode, rng.random() < 0.5)
    return Case(f"picture, {kind}", f"{mode}, {what}", run)


def lie_about_size(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Return a picture file in which one of the two sizes, wherever it is written, is another."""
    old = rng.choice((20, 32))
    new = rng.choice((0, 1, 500, 20_000, 65_535, 2**31 - 1, 2**32 - 1))
    form = rng.choice((">H", "<H", ">I", "<I"))
    new %= 256 ** struct.calcsize(form)
    found = content.replace(struct.pack(form, old), struct.pack(form, new), rng.choice((1, 9)))
    return found, f"{old} is {new} as {form}"


def case_of_film(rng: random.Random, folder: Path) -> Case:
    """Make a film whose bytes are wrong, or a list of other files with the name of a film."""
    ending = rng.choice(sorted(FILMS))
    content = film(ending)
    what = "whole"
    if rng.random() < 0.2:
        what = rng.choice(sorted(PLAYLISTS))
        url = rng.choice(("http://127.0.0.1:9/x.ts", "/etc/passwd", "udp://127.0.0.1:5004"))
        content = PLAYLISTS[what].format(url=url).encode()
    elif rng.random() < 0.2:
        size = rng.choice((b"stsz", b"stts", b"stsc", b"mvhd", b"tkhd", b"mdhd", b"elst", b"hdlr"))
        at = content.find(size) + 4 * rng.randint(1, 6)
        content = (
            content[:at] + rng.choice((b"\xff" * 4, bytes(4), b"\x7f" * 4)) + content[at + 4 :]
        )
        what = f"{size!r} at {at}"
    else:
        for _ in range(rng.randint(0, 3)):
            content, what = mutate_bytes(content, rng)
    (folder / f"a.{ending}").write_bytes(content)
    made = row("x", image=None)
    made["video"] = f"a.{ending}"
    (folder / "rows.json").write_text(json.dumps([made]))
    return Case(f"film, {ending}", what, partial(use, folder / "rows.json", "pad"))


def case_of_shard(rng: random.Random, folder: Path) -> Case:
    """Make a shard whose bytes, sizes, types or names are wrong."""
    file = folder / "a.tar"
    with tarfile.open(
        file, "w", format=rng.choice((tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT))
    ) as t:
        for i in range(3):
            text = json.dumps(row(i, image=["a.jpg", "b.jpg"], text="<image><image>")).encode()
            for name, content in (
                (f"{i}.json", text),
                (f"{i}.0.jpg", picture("JPEG", 1)),
                (f"{i}.1.jpg", picture("JPEG", 6)),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                t.addfile(info, io.BytesIO(content))
    content = file.read_bytes()
    if rng.random() < 0.5:
        content, what = change_header(content, rng)
    else:
        content, what = mutate_bytes(content, rng)
    file.write_bytes(content)
    return Case("shard", what, partial(use, file))


def change_header(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Return a tar file with one field of one member's header changed, its check sum mended."""
    headers = [at for at in range(0, len(content), 512) if content[at + 257 : at + 262] == b"ustar"]
    at = rng.choice(headers)
    header = bytearray(content[at : at + 512])
    field = rng.choice(("size", "size", "type", "name"))
    if field == "size":
        value = rng.choice((b"77777777777\0", b"0" * 11 + b"\0", b"\xff" * 12, b"00000000777\0"))
        value = rng.choice((value, b"\x80" + bytes(7) + b"\xff" * 4, b"\xff" * 10 + b"\xfe\x00"))
        header[124:136] = value
    elif field == "type":
        value = bytes([rng.choice(b"0123456789xgLKSDVMN\0")])
        header[156:157] = value
    else:
        names = ("../../x.json", "a.json", "\u00b2.\u00b2.jpg", "9" * 90 + ".jpg", ".json", "/", "")
        value = rng.choice(names).encode()[:100]
        header[:100] = value.ljust(100, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return content[:at] + bytes(header) + content[at + 512 :], f"{field} {value!r} at {at}"


CONTAINERS = ("csv", "tsv", "metadata.csv", "metadata.jsonl", "captions", "tar", "parquet")


def case_of_container(rng: random.Random, folder: Path, kind: str = "") -> Case:
    """Write captioned pictures in a container, of which some values, names or bytes are wrong.

    Every row has a picture, so a sample without one has lost it.
    """
    kind = kind or rng.choice(CONTAINERS)
    home = folder / "rows"
    home.mkdir()
    rows = []
    for i in range(3):
        (home / f"{i}.jpg").write_bytes(picture("JPEG", 1 + i))
        rows.append({"file_name": f"{i}.jpg", "text": f'a "dog", {i};\n'})
    what = ""
    if rng.random() < 0.6:
        rows, what = mutate(
            rows, rng, (*ODD, "../a.jpg", '"', "a,b", "a\0b", "\r", "\t", "x" * 10**6)
        )
    given = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    file = write_container(kind, home, given)

    # Then the bytes of what was written, or what lies beside it.
    way = rng.choice(("none", "none", "bytes", "bytes", "header", "gone", "other"))
    if way == "bytes":
        content, change = mutate_bytes(file.read_bytes(), rng)
        file.write_bytes(content)
        what += f"; {change}"
    elif way == "header":
        content = file.read_bytes()
        line = rng.choice((b"", b'"', b"a,b\n", b"\xef\xbb\xbf", b"\n\n", b"sep=;\n", b",", b"\0"))
        file.write_bytes(line + content[rng.choice((0, 0, 1, 10)) :])
        what += f"; begins with {line!r}"
    elif way == "gone":
        (home / f"{rng.randrange(3)}.jpg").unlink(missing_ok=True)
    elif way == "other":
        name = rng.choice(("x.json", "more.jsonl", "train.csv", "test.tsv", "z.parquet", "z.tar"))
        (home / name).write_bytes(
            rng.choice((b"", b"{}", b"[]", b"image,text\n0.jpg,x\n", b"PAR1"))
        )
        what += f"; {name} beside it"
    is_folder = kind.startswith(("metadata", "captions")) or rng.random() < 0.3
    run = partial(use_pictures, home if is_folder else file)
    return Case(f"container, {kind}", f"{way} {what[:200]}", run)


def write_container(kind: str, home: Path, rows: list[dict]) -> Path:
    """Write rows of file_name and text in a container, and return a file of it."""
    texts = [str(row.get("text", "")).encode("utf-8", "replace") for row in rows]
    if kind in ("csv", "tsv", "metadata.csv"):
        file = home / (kind if "." in kind else f"rows.{kind}")
        with open(file, "w", encoding="utf-8", errors="replace", newline="") as lines:
            table = csv.writer(lines, "excel-tab" if kind == "tsv" else "excel")
            table.writerow(rows[0] if rows else ["file_name", "text"])
            table.writerows(row.values() for row in rows)
        return file

    if kind == "metadata.jsonl":
        (home / kind).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return home / kind

    if kind == "captions":
        for i, text in enumerate(texts):
            (home / f"{i}.txt").write_bytes(text)
        (home / "0.txt").touch()
        return home / "0.txt"

    if kind == "parquet":
        return write_parquet(home, rows)

    with tarfile.open(home / "rows.tar", "w") as tar:
        for i, (row, text) in enumerate(zip(rows, texts, strict=True)):
            said = {name: value for name, value in row.items() if name != "file_name"}
            for name, content in (
                (f"{i}.jpg", picture("JPEG", 1)),
                (f"{i}.json", json.dumps(said).encode()),
                (f"{i}.txt", text),
                (f"{i}.cls", b"7"),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return home / "rows.tar"


def write_parquet(home: Path, rows: list[dict]) -> Path:
    """Write rows with the bytes of their pictures; as JSON lines where they fit no columns."""
    import pyarrow
    from pyarrow import parquet

    made = []
    for i, one in enumerate(rows):
        shown = {"bytes": picture("JPEG", 1 + i), "path": one.get("file_name")}
        others = {name: value for name, value in one.items() if name != "file_name"}
        made.append({**others, "image": shown})
    try:
        parquet.write_table(pyarrow.Table.from_pylist(made), home / "rows.parquet")
    except Exception:
        return write_container("metadata.jsonl", home, rows)
    return home / "rows.parquet"


def use_pictures(path: Path):
    """Make every sample, and look for one that has lost its picture."""
    rows = open_rows(path)
    print(rows.recognised)
    refused = None
    for i in range(min(len(rows), 8)):
        try:
            sample = make_sample(rows, i, spec("square", False))
        except UserError as e:
            refused = e
            continue
        if not sample.items:
            raise Violation(f"row {i} is trained without a picture: {dict(rows[i])}"[:300])
    if refused:
        raise refused


def case_of_index(rng: random.Random, folder: Path) -> Case:
    """Make an index that is damaged or another file's: the rows must be those of their file."""
    rows = [row(i, "x" * rng.randint(1, 50), image=None) for i in range(6)]
    file = folder / rng.choice(("rows.json", "rows.jsonl"))
    if file.suffix == ".json":
        file.write_text(json.dumps(rows))
    else:
        file.write_text("\n".join(json.dumps(one) for one in rows))

    run = partial(read_with_index, file, rows, rng.random(), rng.randrange(2**32))
    return Case("index", file.suffix, run)


def read_with_index(file: Path, rows: list[dict], way: float, seed: int):
    """Write the file's index, change it, and open the rows again."""
    index.SMALL = 0  # in this process, which ends with the case
    open_rows(file)
    saved = Path(f"{file}.index")
    content = saved.read_bytes()
    rng = random.Random(seed)
    if way < 0.7:
        saved.write_bytes(mutate_bytes(content, rng)[0])
    elif way < 0.8:
        saved.unlink()
        os.mkfifo(saved)
    elif way < 0.9:
        np.save(str(saved) + ".npy", np.array(rng.choice([[1], [[1.5] * 3], [["x"] * 3], 7])))
        os.replace(str(saved) + ".npy", saved)
    else:
        (saved.parent / ".x.index.abcdefgh").write_bytes(b"")
    opened = open_rows(file)
    if [opened[i] for i in range(len(opened))] != rows:
        raise Violation("other rows than the file's")


def case_of_links(rng: random.Random, folder: Path) -> Case:
    """Name what is no picture of the folder, and shard it: no byte from outside may get in."""
    secret = folder / "secret.png"
    secret.write_bytes(picture("PNG", 1) + b"SECRET")
    images = folder / "images"
    images.mkdir()
    (images / "a.jpg").write_bytes(picture("JPEG", 1))
    (images / "link.png").symlink_to(secret)
    (images / "out").symlink_to(folder)
    (images / "round").symlink_to("round")
    os.mkfifo(images / "fifo.png")
    names = ("a.jpg", "../secret.png", str(secret), "link.png", "out/secret.png", "fifo.png")
    name = rng.choice((*names, "/dev/zero", "round", ".", "", "x" * 5000, "a.jpg/b", "\ud83d.png"))
    (folder / "rows.json").write_text(json.dumps([row("x", image=name), row("y", image="a.jpg")]))
    return Case("links", name[:60], partial(pack, folder, secret.read_bytes()))


def pack(folder: Path, secret: bytes):
    """Shard rows.json, and look for the secret in what was written."""
    rows = open_rows(folder / "rows.json", folder / "images")
    try:
        shard(rows, folder / "out", 10**6)
    finally:
        for file in folder.rglob("*.tar"):
            if secret in file.read_bytes():
                raise Violation("a file from outside is in the shard")
        left = [path.name for path in folder.iterdir() if path.name.startswith(".")]
        if left:
            raise Violation(f"left behind: {left}")


CASES = (
    case_of_rows,
    case_of_rows,
    case_of_picture,
    case_of_picture,
    case_of_film,
    case_of_shard,
    case_of_container,
    case_of_container,
    case_of_index,
    case_of_links,
)


def case(rng: random.Random, folder: Path) -> Case:
    """Make one wrong input in a folder, and say what to run on it."""
    return rng.choice(CASES)(rng, folder)


if __name__ == "__main__":
    torch.set_num_threads(1)
    containers = {kind: partial(case_of_container, kind=kind) for kind in CONTAINERS}
    main(case, __doc__, containers)
