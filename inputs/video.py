"""The frames of a clip that a model sees: only those are decoded, in RGB, upright.

A clip is a file that FFmpeg reads (mp4, mkv, mov, webm ...), a gif, a folder of pictures, or the bytes of a file.
FFmpeg comes with PyAV, the extra `video`; gifs and folders need Pillow only. Everything runs on one thread: it is the
data workers that run beside each other.

What is wrong with a clip is a ValueError that says it in a line, as of `rows.load_image`.
"""

from __future__ import annotations

import io
import re
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path

import numpy as np
from PIL import Image

from config import UserError
from inputs.index import looks_like
from inputs.rows import load_image


@dataclass(frozen=True)
class Clip:
    """What decides which frames are taken."""

    frames: int
    duration: float | None  # seconds, the container's where it has one; None = unknown, of a folder


def indices(
    clip: Clip, n: int, fps: float = 0.0, span: tuple[float, float] | None = None
) -> list[int]:
    """Which frames are taken, as TinyLLaVA-Video takes them: `n`, evenly from the first to the last, truncated.

    With `fps` as many as the duration asks for, at least one and at most `n` (there: any number of them). span: only
    from one second to another, as MVBench rounds them. A clip with fewer frames gives some several times. Raises
    ValueError with `fps` or `span` for a clip of unknown duration.
    """
    if (fps or span) and clip.duration is None:
        raise ValueError("a folder of frames has no duration, so fps says nothing")
    first, last, seconds = 0, clip.frames - 1, clip.duration
    if span:
        start, end = (round(second * clip.frames / seconds) for second in span)
        first = min(max(0, start), last)
        last = max(first, min(end, last))
        seconds *= (last - first + 1) / clip.frames
    n = min(n, max(1, int(seconds * fps))) if fps else n
    return np.linspace(first, last, n).astype(int).tolist()


def probe(source: str | Path | bytes) -> Clip:
    """Frames and duration; no picture is decoded. Raises ValueError(what is wrong with it)."""
    with _opened(source) as reader:
        return reader.clip


def stream(
    source: str | Path | bytes, n: int, fps: float = 0.0, span: tuple[float, float] | None = None, rate: float = 0.0
) -> Iterator[Image.Image]:  # fmt: skip
    """The frames of `indices` in order, one at a time. rate: frames a second of a folder of them. Raises
    ValueError(what is wrong with the clip)."""
    with _opened(source) as reader:
        clip = replace(reader.clip, duration=reader.clip.frames / rate) if rate else reader.clip
        taken = indices(clip, n, fps, span)
        once = sorted(set(taken))
        for i, image in zip(once, reader.pick(once), strict=True):
            yield from repeat(image, taken.count(i))


def frames(source: str | Path | bytes, n: int, fps: float = 0.0) -> list[Image.Image]:
    """The same as a list: what training reads and `data.py check` tries."""
    return list(stream(source, n, fps))


@contextmanager
def _opened(source: str | Path | bytes) -> Iterator[_Folder | _Gif | _Film]:
    """What reads the clip: its `clip`, and `pick(indices in order)`. Errors become ValueErrors of one line."""
    if not isinstance(source, bytes) and Path(source).is_dir():
        yield _Folder(Path(source))
        return
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")
    except OSError as e:
        raise ValueError(e.strerror.lower()) from None
    with file:
        head = file.read(256)
        if what := looks_like(head):
            raise ValueError(what)
        file.seek(0)
        gif = head.startswith(b"GIF8")
        errors = Exception if gif else _av().FFmpegError  # Pillow's decoders raise nearly anything
        try:
            with closing(_Gif(file) if gif else _Film(file)) as reader:
                yield reader
        except errors as e:
            if type(e) is ValueError:  # a line of this file
                raise
            raise ValueError(
                f"not a video, or a damaged one: {getattr(e, 'strerror', None) or e}"
            ) from None


def _av():
    try:
        import av
    except ImportError:
        raise UserError(
            "video", "PyAV, which reads it, is not installed", "pip install '.[video]'"
        ) from None
    return av


class _Folder:
    """Pictures, one a frame, in the order of the numbers in their names; other files are not frames."""

    def __init__(self, folder: Path):
        known = Image.registered_extensions()
        files = [
            f for f in folder.iterdir() if f.suffix.lower() in known and not f.name.startswith(".")
        ]
        self.files = sorted(
            files, key=lambda f: [(s, int(d or 0)) for s, d in re.findall(r"(\D*)(\d*)", f.name)]
        )
        if not files:
            raise ValueError("a folder without pictures")
        self.clip = Clip(len(files), None)

    def pick(self, wanted: list[int]) -> Iterator[Image.Image]:
        for i in wanted:
            try:
                yield load_image(self.files[i])
            except ValueError as e:
                raise ValueError(f"frame {self.files[i].name}: {e}") from None


class _Gif:
    def __init__(self, file):
        self.image, delays = Image.open(file), []
        self.close = self.image.close
        for i in range(self.image.n_frames):
            self.image.seek(i)
            delays.append(
                self.image.info.get("duration") or 100
            )  # ms; 0 is shown as 100 by browsers
        self.clip = Clip(len(delays), sum(delays) / 1000)

    def pick(self, wanted: list[int]) -> Iterator[Image.Image]:
        for i in wanted:
            self.image.seek(i)
            yield self.image.convert("RGB")


class _Film:
    """A file of FFmpeg's. Its packets are read once for the times of frames and keyframes, which decodes nothing.

    To reach a frame the last keyframe before it is sought, and what follows decoded less what nothing else refers to.
    Where that does not lead to it exactly, all is decoded from the start.
    """

    def __init__(self, file):
        self.container = _av().open(file, metadata_errors="replace")
        self.close, self.stream = self.container.close, self.container.streams.best("video")
        if self.stream is None:
            raise ValueError("no video in it")
        context = self.context = self.stream.codec_context
        context.thread_type, context.thread_count = "NONE", 1
        context.options = {"err_detect": "explode"}  # not a picture that was patched up
        vp8 = (
            context.codec.canonical_name == "vp8"
        )  # has frames that are not shown: the fifth bit of a packet says so
        times, self.keys, packets = [], [], 0
        for packet in self.container.demux(self.stream):
            if not packet.size:  # the last one
                continue
            if packet.pts is None:
                raise ValueError("frames without times")
            self.start = self.start if packets else packet.pts if packet.dts is None else packet.dts
            packets += 1
            self.keys += [packet.pts] * packet.is_keyframe
            times += [packet.pts] * (not (packet.is_discard or vp8 and not bytes(packet)[0] & 16))
        if packets < self.stream.frames:
            raise ValueError(f"truncated: {packets} of its {self.stream.frames} frames")
        self.keys.sort()
        self.times = sorted(time for time in times if self.keys and time >= self.keys[0])
        if not self.times:
            raise ValueError("no frames")
        span, n = float((self.times[-1] - self.times[0]) * self.stream.time_base), len(self.times)
        self.clip = Clip(n, (self.container.duration or 0) / 1e6 or span * n / max(1, n - 1))

    def pick(self, wanted: list[int]) -> Iterator[Image.Image]:
        times = [self.times[i] for i in wanted]
        decoded, at = iter(()), self.keys[0] - 1
        for time in times:
            key = self.keys[bisect_right(self.keys, time) - 1]
            if key > at:
                decoded = self._decode(key, {key, *times})
            if (frame := self._reach(time, decoded)) is None:
                decoded = self._decode(self.keys[0], set(self.times))
            if (frame := frame or self._reach(time, decoded)) is None:
                raise ValueError(
                    f"damaged: no good frame at {float(time * self.stream.time_base):.3f} s"
                )
            at = time
            yield _upright(frame)

    def _reach(self, time: int, decoded: Iterator):
        try:
            frame = next((frame for frame in decoded if frame.pts >= time), None)
        except _av().FFmpegError:
            return None
        return frame if frame is not None and frame.pts == time and not frame.is_corrupt else None

    def _decode(self, key: int, shown: set[int]) -> Iterator:
        """Frames from that keyframe on: those shown at these times, and all that others refer to. `shown` holds the
        key: dav1d skips for good what it skips at first."""
        first = key == self.keys[0]
        self.container.seek(self.start if first else key, stream=self.stream)
        for packet in self.container.demux(self.stream):
            if (
                first or not packet.size or packet.pts >= key
            ):  # what is shown before it may refer further back
                self.context.skip_frame = "DEFAULT" if packet.pts in shown else "NONREF"
                yield from packet.decode()


def _upright(frame) -> Image.Image:
    """A decoded frame in RGB, turned and mirrored as its display matrix says, in quarter turns."""
    # Faster than to_image. Without threads: a worker that is forked later has none of them, and freeing what has them
    # would wait for them for good.
    pixels = frame.to_ndarray(format="rgb24", threads=1)
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":  # (x, y) -> (a x + c y, b x + d y)
            a, b, _, c, d = np.frombuffer(bytes(data), "=i4")[:5]
            if abs(c) > abs(a):
                pixels, a, d = pixels.transpose(1, 0, 2), c, b
            pixels = pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    return Image.fromarray(np.ascontiguousarray(pixels))
