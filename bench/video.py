"""16 frames of a clip, decoded and made into pixels for an encoder, beside PyAV decoding every frame, in one run.

    python bench/video.py ../shared/assets/videos/flipping_a_pancake.mkv
    python bench/video.py CLIP [CLIP ...] --frames 16 --repeats 7 --json out/video.json

Each clip as it is, and its packets twelve times one after the other (not encoded again): a longer one. All on one
thread, as in a data worker, in turns, the file in the cache; the same pixels, 3 x 384 x 384 a frame, which is checked.

barellava        reads the packets' times, seeks, decodes what the wanted frames need, converts those to RGB
every frame      decodes all frames, converts all to RGB and picks
16 converted     decodes all frames, converts those wanted

Then memory: the frames of that longer clip through SigLIP-base-384 of random weights, 32 and 128 of them, three times
each in a process of its own: the peak above what was there before, pixels included, as the encoder's features are kept.
There malloc gives every block back that is freed: what it keeps by default moves the peak more than the frames do.

Targets: >= 2 x every frame, for the longest clip given; 128 frames take no more than 32 and the features.
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

import config  # noqa: E402
from inputs import video  # noqa: E402
from inputs.image_processor import ImageProcessor

COPIES, PEAKS, TARGET = 12, 3, 2.0  # PEAKS: processes for each count of frames


def longer(source: Path, out: Path) -> Path:
    """The clip's packets COPIES times."""
    av = video._av()
    with av.open(str(out), "w") as target:
        stream, offset = None, 0
        for _ in range(COPIES):
            with av.open(str(source)) as container:
                origin = container.streams.best("video")
                stream = stream or target.add_stream_from_template(origin)
                packets = [packet for packet in container.demux(origin) if packet.size]
                length = max(p.pts for p in packets) + round(
                    1 / (origin.average_rate * origin.time_base)
                )
                for packet in packets:
                    packet.stream, packet.pts, packet.dts = (
                        stream,
                        packet.pts + offset,
                        packet.dts + offset,
                    )
                    target.mux(packet)
                offset += length
    return out


def ours(file: Path, wanted: list[int]) -> list[Image.Image]:
    return video.frames(file, len(wanted))


def every(file: Path, wanted: list[int], convert: bool = True) -> list[Image.Image]:
    with video._av().open(str(file)) as container:
        stream = container.streams.best("video")
        stream.thread_type, stream.codec_context.thread_count = "NONE", 1
        shown = enumerate(container.decode(stream))
        arrays = {
            i: frame.to_ndarray(format="rgb24") for i, frame in shown if convert or i in wanted
        }
    return [Image.fromarray(arrays[i]) for i in wanted]


def some(file: Path, wanted: list[int]) -> list[Image.Image]:
    return every(file, wanted, convert=False)


def measure(file: Path, n: int, repeats: int) -> dict:
    """Milliseconds of each run of each way; the first, uncounted, checks that the pixels are the same."""
    transform, clip = ImageProcessor(384), video.probe(file)
    wanted = video.indices(clip, n)
    ways = {"barellava": ours, "every frame": every, f"{n} converted": some}
    runs: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        pixels = []
        for name, way in ways.items():
            start = time.perf_counter()
            pixels.append(torch.stack([transform.pixels(image) for image in way(file, wanted)]))
            runs[name] += [1000 * (time.perf_counter() - start)] * (turn > 0)
        if not all(torch.equal(p, pixels[0]) for p in pixels):
            raise RuntimeError(f"{file}: not the same pixels")
    return {"frames": clip.frames, "seconds": clip.duration, "ms": runs}


SIGLIP_BASE = {"model_type": "siglip_vision_model", "hidden_size": 768, "intermediate_size": 3072,
               "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 384, "patch_size": 16}  # fmt: skip
TEXT = {"model_type": "llama", "vocab_size": 320, "hidden_size": 768, "intermediate_size": 768,
        "num_hidden_layers": 1, "num_attention_heads": 12}  # fmt: skip


def status(key: str) -> int:
    """Bytes that /proc says of this process."""
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0])


@torch.inference_mode()
def encode(file: str, count: int):
    """Prints the peak of encoding so many frames above what was there before, and what the features take of it."""
    from config import LLaVAConfig
    from model import LLaVA

    model = LLaVA(LLaVAConfig(TEXT, SIGLIP_BASE, {})).to(torch.bfloat16).eval()
    item = model.views.clip(video.stream(file, count))
    model._encode_views(item.pixels[:1])
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    features = model._encode_views(item.pixels)
    print(
        json.dumps(
            {
                "peak": status("VmHWM") - before,
                "features": features.nbytes,
                "pixels": item.pixels.nbytes,
            }
        )
    )


EXACT = {"MALLOC_MMAP_THRESHOLD_": "131072"}  # bytes: glibc maps larger blocks, and unmaps them


def memory(file: Path) -> dict[str, list[dict]]:
    """What `encode` prints of 32 and of 128 frames, in turns."""
    runs: dict[str, list[dict]] = {"32": [], "128": []}
    for n in list(runs) * PEAKS:
        command = [sys.executable, __file__, "encode", str(file), n]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=os.environ | EXACT)
        runs[n].append(json.loads(done.stdout))
    return runs


def table(result: dict) -> str:
    clips, taken, ratios = result["clips"], result["memory"], {}
    lines = [", ".join([result["date"], *(f"{k} {v}" for k, v in result["versions"].items())])]
    for name, clip in clips.items():
        lines.append(f"{name}: {clip['frames']} frames, {clip['seconds']:.1f} s; ms, median (range) of "
                     f"{result['repeats']}")  # fmt: skip
        best = statistics.median(clip["ms"]["barellava"])
        for way, ms in clip["ms"].items():
            middle = statistics.median(ms)
            lines.append(
                f"  {way:14}{middle:8.0f} ({min(ms):.0f} to {max(ms):.0f}){middle / best:8.2f} x"
            )
        ratios[name] = statistics.median(clip["ms"]["every frame"]) / best
    longest = max(
        (name for name in clips if f"{COPIES} x {name}" in clips),
        key=lambda name: clips[name]["seconds"],
    )
    for name in (longest, f"{COPIES} x {longest}"):
        good = "met" if ratios[name] >= TARGET else "MISSED"
        lines.append(f"target >= {TARGET:g} x every frame, {name}: {good} ({ratios[name]:.2f})")
    middle = {
        n: {k: statistics.median(m[k] for m in runs) for k in ("peak", "features")}
        for n, runs in taken.items()
    }
    for n, runs in taken.items():
        peaks, (peak, size) = [m["peak"] / 1e6 for m in runs], middle[n].values()
        lines.append(f"encoding {n} frames: {peak / 1e6:.0f} MB ({min(peaks):.0f} to {max(peaks):.0f}) of {len(runs)}, "
                     f"features {size / 1e6:.0f} MB")  # fmt: skip
    more, features = (middle["128"][k] - middle["32"][k] for k in ("peak", "features"))
    good = "met" if more <= features else "MISSED"
    lines.append(f"target 128 frames <= 32 and the features ({features / 1e6:.0f} MB more): {good} "
                 f"({more / 1e6:.0f} MB more)")  # fmt: skip
    return "\n".join(lines)


def versions() -> dict[str, str]:
    return {
        "python": sys.version.split()[0],
        "av": video._av().__version__,
        "torch": torch.__version__,
    }


def main(argv: list[str]):
    if argv[:1] == ["encode"]:
        return encode(argv[1], int(argv[2]))
    parser = config.parser(__doc__)
    parser.add_argument("clips", type=Path, nargs="+")
    parser.add_argument("--frames", type=int, default=16, help="frames of a clip")
    parser.add_argument("--repeats", type=int, default=7, help="counted runs of each way")
    parser.add_argument("--json", type=Path, help="write every run's numbers to this file")
    args = parser.parse_args(argv)
    if min(args.frames, args.repeats) < 1:
        parser.error("--frames and --repeats start at 1")
    torch.set_num_threads(1)
    result = {"machine": "cpu", "date": datetime.date.today().isoformat(), "versions": versions(),
              "repeats": args.repeats, "clips": {}}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for file in args.clips:
            result["clips"][file.name] = measure(file, args.frames, args.repeats)
            long = longer(file, Path(folder, f"long{file.suffix}"))
            result["clips"][f"{COPIES} x {file.name}"] = measure(long, args.frames, args.repeats)
        result["memory"] = memory(long)
    print(table(result))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    config.cli(main, __doc__)
