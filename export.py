"""Write a model in another checkpoint layout, exactly, or refuse with the reason.

    python export.py --model out/demo --to hf-llava OUT               # Llava, for anyres LlavaNext
    python export.py --model DIR --to hf-llava OUT --transformers 4   # and for 4
    python export.py --model DIR --to llava-onevision OUT             # for image mode anyres_max
    python export.py --model DIR --to smolvlm OUT                     # or idefics3, of such a model
    python export.py --model DIR --to nanovlm OUT                     # of what was one before
    python export.py --model DIR --to tinyllava OUT                   # TinyLLaVA Factory or -Video
    python export.py --model DIR --to barellava OUT                   # our own layout
    python export.py --model DIR --to gguf OUT --dtype q8_0 --check   # for llama.cpp
    python export.py --model DIR --to hf-llava OUT --dtype bfloat16
    python export.py --model DIR --adapter ADAPTER --to hf-llava OUT  # a PEFT adapter merged
    python export.py --model DIR --to peft OUT                        # adapters of a LoRA run
    python export.py --model DIR --to gguf-lora OUT                   # the same for llama.cpp

Weights go out as they came in unless --dtype says otherwise. Tokenizer, image processor and, for
Hugging Face, the processor and the chat template go along, so that its chat pipelines work on the
folder as it is.

For llama.cpp there are two files: model.gguf, and mmproj.gguf for pictures. For K-quants, give
model.gguf to its llama-quantize.
--check reads both again, compares every number and token with the model and, where the package
xllamacpp is installed, asks five questions in both. What llama.cpp computes otherwise is refused.

OUT must be new or empty. It has its files only when all of them are written; after a kill the same
command begins anew. Each layout is written by its own file in checkpoints/, the same that reads it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError

import command_line
from checkpoints import gguf, gguf_check, gguf_file, gguf_lora, layouts, peft, weights
from checkpoints.files import flush, parse_json, resolve, write_file, writing
from checkpoints.owned import HARMLESS, MARK, marked, own
from config import UserError
from inputs.tokenizer import load_tokenizer
from model import LLaVA

# What writes each layout that --to names. Layouts without such a name are only read.
WRITERS = {}
for layout in layouts.LAYOUTS.values():
    if layout.export_name:
        WRITERS[layout.export_name] = layout.write

ADAPTERS = ("peft", "gguf-lora")  # what --to names for a run's adapters


def export(
    model: LLaVA,
    tokenizer,
    to: str,
    folder: Path,
    transformers: int = 5,
    file_type: str | None = None,
):
    """Write a model and its tokenizer (or None) in a layout.

    Raises UserError for what the layout cannot express. transformers: the major version that a
    folder for Hugging Face is meant for. file_type: that of GGUF files, see checkpoints/gguf.py.
    """
    if to == "gguf":
        gguf.write(folder, model, tokenizer, file_type)
    else:
        WRITERS[to](folder, model, tokenizer, transformers)


# --------------------------------------------------------------------------------------- the folder

# The mark (checkpoints/owned.py) of a folder whose export has begun and has not ended. Until then
# the files are written to STAGING, and then moved out; MOVED names those that are.
UNFINISHED = "unfinished export"
STAGING = ".unfinished"
MOVED = ".unfinished.json"


@contextlib.contextmanager
def whole_folder(out: Path):
    """Yield a folder to write files into; when the block ends, they are in `out`.

    A kill at any moment leaves an `out` that the next start takes for its own, because it is marked
    until every file is in its place. No file has its name there before all are written. config.json
    is moved last, so that a folder with it is whole. Raises UserError if `out` holds anything else,
    or cannot be written.
    """
    with writing(out):
        is_new = not out.exists()
        check_free(out)
        own(out, UNFINISHED)
        clear(out)
        if not is_empty(out):
            raise UserError(out, "holds files that no export has written", "name a new folder")
        (out / STAGING).mkdir()

    try:
        yield out / STAGING
        with writing(out):
            move_out(out)
    except BaseException as error:
        # After a mistake the folder is as it was before. Whatever cannot be removed is marked.
        with contextlib.suppress(OSError):
            clear(out)
            (out / MARK).unlink()
            if is_new:
                out.rmdir()
        if isinstance(error, OSError | SafetensorError):
            with writing(out):
                raise
        raise


def check_free(out: Path):
    """Raise UserError unless `out` is new, empty, or what an export that did not end has left."""
    if not out.exists() or marked(out) == UNFINISHED:
        return
    if not out.is_dir() or not is_empty(out):
        raise UserError(out, "exists", "name a new folder")


def is_empty(out: Path) -> bool:
    """Return whether a folder holds nothing but what counts as nothing, and our mark."""
    names = {path.name for path in out.iterdir()} - HARMLESS - {MARK}
    return all(is_half_a_mark(name) for name in names)


def is_half_a_mark(name: str) -> bool:
    """Return whether a file is what a kill while the mark was written has left."""
    return name.startswith(f".{MARK}.")


def clear(out: Path):
    """Remove what an export that did not end has written to `out`. The mark stays."""
    shutil.rmtree(out / STAGING, ignore_errors=True)
    for path in out.iterdir():
        if is_half_a_mark(path.name):
            path.unlink()
    try:
        names = parse_json((out / MOVED).read_bytes())
    except (OSError, ValueError):
        return  # nothing was moved yet
    for name in names:
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    (out / MOVED).unlink()


def move_out(out: Path):
    """Move all that is in STAGING into `out`, and then take the mark away."""
    staging = out / STAGING
    names = sorted(path.name for path in staging.iterdir())
    names.sort(key=lambda name: name == "config.json")

    # The names are on the disk before the first file is moved: then `clear` knows what is ours.
    write_file(staging / MOVED, json.dumps(names))
    for name in (MOVED, *names):
        os.rename(staging / name, out / name)
    flush(out)
    staging.rmdir()

    # This is the moment at which the export is done.
    (out / MARK).unlink()
    (out / MOVED).unlink()


# --------------------------------------------------------------------------------------- the export


def export_peft(adapter: Path, out: Path):
    """Copy the PEFT files that train.py left beside a model tuned with LoRA. Raises UserError."""
    weights_file = adapter / "adapter_model.safetensors"
    config_file = adapter / "adapter_config.json"
    if not config_file.exists():
        fix = "give the output folder of a run that tuned something as lora"
        raise UserError(adapter, "no adapters", fix)

    tensors = weights.read_file(weights_file)  # refuses a damaged file
    with whole_folder(out) as folder:
        for file in (weights_file, config_file):
            write_file(folder / file.name, file.read_bytes())
    parameters = sum(tensor.numel() for tensor in tensors.values())
    print(f"{out}: peft, {parameters / 1e6:.1f}M parameters")


def export_gguf_lora(folder: Path, adapter: Path, out: Path, dtype: str | None):
    """Write the adapter of a run for llama.cpp. folder: the run's model. Raises UserError."""
    model = LLaVA.from_pretrained(folder, None)

    # A run's model has its adapter in the weights already. Here only its names are needed.
    model.config = replace(model.config, merged_adapters=())
    peft.load_adapter(adapter, model, peft.ADAPTED)
    with whole_folder(out) as unfinished:
        gguf_lora.write(unfinished, model, dtype)


def check_gguf(folder: Path, model: LLaVA, tokenizer, file_type: str | None):
    """Compare GGUF files with the model, and print what both answer. Raises UserError."""
    gguf.check(folder, model, tokenizer, file_type)
    print("check: every tensor, token and key is that of the model")

    answers = gguf_check.both_answers(folder, model.float(), tokenizer)
    if answers is None:
        print("check: no questions asked, xllamacpp is not installed (pip install xllamacpp)")
        return
    for question, ours, theirs in answers:
        print(f"  {question}\n    here       {ours!r}\n    llama.cpp  {theirs!r}")
    same = sum(ours == theirs for _, ours, theirs in answers)
    print(f"check: {same} of {len(answers)} answers are the same")


def open_model(folder: Path, dtype: torch.dtype | None, allow_pickle: bool) -> LLaVA:
    """Return the model of a folder in `dtype`; None keeps the types of its files."""
    model = LLaVA.from_pretrained(folder, dtype, allow_pickle=allow_pickle)
    if dtype is not None:
        # Tensors that our forward pass does not use are written back too. Loading leaves them in
        # the types of their files.
        converted = {}
        for name, tensor in model.vision_tower.spares.items():
            converted[name] = tensor.to(dtype)
        model.vision_tower.spares = converted
    return model


def open_tokenizer(folder: Path):
    """Return the tokenizer of a folder. Where it has none that we can read: warn, return None."""
    try:
        return load_tokenizer(folder)
    except ValueError as e:
        print(f"warning: exported without a tokenizer: {e}")
        return None


def arguments(argv: list[str]):
    """Return the command line's options."""
    parser = command_line.parser(__doc__)
    option = parser.add_argument
    option("out", help="folder to write; must not exist, or be empty")
    option("--model", required=True, help="folder or Hugging Face id, in any layout that we read")
    option("--to", required=True, choices=(*WRITERS, "gguf", *ADAPTERS), help="the layout")
    option("--adapter", help="folder of a PEFT adapter to merge first")
    option(
        "--dtype", choices=gguf_file.FILE_TYPES, help="of the weights (as they are); q: gguf only"
    )
    option(
        "--transformers",
        type=int,
        choices=(4, 5),
        default=5,
        help="hf-llava: for which of them (5)",
    )
    option("--check", action="store_true", help="gguf: read it again, and ask it in llama.cpp")
    option("--allow-pickle", action="store_true", help="also read pytorch_model.bin, tensors only")
    return parser.parse_args(argv)


def main(argv: list[str]):
    args = arguments(argv)
    if not args.out.strip():
        raise UserError("OUT", "empty", "name a new folder")
    out = Path(args.out)
    with writing(out):
        check_free(out)

    if args.to != "gguf":
        for name, value in (
            ("--check", args.check),
            ("--dtype", args.dtype in gguf_file.QUANTIZED),
        ):
            if value:
                raise UserError(f"{name} with --to {args.to}", "of GGUF files only", "leave it out")

    # Adapters are files of their own.
    folder = resolve(args.model, allow_pickle=args.allow_pickle)
    if args.to == "peft":
        export_peft(folder / "adapter", out)
        return
    if args.to == "gguf-lora":
        export_gguf_lora(folder, Path(args.adapter or folder / "adapter"), out, args.dtype)
        print_files(out, args.to)
        return

    # The writer of GGUF files converts each tensor when it writes it.
    dtype = None
    if args.dtype and args.to != "gguf":
        dtype = getattr(torch, args.dtype)
    model = open_model(folder, dtype, args.allow_pickle)
    if args.adapter:
        peft.merge_adapter(model, Path(args.adapter))
    tokenizer = open_tokenizer(folder)
    with whole_folder(out) as unfinished:
        export(model, tokenizer, args.to, unfinished, args.transformers, args.dtype)
        if args.check:
            check_gguf(unfinished, model, tokenizer, args.dtype)

    parameters = sum(p.numel() for p in model.parameters())
    print_files(out, f"{args.to}, {parameters / 1e6:.1f}M parameters")
    if args.to == "gguf":
        for line in gguf.notes(out, model, args.dtype):
            print(line)


def print_files(out: Path, what: str):
    """Say what was written."""
    files = sorted(out.iterdir())
    size = sum(file.stat().st_size for file in files)
    print(f"{out}: {what}, {size / 1e9:.2f} GB")
    for file in files:
        print(f"  {file.name}")


if __name__ == "__main__":
    command_line.cli(main, __doc__)
