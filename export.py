"""Write a model in another checkpoint layout, exactly, or refuse with the reason.

    python export.py --model out/demo --to hf-llava OUT               # Llava, for anyres LlavaNext
    python export.py --model DIR --to hf-llava OUT --transformers 4   # differs for Gemma only
    python export.py --model DIR --to tinyllava OUT                   # TinyLLaVA Factory or -Video
    python export.py --model DIR --to barellava OUT                   # our own layout
    python export.py --model DIR --to hf-llava OUT --dtype bfloat16
    python export.py --model DIR --adapter ADAPTER --to hf-llava OUT  # a PEFT adapter merged
    python export.py --model DIR --to peft OUT                        # adapters of a LoRA run

Weights go out as they came in unless --dtype says otherwise. Tokenizer, image processor and, for
Hugging Face, the processor and the chat template go along, so that its chat pipelines work on the
folder as it is.

Each layout is written by its own file in checkpoints/, the same that reads it.
"""

from __future__ import annotations

from pathlib import Path

import torch

import config
from checkpoints import layouts, peft, weights
from checkpoints.files import resolve, write_file
from config import UserError
from inputs.tokenizer import load_tokenizer
from model import LLaVA

# What writes each layout that --to names. Layouts without such a name are only read.
WRITERS = {}
for layout in layouts.LAYOUTS.values():
    if layout.export_name:
        WRITERS[layout.export_name] = layout.write


def export(model: LLaVA, tokenizer, to: str, folder: Path, transformers: int = 5):
    """Write a model and its tokenizer (or None) in a layout.

    Raises UserError for what the layout cannot express. transformers: the major version that a
    folder for Hugging Face is meant for.
    """
    WRITERS[to](folder, model, tokenizer, transformers)


def export_peft(adapter: Path, out: Path):
    """Copy the PEFT files that train.py left beside a model tuned with LoRA. Raises UserError."""
    weights_file = adapter / "adapter_model.safetensors"
    config_file = adapter / "adapter_config.json"
    if not config_file.exists():
        fix = "give the output folder of a run that tuned something as lora"
        raise UserError(adapter, "no adapters", fix)

    tensors = weights.read_file(weights_file)  # refuses a damaged file
    write_file(out / weights_file.name, weights_file.read_bytes())
    write_file(out / config_file.name, config_file.read_text())
    parameters = sum(tensor.numel() for tensor in tensors.values())
    print(f"{out}: peft, {parameters / 1e6:.1f}M parameters")


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
    parser = config.parser(__doc__)
    option = parser.add_argument
    option("out", help="folder to write; must not exist, or be empty")
    option("--model", required=True, help="folder or Hugging Face id, in any layout that we read")
    option("--to", required=True, choices=(*WRITERS, "peft"), help="the layout")
    option("--adapter", help="folder of a PEFT adapter to merge first")
    option(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (as they are)"
    )
    option(
        "--transformers",
        type=int,
        choices=(4, 5),
        default=5,
        help="hf-llava: for which of them (5)",
    )
    option("--allow-pickle", action="store_true", help="also read pytorch_model.bin, tensors only")
    return parser.parse_args(argv)


def main(argv: list[str]):
    args = arguments(argv)
    out = Path(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(out, "exists", "name a new folder")

    # Adapters are files of their own, so no model is loaded for them.
    folder = resolve(args.model, allow_pickle=args.allow_pickle)
    if args.to == "peft":
        export_peft(folder / "adapter", out)
        return

    dtype = None
    if args.dtype:
        dtype = getattr(torch, args.dtype)
    model = open_model(folder, dtype, args.allow_pickle)
    if args.adapter:
        peft.merge_adapter(model, Path(args.adapter))
    export(model, open_tokenizer(folder), args.to, out, args.transformers)

    # Say what was written.
    parameters = sum(p.numel() for p in model.parameters())
    files = sorted(out.iterdir())
    size = sum(file.stat().st_size for file in files)
    print(f"{out}: {args.to}, {parameters / 1e6:.1f}M parameters, {size / 1e9:.2f} GB")
    for file in files:
        print(f"  {file.name}")


if __name__ == "__main__":
    config.cli(main, __doc__)
