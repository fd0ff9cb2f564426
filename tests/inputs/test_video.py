"""video.py: which frames of a clip are taken, and that they are the same on every way to them."""

import gc
import json
import os
import random
import signal
import socket
import struct
import sys
import time
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from config import UserError
from inputs import video
from tests.tools.environment import shared

CLIPS = (
    "corrupted.mp4",
    "flipping_a_pancake.mkv",
    "video_0.mov",
    "video_90.mov",
    "video_180.mov",
    "video_270.mov",
)


def golden(name):
    pytest.importorskip("av")
    return shared(f"assets/videos/{name}"), json.loads(
        shared("assets/videos/golden_video.json").read_text()
    )["files"][name]


def decode_all(source):
    """Return all frames, decoded from the start and not turned, and the stream's rotations."""
    av = pytest.importorskip("av")
    with av.open(str(source)) as container:
        shown = list(container.decode(container.streams.best("video")))
        return [frame.to_ndarray(format="rgb24") for frame in shown], [
            frame.rotation for frame in shown
        ]


def make(
    path,
    codec="libx264",
    n=60,
    options=None,
    container=None,
    times=None,
    base=Fraction(1, 25),
    kind="yuv420p",
):
    """A clip of moving squares; each frame's corner has a grey of its own."""
    av = pytest.importorskip("av")
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg cannot write {codec}")
    squares = (
        np.random.default_rng(0).integers(0, 255, (8, 12, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    )
    with av.open(str(path), "w", options=container or {}) as out:
        stream = out.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height, stream.pix_fmt = 96, 64, kind
        stream.codec_context.time_base = base
        for i in range(n):
            pixels = np.roll(squares, (2 * i, 3 * i), (0, 1))
            pixels[:16, :16] = 4 * i
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = times[i] if times else i, base
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


X264 = {"x264-params": "keyint=12:bframes=3:scenecut=0:b-adapt=0"}
OPEN = {"x264-params": "keyint=12:bframes=3:scenecut=0:b-adapt=0:open-gop=1"}
REFRESH = {"x264-params": "keyint=12:bframes=0:intra-refresh=1"}
ALT = {"auto-alt-ref": "1", "lag-in-frames": "16", "g": "20", "b": "300k"}
UNEVEN = np.cumsum(np.random.default_rng(1).integers(1, 40, 60)).tolist()
MADE = {
    "b.mp4": dict(options=X264),
    "b.mov": dict(options=X264),
    "b.mkv": dict(options=X264),
    "open.mp4": dict(options=OPEN),
    "open.mkv": dict(options=OPEN),
    "refresh.mkv": dict(options=REFRESH),
    "uneven.mp4": dict(options=X264, times=UNEVEN, base=Fraction(1, 1000)),
    "one.mp4": dict(n=1),
    "live.mkv": dict(options=X264, container={"live": "1"}),
    "live.webm": dict(codec="libvpx", container={"live": "1"}),
    "pieces.mp4": dict(options=X264, container={"movflags": "frag_keyframe+empty_moov"}),
    "late.mkv": dict(options=X264, times=[i + 100 for i in range(60)]),
    "edited.mp4": dict(options=X264, times=[i - 7 for i in range(60)]),
    "alt.webm": dict(codec="libvpx", options=ALT),
    "b.ts": dict(options=X264),
    "vp9.webm": dict(codec="libvpx-vp9", options=ALT | {"cpu-used": "5"}),
    "av1.mp4": dict(codec="libsvtav1", options={"preset": "12"}),
    "x265.mp4": dict(
        codec="libx265", options={"x265-params": "keyint=12:log-level=none:bframes=4"}
    ),
}


@pytest.mark.parametrize(
    "frames,duration", [(1, 0.04), (7, 0.9), (16, 2.0), (310, 10.381), (5000, 200.7)]
)
def test_indices_are_the_formulas(frames, duration):
    clip = video.Clip(frames, duration)
    for n in (1, 8, 16):
        expected = [int(i * (frames - 1) / (n - 1)) if n > 1 else 0 for i in range(n)]
        assert video.indices(clip, n) == expected, n
    asked = max(1, int(duration))
    assert (
        video.indices(clip, 10_000, fps=1) == np.linspace(0, frames - 1, asked, dtype=int).tolist()
    )
    assert (
        video.indices(clip, 64, fps=1)
        == np.linspace(0, frames - 1, min(64, asked), dtype=int).tolist()
    )
    assert len(video.indices(clip, 10_000, fps=2)) == max(1, int(2 * duration))


def test_a_span_is_a_part_of_the_clip():
    clip = video.Clip(100, 10.0)
    assert video.indices(clip, 3, span=(2.0, 5.0)) == [20, 35, 50]
    assert video.indices(clip, 3, span=(2.04, 2.06)) == [
        20,
        20,
        21,
    ]  # 20.4 and 20.6 frames, rounded
    assert video.indices(clip, 9, fps=1, span=(2.0, 4.9)) == [20, 34, 49]  # three seconds of it
    assert video.indices(clip, 2, span=(9.0, 99.0)) == [90, 99] and video.indices(
        clip, 2, span=(-1, 1.0)
    ) == [0, 10]
    assert video.indices(clip, 2, span=(5.0, 4.0)) == [50, 50] and video.indices(
        clip, 1, span=(50, 60.0)
    ) == [99]
    with pytest.raises(ValueError, match="no duration"):
        video.indices(video.Clip(100, None), 2, span=(1.0, 2.0))


def test_a_folder_has_a_duration_where_its_rate_is_known(tmp_path):
    for i in range(12):
        Image.new("L", (4, 4), 20 * i).save(tmp_path / f"{i:05d}.png")
    shades = [
        image.getpixel((0, 0))[0] // 20
        for image in video.stream(tmp_path, 3, span=(1.0, 3.0), rate=3)
    ]
    assert shades == [3, 6, 9]
    assert len(list(video.stream(tmp_path, 16, fps=1, rate=3))) == 4


def test_a_worker_forked_after_a_clip_was_read_can_free_its_frames(tmp_path, monkeypatch):
    """With threads it could not: they are not in the fork, and freeing waits for them."""
    kept, upright = [], video._upright
    monkeypatch.setattr(video, "_upright", lambda frame: kept.append(frame) or upright(frame))
    make(tmp_path / "clip.mp4", n=8)
    assert len(video.frames(tmp_path / "clip.mp4", 4)) == 4 == len(kept)
    if (child := os.fork()) == 0:
        kept.clear()
        gc.collect()
        os._exit(0)
    for _ in range(200):
        if os.waitpid(child, os.WNOHANG)[0]:
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the forked process hangs")


@pytest.mark.parametrize("name", CLIPS)
def test_golden(name):
    """Counts, durations, rotations, first-frame means; frames of uniform 8 and 16 and of fps."""
    file, expected = golden(name)
    clip = video.probe(file)
    assert clip.frames == (expected["declared_frames"] or expected["decoded_frames"])
    assert round(clip.duration, 3) == expected["duration_s"]
    (first,) = video.frames(file, 1)
    assert np.asarray(first).mean((0, 1)) == pytest.approx(
        expected["first_frame_rgb_mean"], abs=0.0051
    )
    quarter = expected["rotation"] // 90  # counter-clockwise
    assert first.size == (expected["width"], expected["height"])[:: -1 if quarter % 2 else 1]
    if "decode_error" in expected:
        return
    shown = [np.rot90(frame, quarter) for frame in decode_all(file)[0]]
    assert len(shown) == expected["decoded_frames"] == clip.frames
    for n, fps in ((8, 0), (16, 0), (64, 1)):
        taken = video.frames(file, n, fps)
        assert len(taken) == (n if not fps else max(1, int(expected["duration_s"])))
        for i, image in zip(video.indices(clip, n, fps), taken, strict=True):
            assert np.array_equal(image, shown[i]), (n, i)


def test_corrupted_is_one_line(capfd):
    file, expected = golden("corrupted.mp4")
    for n, fps in ((8, 0), (16, 0), (64, 1)):
        with pytest.raises(ValueError, match="damaged: no good frame at") as error:
            video.frames(file, n, fps)
        assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")  # FFmpeg prints nothing of its own


@pytest.mark.parametrize("name", MADE)
def test_seeking_leads_to_the_same_frames(name, tmp_path):
    """Every frame alone, and several of one pass, bit-equal to decoding from the start."""
    file = make(tmp_path / name, **MADE[name])
    shown, _ = decode_all(file)
    clip = video.probe(file)
    assert clip.frames == len(shown)
    with video._opened(file) as reader:
        for i in [*range(len(shown))[::-1], 0]:
            assert np.array_equal(next(reader.pick([i])), shown[i]), i
    for n in (5, 16, len(shown)):
        for i, image in zip(video.indices(clip, n), video.stream(file, n), strict=True):
            assert np.array_equal(image, shown[i]), (n, i)
    corners = [
        np.asarray(image)[2:14, 2:14].mean()
        for image in video.frames(file.read_bytes(), clip.frames)
    ]
    assert np.diff(corners[::8]).min(initial=99) > 20  # in the order in which they were written


@pytest.mark.parametrize(
    "name,duration",
    [("live.webm", 2.4), ("live.mkv", 2.4), ("one.mp4", 0.04), ("edited.mp4", 2.12)],
)
def test_durations(name, duration, tmp_path):
    """Of containers that state none: the frames' own times."""
    assert video.probe(make(tmp_path / name, **MADE[name])).duration == pytest.approx(
        duration, abs=1e-6
    )


def test_open_groups_are_entered(tmp_path, monkeypatch):
    """What leads up to a keyframe is left out, so nothing is decoded from the start."""
    starts, decode = [], video._Film._decode
    monkeypatch.setattr(video._Film, "_decode", lambda *a: starts.append(a[1]) or decode(*a))
    with video._opened(make(tmp_path / "open.mp4", options=OPEN)) as reader:
        list(reader.pick([len(reader.times) - 1]))
        assert starts == reader.keys[-1:] != reader.keys


def test_decodes_only_what_is_needed(tmp_path, monkeypatch):
    """For a frame of the last group: from its keyframe on, what other frames refer to."""
    file = make(tmp_path / "b.mp4", options=X264)
    converted, decoded, decode = [], [], video._Film._decode
    monkeypatch.setattr(video, "_upright", lambda frame: converted.append(frame.pts))
    monkeypatch.setattr(
        video._Film, "_decode", lambda *a: (decoded.append(f) or f for f in decode(*a))
    )
    with video._opened(file) as reader:
        list(reader.pick([50]))
        assert converted == [reader.times[50]]
        # from 48 on, with 3 B-frames of which the middle one is referred to: 48, 50
        assert [reader.times.index(frame.pts) for frame in decoded] == [48, 50]
        keys, starts = reader.keys, []
        monkeypatch.setattr(video._Film, "_decode", lambda *a: starts.append(a[1]) or decode(*a))
        list(reader.pick(range(60)))
        assert starts == keys and len(keys) == 5  # on from where it is, inside a group
        threads = reader.context.thread_type, reader.context.thread_count
        assert [str(t).split(".")[-1] for t in threads] in (["NONE", "1"], ["0", "1"])


@pytest.mark.parametrize(
    "matrix",
    [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0), (-1, 0, 0, 1), (0, 1, 1, 0)],
)
def test_upright(matrix):
    """Turned and mirrored as the matrix says where each corner goes."""
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)

    class Matrix(bytes):
        type = type("Type", (), {"name": "DISPLAYMATRIX"})

    class Frame:
        a, b, c, d = (65536 * entry for entry in matrix)
        side_data = [Matrix(np.array([a, b, 0, c, d, 0, 0, 0, 1 << 30], "=i4").tobytes())]

        def to_ndarray(self, format, threads):
            return pixels

    a, b, c, d = matrix
    places = {(a * x + c * y, b * x + d * y): pixels[y, x] for y in range(2) for x in range(3)}
    left, top = (min(place[i] for place in places) for i in (0, 1))
    image = video._upright(Frame())
    for (x, y), pixel in places.items():
        assert image.getpixel((x - left, y - top)) == tuple(pixel), (x, y)


@pytest.mark.parametrize("keep", [0.02, 0.5, 0.97])
def test_truncated(keep, tmp_path):
    """An .mp4 that states at its start how many frames it has."""
    content = make(
        tmp_path / "b.mp4", options=X264, container={"movflags": "faststart"}
    ).read_bytes()
    with pytest.raises(
        ValueError, match="truncated: .. of its 60 frames" if keep > 0.1 else "no video"
    ):
        video.frames(content[: int(len(content) * keep)], 8)


def test_damage_is_not_patched_up(tmp_path):
    """Three wrong bytes: FFmpeg goes on with what it has of a picture unless told otherwise."""
    content = bytearray(make(tmp_path / "b.mkv", options=X264 | {"b": "4M"}).read_bytes())
    for at in random.Random(0).sample(range(len(content) // 3, 2 * len(content) // 3), 3):
        content[at] ^= 255
    (tmp_path / "b.mkv").write_bytes(content)
    assert len(decode_all(tmp_path / "b.mkv")[0]) == 60
    with pytest.raises(ValueError, match="damaged: no good frame at"):
        video.frames(tmp_path / "b.mkv", 16)


def test_messages(tmp_path):
    pytest.importorskip("av")
    (tmp_path / "sound.mp4").write_text("x" * 999)
    cases = {
        tmp_path / "absent.mp4": "no such file or directory",
        tmp_path: "a folder without pictures",
        tmp_path / "sound.mp4": "not a video, or a damaged one: Invalid data",
        b"": "empty file",
        b"<!DOCTYPE html><html>": "an HTML page",
        b"GIF89a" + bytes(50): "not a video, or a damaged one: ",
    }
    for source, message in cases.items():
        with pytest.raises(ValueError, match=message):
            video.frames(source, 8)


def test_without_pyav(tmp_path, monkeypatch):
    """Gifs and folders are read, a film asks for the extra."""
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.mp4").write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match=r"PyAV.*not installed; fix: pip install '.\[video\]'"):
        video.probe(tmp_path / "a.mp4")


def test_gif(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    pictures = [Image.new("RGB", (20, 10), (i * 20, 0, 0)) for i in range(11)]
    delays = [300] * 5 + [0] * 5 + [500]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=delays)
    clip = video.probe(tmp_path / "a.gif")
    assert clip == video.Clip(11, 2.5)
    for n, fps, expected in ((4, 0, [0, 3, 6, 10]), (99, 1, [0, 10]), (1, 1, [0])):
        for source in (tmp_path / "a.gif", (tmp_path / "a.gif").read_bytes()):
            taken = video.frames(source, n, fps)
            assert [round(image.getpixel((5, 5))[0] / 20) for image in taken] == expected
            assert {image.mode for image in taken} == {"RGB"}
    with pytest.raises(ValueError, match="damaged"):
        video.frames((tmp_path / "a.gif").read_bytes()[:30], 4)


def test_folder(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    for i in range(12):
        Image.new("RGB", (20, 10), (i * 20, 0, 0)).save(tmp_path / f"frame{i}.png")
    (tmp_path / "times.txt").write_text("0 1 2")
    assert video.probe(tmp_path) == video.Clip(12, None)
    assert [image.getpixel((0, 0))[0] // 20 for image in video.frames(tmp_path, 4)] == [0, 3, 7, 11]
    with pytest.raises(ValueError, match="no duration"):
        video.frames(tmp_path, 4, fps=1)
    (tmp_path / "frame7.png").write_bytes(b"")
    with pytest.raises(ValueError, match="frame frame7.png: empty file"):
        video.frames(tmp_path, 4)


# ---- what a clip may reach, and what it may cost

PLAYLISTS = {
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{url}\n#EXT-X-ENDLIST\n",
    "concat": "ffconcat version 1.0\nfile '{url}'\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
    "m=video {port} RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    "dash": '<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet '
    'mimeType="video/mp4"><Representation id="1" bandwidth="1"><BaseURL>{url}</BaseURL>'
    "</Representation></AdaptationSet></Period></MPD>",
}


@pytest.mark.parametrize("name", ["a.mp4", "a.m3u8", "a.sdp", "a.ts"])
@pytest.mark.parametrize("kind", PLAYLISTS)
def test_a_clip_asks_no_address_and_opens_no_other_file(tmp_path, kind, name):
    pytest.importorskip("av")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1] & ~1  # RTP's ports are even
        clip = tmp_path / name
        for url in (f"http://127.0.0.1:{server.getsockname()[1]}/x.ts", tmp_path / "secret.ts"):
            make(tmp_path / "secret.ts", codec="mpeg2video", n=5)
            clip.write_text(PLAYLISTS[kind].format(url=url, port=port))
            for source in (clip, clip.read_bytes()):
                with pytest.raises(ValueError, match="no film|not a video|an XML text"):
                    video.frames(source, 2)
        with pytest.raises(TimeoutError):
            server.accept()

    # Nobody listens at the port of the session description.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", port))


@pytest.mark.parametrize("count", [10**5, 10**7, 2**32 - 1])
@pytest.mark.parametrize("table", ["stsz", "trun"])
def test_a_table_of_more_frames_than_bytes_is_not_made(tmp_path, table, count):
    """FFmpeg would take 80 bytes for each, before it reads the first."""
    movflags = {"trun": {"movflags": "frag_keyframe+empty_moov"}}.get(table)
    content = make(tmp_path / "a.mp4", codec="mpeg4", n=5, container=movflags).read_bytes()
    assert video.probe(content).frames == 5
    at = content.index(table.encode())
    if table == "stsz":
        forged = content[: at + 8] + struct.pack(">II", 1, count) + content[at + 16 :]
    else:
        forged = content[: at + 4] + struct.pack(">II", 0, count) + content[at + 12 :]
    with pytest.raises(ValueError, match=f"damaged: it claims {count} frames in [0-9]+ bytes"):
        video.probe(forged)


def test_frames_of_too_many_pixels_are_not_decoded(tmp_path, monkeypatch):
    file = make(tmp_path / "a.mkv", codec="mpeg4", n=5)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 96 * 64 - 1)
    with pytest.raises(ValueError, match="not a video, or a damaged one|no good frame"):
        video.frames(file, 2)


def test_the_number_of_frames_and_the_work_to_reach_them_are_bounded(tmp_path, monkeypatch):
    file = make(tmp_path / "a.mkv", codec="mpeg4", n=9)
    assert len(video.frames(file, 9)) == 9
    monkeypatch.setattr(video, "MOST_DECODED", 5 * 96 * 64)
    assert len(video.frames(file, 1)) == 1
    with pytest.raises(ValueError, match="reached by decoding 30720 pixels"):
        video.frames(file, 9)
    monkeypatch.setattr(video, "MOST_FRAMES", 8)
    with pytest.raises(ValueError, match="more than 8 frames"):
        video.frames(file, 1)

    frames = [Image.new("RGB", (20, 10), (40 * i, 0, 0)) for i in range(6)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert video.probe(tmp_path / "a.gif").frames == 6
    monkeypatch.setattr(video, "MOST_DECODED_GIF", 5 * 20 * 10)
    with pytest.raises(ValueError, match="6 frames of 20 x 10 pixels are too many"):
        video.probe(tmp_path / "a.gif")


def test_a_gif_of_too_large_a_size_is_refused(tmp_path, monkeypatch):
    frames = [Image.new("RGB", (20, 10), (40 * i, 0, 0)) for i in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 150)  # Pillow only warns up to twice this
    with pytest.raises(ValueError, match="not a video, or a damaged one: .*exceeds limit of 150"):
        video.probe(tmp_path / "a.gif")


def test_durations_that_cannot_be(monkeypatch):
    for duration in (0.0, -5.0):
        clip = video.Clip(10, duration)
        assert video.indices(clip, 4, fps=2) == [0]
        with pytest.raises(ValueError, match="its duration is -?[05] s"):
            video.indices(clip, 4, span=(0.0, 1.0))


def test_odd_names_and_places_of_clips_are_one_line(tmp_path):
    os.mkfifo(tmp_path / "a.mp4")
    for source, what in (
        (tmp_path / "a.mp4", "not a regular file"),
        ("/dev/zero", "not a regular file"),
        (tmp_path / ("x" * 5000), "file name too long"),
        (tmp_path / "a\0b.mp4", "not a file name"),
    ):
        with pytest.raises(ValueError, match=what):
            video.frames(source, 2)
    (tmp_path / "folder").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "folder/a.eps")
    (tmp_path / "folder/b.pdf").write_text("%PDF")
    with pytest.raises(ValueError, match="a folder without pictures"):
        video.frames(tmp_path / "folder", 2)
