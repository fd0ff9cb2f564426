"""16 frames of a clip, decoded and made into pixels, beside PyAV decoding every frame, in one run.

    python bench/video.py ../shared/assets/videos/flipping_a_pancake.mkv
    python bench/video.py CLIP [CLIP ...] --frames 16 --repeats 7 --json out/video.json

Each clip is measured as it is, and with its packets twelve times one after the other (not encoded
again): a longer one. All ways run on one thread, as in a data worker, in turns, with the file in
the cache. They must give the same pixels, 3 x 384 x 384 a frame.

barellava        reads the packets' times, seeks, decodes what the wanted frames need, converts
                 those to RGB
every frame      decodes all frames, converts all to RGB and picks
16 converted     decodes all frames, converts those wanted

Then memory: 32 and 128 frames of the last longer clip go through a SigLIP-base-384 of random
weights, three times each in a process of its own. The peak counts above what was there before; the
pixels and the encoder's features are part of it. There malloc gives back every block that is freed,
because the blocks that it keeps by default move the peak more than the frames do.

Targets: >= 2 x every frame, for the longest clip given; 128 frames take no more than 32 frames and
the larger features.
"""

from __future__ import annotations

import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from PIL import Image  # noqa: E402

import command_line  # noqa: E402
from bench.common import OURS, median_and_range, met, name_versions, write_json  # noqa: E402
from inputs import video  # noqa: E402
from inputs.image_processor import ImageProcessor  # noqa: E402

COPIES = 12  # of a clip's packets in the longer one
PROCESSES = 3  # for each count of frames
FASTER = 2.0  # the target
EVERY = "every frame"
SIGLIP_BASE = {
    "model_type": "siglip_vision_model", "hidden_size": 768, "intermediate_size": 3072,
    "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 384, "patch_size": 16,
}  # fmt: skip
TEXT = {
    "model_type": "llama", "vocab_size": 320, "hidden_size": 768, "intermediate_size": 768,
    "num_hidden_layers": 1, "num_attention_heads": 12,
}  # fmt: skip
# glibc maps larger blocks (bytes) on their own, and unmaps them as soon as they are freed.
MALLOC_KEEPS_NOTHING = {"MALLOC_MMAP_THRESHOLD_": "131072"}


# ---------------------------------------------------------------------- decoding


def write_longer(source: Path, out: Path) -> Path:
    """Write the clip's packets COPIES times into `out`, each copy later by the clip's length."""
    import av

    with av.open(str(out), "w") as target:
        stream = None
        offset = 0
        for _ in range(COPIES):
            with av.open(str(source)) as container:
                origin = container.streams.best("video")
                if stream is None:
                    stream = target.add_stream_from_template(origin)
                packets = [packet for packet in container.demux(origin) if packet.size]
                frame = round(1 / (origin.average_rate * origin.time_base))
                length = max(packet.pts for packet in packets) + frame
                for packet in packets:
                    packet.stream = stream
                    packet.pts += offset
                    packet.dts += offset
                    target.mux(packet)
                offset += length
    return out


def decode_ours(file: Path, wanted: list[int]) -> list[Image.Image]:
    """Return the wanted frames as the data loader reads them."""
    return video.frames(file, len(wanted))


def decode_every(file: Path, wanted: list[int]) -> list[Image.Image]:
    """Return the wanted frames of all, each converted."""
    return decode_all(file, wanted, convert_all=True)


def decode_some(file: Path, wanted: list[int]) -> list[Image.Image]:
    """Return the wanted frames of all, only those converted."""
    return decode_all(file, wanted, convert_all=False)


def decode_all(file: Path, wanted: list[int], convert_all: bool) -> list[Image.Image]:
    import av

    arrays = {}
    with av.open(str(file)) as container:
        stream = container.streams.best("video")
        stream.thread_type = "NONE"
        stream.codec_context.thread_count = 1
        for i, frame in enumerate(container.decode(stream)):
            if convert_all or i in wanted:
                arrays[i] = frame.to_ndarray(format="rgb24")
    return [Image.fromarray(arrays[i]) for i in wanted]


def measure(file: Path, n: int, repeats: int) -> dict:
    """Return the milliseconds of each run of each way.

    The first turn does not count. Raises RuntimeError if the pixels differ.
    """
    processor = ImageProcessor(384)
    clip = video.probe(file)
    wanted = video.indices(clip, n)
    ways = {OURS: decode_ours, EVERY: decode_every, f"{n} converted": decode_some}
    runs = {name: [] for name in ways}
    for turn in range(repeats + 1):
        made = []
        for name, way in ways.items():
            start = time.perf_counter()
            pixels = torch.stack([processor.pixels(image) for image in way(file, wanted)])
            seconds = time.perf_counter() - start
            made.append(pixels)
            if turn > 0:
                runs[name].append(1000 * seconds)
        if not all(torch.equal(pixels, made[0]) for pixels in made):
            raise RuntimeError(f"{file}: not the same pixels")
    return {"frames": clip.frames, "seconds": clip.duration, "ms": runs}


# ---------------------------------------------------------------------- memory


def memory_status(key: str) -> int:
    """Return the bytes that /proc states for this process."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{key}:")[1].split()[0])


@torch.inference_mode()
def encode(file: str, count: str):
    """Print the peak of encoding `count` frames above what was there before, as JSON."""
    from config import LLaVAConfig
    from model import LLaVA

    model = LLaVA(LLaVAConfig(TEXT, SIGLIP_BASE, {})).to(torch.bfloat16).eval()
    item = model.views.clip(video.stream(file, int(count)))
    model._encode_views(item.pixels[:1])  # makes what only the first call makes

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory_status("VmRSS")
    features = model._encode_views(item.pixels)
    result = {
        "peak": memory_status("VmHWM") - before,
        "features": features.nbytes,
        "pixels": item.pixels.nbytes,
    }
    print(json.dumps(result))


def measure_memory(file: Path) -> dict[str, list[dict]]:
    """Return what `encode` prints of 32 and of 128 frames, in turns."""
    runs = {"32": [], "128": []}
    environment = os.environ | MALLOC_KEEPS_NOTHING
    for _ in range(PROCESSES):
        for count in runs:
            command = [sys.executable, __file__, "encode", str(file), count]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
            runs[count].append(json.loads(done.stdout))
    return runs


# ---------------------------------------------------------------------- the table


def clip_lines(name: str, clip: dict, repeats: int) -> list[str]:
    """Return the times of one clip."""
    lines = [
        f"{name}: {clip['frames']} frames, {clip['seconds']:.1f} s; ms, median (range) of {repeats}"
    ]
    ours = statistics.median(clip["ms"][OURS])
    for way, ms in clip["ms"].items():
        ratio = statistics.median(ms) / ours
        middle, spread = median_and_range(ms, ".0f").split(" ", 1)
        lines.append(f"  {way:14}{middle:>8} {spread}{ratio:8.2f} x")
    return lines


def speed_lines(clips: dict[str, dict]) -> list[str]:
    """Return the verdicts on the longest clip that was given, as it is and longer."""
    given = [name for name in clips if f"{COPIES} x {name}" in clips]
    longest = max(given, key=lambda name: clips[name]["seconds"])
    lines = []
    for name in (longest, f"{COPIES} x {longest}"):
        ms = clips[name]["ms"]
        ratio = statistics.median(ms[EVERY]) / statistics.median(ms[OURS])
        good = met(ratio >= FASTER)
        lines.append(f"target >= {FASTER:g} x {EVERY}, {name}: {good} ({ratio:.2f})")
    return lines


def memory_lines(taken: dict[str, list[dict]]) -> list[str]:
    """Return the peaks of encoding, and the verdict."""
    peak = {}
    features = {}
    lines = []
    for count, runs in taken.items():
        peaks = [run["peak"] / 1e6 for run in runs]
        peak[count] = statistics.median(peaks)
        features[count] = statistics.median(run["features"] for run in runs) / 1e6
        lines.append(
            f"encoding {count} frames: {peak[count]:.0f} MB ({min(peaks):.0f} to {max(peaks):.0f}) "
            f"of {len(runs)}, features {features[count]:.0f} MB"
        )

    more = peak["128"] - peak["32"]
    granted = features["128"] - features["32"]
    lines.append(
        f"target 128 frames <= 32 and the features ({granted:.0f} MB more): {met(more <= granted)} "
        f"({more:.0f} MB more)"
    )
    return lines


def table(result: dict) -> str:
    """Return what was measured, and whether the targets are met."""
    lines = [", ".join([result["date"], *name_versions(result["versions"])])]
    for name, clip in result["clips"].items():
        lines += clip_lines(name, clip, result["repeats"])
    lines += speed_lines(result["clips"])
    lines += memory_lines(result["memory"])
    return "\n".join(lines)


def main(argv: list[str]):
    if argv[:1] == ["encode"]:
        return encode(*argv[1:])

    parser = command_line.parser(__doc__)
    parser.add_argument("clips", type=Path, nargs="+")
    parser.add_argument("--frames", type=int, default=16, help="frames of a clip")
    parser.add_argument("--repeats", type=int, default=7, help="counted runs of each way")
    parser.add_argument("--json", type=Path, help="write every run's numbers to this file")
    args = parser.parse_args(argv)
    if min(args.frames, args.repeats) < 1:
        parser.error("--frames and --repeats start at 1")

    torch.set_num_threads(1)
    clips = {}
    with tempfile.TemporaryDirectory() as folder:
        for file in args.clips:
            clips[file.name] = measure(file, args.frames, args.repeats)
            longer = write_longer(file, Path(folder, f"long{file.suffix}"))
            clips[f"{COPIES} x {file.name}"] = measure(longer, args.frames, args.repeats)
        memory = measure_memory(longer)

    import av  # installed, or the clips would not have been read

    versions = {
        "python": sys.version.split()[0],
        "av": av.__version__,
        "torch": torch.__version__,
    }
    result = {
        "machine": "cpu",
        "date": datetime.date.today().isoformat(),
        "versions": versions,
        "repeats": args.repeats,
        "clips": clips,
        "memory": memory,
    }
    print(table(result))
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    command_line.cli(main, __doc__)
