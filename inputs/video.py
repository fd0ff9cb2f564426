"""The frames of a clip that a model sees: only those are decoded, in RGB, upright.

    clip = probe("clip.mp4")                  # Clip(frames=310, duration=10.381), decodes nothing
    wanted = indices(clip, 16)                # [0, 20, 41, ...], evenly from the first to the last
    for image in stream("clip.mp4", 16): ...  # those frames as PIL images, one at a time

A clip is a file that FFmpeg reads (mp4, mkv, mov, webm ...), a gif, a folder of pictures, or the
bytes of a file. FFmpeg comes with PyAV, the extra `video`; gifs and folders need Pillow only. All
runs on one thread: it is the data workers that run beside each other. What is wrong with a clip is
a ValueError of one line, as of `pictures.load_image`.

Read `indices` and `stream` first, then `_Film`, which finds frames in a film without decoding all.
"""

from __future__ import annotations

import re
import struct
import warnings
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from config import UserError
from inputs.pictures import FORMATS, load_image
from inputs.sniff import open_checked, reason

# The containers that FFmpeg may find in a file. It knows three hundred formats, and some are lists
# of other files and of addresses in the network, which it would open whatever the name says.
CONTAINERS = ("mov", "matroska", "avi", "mpegts", "mpeg", "asf", "flv", "ogg")

# FFmpeg's own limits for a file from outside. Its bytes come from Python, so no protocol is needed.
OPTIONS = {"format_whitelist": ",".join(CONTAINERS), "protocol_whitelist": "none"}

# 77 hours at 30 frames a second.
MOST_FRAMES = 2**23

# So many pixels may be decoded to reach the frames that are taken. They are 33,000 frames of
# 1920 x 1080, and take some minutes. A clip without keyframes is decoded from its start.
MOST_DECODED = 2**36
MOST_DECODED_GIF = 2**31  # Pillow is slower, and has to decode all of them

# The top-level boxes of an mp4 file that hold no tables of frames.
BOXES_WITHOUT_TABLES = (b"mdat", b"free", b"skip", b"wide")
LONGEST_TABLE = 2**28  # bytes


@dataclass(frozen=True)
class Clip:
    """What decides which frames are taken."""

    frames: int
    duration: float | None  # seconds; None: not known, as of a folder of pictures


def indices(
    clip: Clip, n: int, fps: float = 0.0, span: tuple[float, float] | None = None
) -> list[int]:
    """Return which frames are taken, as TinyLLaVA-Video does: n, evenly from first to last.

    With `fps` there are as many as the duration asks for, at least one and at most `n` (in
    TinyLLaVA-Video, any number). `span` is (start, end) in seconds: only frames between the two are
    taken, rounded to frames as in MVBench. A clip with fewer than n frames gives some several
    times. Raise ValueError for `fps` or `span` of a clip of unknown duration.
    """
    if (fps or span) and clip.duration is None:
        raise ValueError("a folder of frames has no duration, so fps says nothing")

    first = 0
    last = clip.frames - 1
    seconds = clip.duration
    if span:
        if seconds <= 0:
            raise ValueError(f"its duration is {seconds:g} s, so no span of it can be taken")
        start = round(span[0] * clip.frames / seconds)
        end = round(span[1] * clip.frames / seconds)
        first = min(max(0, start), last)
        last = max(first, min(end, last))
        seconds *= (last - first + 1) / clip.frames

    if fps:
        n = min(n, max(1, int(seconds * fps)))
    return np.linspace(first, last, n).astype(int).tolist()


def probe(source: str | Path | bytes) -> Clip:
    """Return frames and duration, decoding no picture. Raise ValueError(what is wrong with it)."""
    with _opened(source) as reader:
        return reader.clip


def stream(
    source: str | Path | bytes,
    n: int,
    fps: float = 0.0,
    span: tuple[float, float] | None = None,
    rate: float = 0.0,
) -> Iterator[Image.Image]:
    """Yield the frames of `indices` in order. Raise ValueError(what is wrong with the clip).

    `rate` is how many pictures a second a folder holds, which gives it a duration.
    """
    with _opened(source) as reader:
        clip = reader.clip
        if rate:
            clip = replace(clip, duration=clip.frames / rate)
        taken = indices(clip, n, fps, span)

        # Each frame is decoded once, however often it is taken.
        once = sorted(set(taken))
        for i, image in zip(once, reader.pick(once), strict=True):
            yield from repeat(image, taken.count(i))


def frames(source: str | Path | bytes, n: int, fps: float = 0.0) -> list[Image.Image]:
    """Return the frames of `indices` as a list. Raise ValueError(what is wrong with the clip)."""
    return list(stream(source, n, fps))


@contextmanager
def _opened(source: str | Path | bytes) -> Iterator[_Folder | _Gif | _Film]:
    """Open a clip for reading: `clip`, and `pick(indices in order)`, which yields pictures.

    Whatever a decoder raises becomes a ValueError of one line.
    """
    if not isinstance(source, bytes) and is_folder(source):
        yield _Folder(Path(source))
        return

    with open_checked(source) as file:
        is_gif = file.read(4) == b"GIF8"
        file.seek(0)
        if is_gif:
            reader_class = _Gif
            decoder_errors = Exception  # Pillow's decoders raise nearly anything
        else:
            reader_class = _Film
            decoder_errors = _av().FFmpegError

        try:
            with closing(reader_class(file)) as reader:
                yield reader
        except decoder_errors as e:
            if type(e) is ValueError:  # it is already such a line, from below
                raise
            reason = getattr(e, "strerror", None) or e
            raise ValueError(f"not a video, or a damaged one: {reason}") from None


def is_folder(source: str | Path) -> bool:
    """Say whether a name is that of a folder. Raise ValueError if it cannot be one of anything."""
    try:
        return Path(source).is_dir()
    except OSError as e:  # too long, for one
        raise ValueError(reason(e)) from None


def _av():
    """Import PyAV only when a film is read: it is an optional package. Raise UserError."""
    try:
        import av
    except ImportError:
        what = "PyAV, which reads it, is not installed"
        raise UserError("video", what, "pip install '.[video]'") from None
    return av


class _Folder:
    """A clip of pictures, one a frame, in the order of the numbers in their names."""

    def __init__(self, folder: Path):
        known = Image.registered_extensions()
        pictures = []
        try:
            for file in folder.iterdir():
                is_picture = known.get(file.suffix.lower()) in (*FORMATS, "MPO")
                if is_picture and not file.name.startswith("."):
                    pictures.append(file)
        except OSError as e:
            raise ValueError(reason(e)) from None
        if not pictures:
            raise ValueError("a folder without pictures")
        self.files = sorted(pictures, key=_numbers_in_name)
        self.clip = Clip(len(pictures), None)

    def pick(self, wanted: list[int]) -> Iterator[Image.Image]:
        for i in wanted:
            try:
                yield load_image(self.files[i])
            except ValueError as e:
                raise ValueError(f"frame {self.files[i].name}: {e}") from None


def _numbers_in_name(file: Path) -> list[tuple[str, int]]:
    """Return a key that sorts frame9 before frame10: the name in pairs of a text and a number."""
    pairs = re.findall(r"(\D*)(\d*)", file.name)
    return [(text, int(digits or 0)) for text, digits in pairs]


class _Gif:
    """A clip that Pillow reads."""

    def __init__(self, file):
        # As in `pictures`, the warning of a bomb is the limit.
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            self.image = Image.open(file, formats=["GIF"])

        # Telling how many frames there are decodes none.
        width, height = self.image.size
        count = self.image.n_frames
        if count * width * height > MOST_DECODED_GIF:
            raise ValueError(f"{count} frames of {width} x {height} pixels are too many")

        milliseconds = 0
        for i in range(count):
            self.image.seek(i)
            # Browsers show a frame of duration 0 for 100 ms.
            milliseconds += self.image.info.get("duration") or 100
        self.clip = Clip(self.image.n_frames, milliseconds / 1000)

    def close(self):
        self.image.close()

    def pick(self, wanted: list[int]) -> Iterator[Image.Image]:
        for i in wanted:
            self.image.seek(i)
            yield self.image.convert("RGB")


class _Film:
    """A clip that FFmpeg reads, and how one of its frames is found without decoding all before it.

    A film is a file of packets, each with one compressed frame. Most hold only what has changed
    since other frames. A keyframe is complete: decoding can begin there, and the frames from one
    keyframe to the next are a group. Every packet has two times: the pts (presentation time stamp)
    says when its frame is shown, the dts (decoding time stamp) when it is decoded. They differ as a
    B-frame refers to a later one, too, which is then decoded before it. All are counted in the
    stream's time_base, a fraction of a second.

    Opening reads the packets once for the times of frames and keyframes, which decodes nothing. A
    frame is then reached from the last keyframe before it: the frames between are decoded, but for
    those that no other refers to. Where that does not lead to it exactly, because a file is damaged
    or its keyframes are not what they claim, all is decoded from the start.
    """

    def __init__(self, file: BinaryIO):
        _check_tables(file)
        limits = {"max_pixels": str(Image.MAX_IMAGE_PIXELS)}
        try:
            self.container = _av().open(file, metadata_errors="replace", options=OPTIONS | limits)
        except _av().ArgumentError:  # FFmpeg found a format that is not in the list
            what = f"no film, or not in a container that is read ({', '.join(CONTAINERS)})"
            raise ValueError(what) from None
        self.stream = self.container.streams.best("video")
        if self.stream is None:
            raise ValueError("no video in it")

        # One thread, and an error rather than a picture that FFmpeg patched up.
        self.context = self.stream.codec_context
        self.context.thread_type = "NONE"
        self.context.thread_count = 1
        self.context.options = {"err_detect": "explode", **limits}
        self.decoded_pixels = 0  # so far

        self._read_times()
        self.clip = Clip(len(self.times), self._duration())

    def close(self):
        self.container.close()

    def _read_times(self):
        """Read all packets for `times` of shown frames, `keys`, those of keyframes, and `start`.

        Times are pts, in order; `start` is the dts of the first packet. Raise ValueError.
        """
        # Some frames of VP8 are never shown, others only refer to them. The fifth bit of a packet
        # says which.
        is_vp8 = self.context.codec.canonical_name == "vp8"
        times = []
        self.keys = []
        packets = 0
        for packet in self.container.demux(self.stream):
            if not packet.size:
                continue  # at the end PyAV gives one without data, which tells a decoder to finish
            if packet.pts is None:
                raise ValueError("frames without times")
            if packets == 0:
                self.start = packet.pts if packet.dts is None else packet.dts
            packets += 1
            if packets > MOST_FRAMES:
                raise ValueError(f"more than {MOST_FRAMES} frames")
            if packet.is_keyframe:
                self.keys.append(packet.pts)

            hidden = packet.is_discard or (is_vp8 and not bytes(packet)[0] & 0b10000)
            if not hidden:
                times.append(packet.pts)

        if packets < self.stream.frames:
            raise ValueError(f"truncated: {packets} of its {self.stream.frames} frames")

        # What is shown before the first keyframe cannot be decoded.
        self.keys.sort()
        self.times = []
        if self.keys:
            self.times = sorted(time for time in times if time >= self.keys[0])
        if not self.times:
            raise ValueError("no frames")

    def _duration(self) -> float:
        """Return the seconds that the container states, or else those that the times make."""
        if self.container.duration and self.container.duration > 0:
            return self.container.duration / 1e6

        # The times say when frames begin, so the last one's length is missing: take the mean.
        span = float((self.times[-1] - self.times[0]) * self.stream.time_base)
        n = len(self.times)
        return span * n / max(1, n - 1)

    def pick(self, wanted: list[int]) -> Iterator[Image.Image]:
        """Yield frames by their numbers, which are in order. Raise ValueError for a damaged one."""
        wanted_times = [self.times[i] for i in wanted]

        # Where the decoder is: the frames that follow, and the time of the last one. Here it is
        # before all.
        decoded = iter(())
        reached = self.keys[0] - 1
        for time in wanted_times:
            # Within a group the decoder goes on from where it is. A new group begins at its key.
            key = self.keys[bisect_right(self.keys, time) - 1]
            if key > reached:
                decoded = self._decode(key, {key, *wanted_times})
            frame = self._reach(time, decoded)

            # The keyframe did not lead to it: once more, from the start.
            if frame is None:
                decoded = self._decode(self.keys[0], set(self.times))
                frame = self._reach(time, decoded)
            if frame is None:
                seconds = float(time * self.stream.time_base)
                raise ValueError(f"damaged: no good frame at {seconds:.3f} s")
            reached = time
            yield _upright(frame)

    def _reach(self, time: int, decoded: Iterator):
        """Return the frame of exactly this time from the decoder; None if there is no good one."""
        try:
            frame = next((frame for frame in decoded if frame.pts >= time), None)
        except _av().FFmpegError:
            return None
        if frame is None or frame.pts != time or frame.is_corrupt:
            return None
        return frame

    def _decode(self, key: int, shown: set[int]) -> Iterator:
        """Yield frames from a keyframe on: those at times `shown`, and all that others refer to.

        `shown` must hold the key: dav1d, AV1's decoder, skips for good what it skips at first.
        """
        is_first = key == self.keys[0]
        self.container.seek(self.start if is_first else key, stream=self.stream)
        for packet in self.container.demux(self.stream):
            # A frame behind the keyframe in the file may be shown before it, and refer to frames of
            # the group before, which are not decoded here.
            leads_up_to_key = packet.size and packet.pts < key
            if leads_up_to_key and not is_first:
                continue
            self.context.skip_frame = "DEFAULT" if packet.pts in shown else "NONREF"
            for frame in packet.decode():
                self.decoded_pixels += frame.width * frame.height
                if self.decoded_pixels > MOST_DECODED:
                    raise ValueError(f"its frames are reached by decoding {MOST_DECODED} pixels")
                yield frame


def _check_tables(file: BinaryIO):
    """Raise ValueError if an mp4 file claims more frames than it has bytes.

    A few bytes can claim any number, and FFmpeg makes a table of so many frames when it opens the
    file. Films in other containers have the bytes of each frame beside its entry.
    """
    size = file.seek(0, 2)
    claimed = 0
    start = 0
    while start + 8 <= size:
        file.seek(start)
        length, kind = struct.unpack(">I4s", file.read(8))
        if length == 1:  # the length stands behind, in eight bytes
            length = int.from_bytes(file.read(8), "big")
        elif length == 0:  # up to the end
            length = size - start
        if length < 8:
            break  # no mp4, or a damaged one: what FFmpeg reads ends here, too

        # In a file that is no mp4, the first four bytes are no length and this is no name.
        if kind.isalnum() and kind not in BOXES_WITHOUT_TABLES:
            tables = file.read(min(length, LONGEST_TABLE))
            claimed += _claimed_frames(tables)
            if claimed > size or b"cmov" in tables:
                file.seek(0)
                raise ValueError(f"damaged: it claims {claimed} frames in {size} bytes")
        start += length
    file.seek(0)


def _claimed_frames(box: bytes) -> int:
    """Return how many frames the tables in a box of an mp4 file claim to have."""
    claimed = 0
    for kind, offset in ((b"stsz", 12), (b"stz2", 12), (b"trun", 8)):
        for found in re.finditer(kind, box):
            start = found.start() + offset
            claimed += int.from_bytes(box[start : start + 4], "big")
    return claimed


def _upright(frame) -> Image.Image:
    """Return a decoded frame in RGB, turned in quarter turns and mirrored as its film says."""
    # This is faster than PyAV's to_image. It must use no threads: a worker that is forked later
    # does not have them, and would wait for them for good when it frees the converter.
    pixels = frame.to_ndarray(format="rgb24", threads=1)  # (height, width, 3)

    for data in frame.side_data:
        if data.type.name != "DISPLAYMATRIX":
            continue
        # The pixel at (x, y) is shown at (a x + c y, b x + d y): one of a and c is 0 in a quarter
        # turn, and a negative factor mirrors.
        a, b, _, c, d = np.frombuffer(bytes(data), "=i4")[:5]
        if abs(c) > abs(a):
            pixels = pixels.transpose(1, 0, 2)
            a, d = c, b
        if d < 0:
            pixels = pixels[::-1]
        if a < 0:
            pixels = pixels[:, ::-1]
    return Image.fromarray(np.ascontiguousarray(pixels))
