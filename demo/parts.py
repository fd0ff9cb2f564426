"""Take a trained model apart: its language model and its encoder as folders of their own.

    python -m demo.parts out/lab/start out/lab/parts    # out/lab/parts/llm, out/lab/parts/vision

A recipe names them as model.llm and model.vision and joins them by a new connector, as it would
with parts from Hugging Face, whose layout they have. The model is one of this project's own layout,
as train.py leaves it, with a Llama and a SigLIP.
"""

import shutil
from pathlib import Path

from safetensors.torch import save_file

import command_line
from checkpoints.fields import Fields
from checkpoints.files import read_json
from checkpoints.weights import read_file
from demo.world import write_json

# What a part is called in a recipe, its attribute in LLaVA, its table in config.json, and the small
# files that go with it.
PARTS = (
    ("llm", "language_model", "text_config", ("tokenizer.json", "tokenizer_config.json")),
    ("vision", "vision_tower", "vision_config", ("preprocessor_config.json",)),
)


def take_apart(model: Path, out: Path):
    """Write the parts of a model into the new folder `out`. Raises UserError if it is none."""
    file = model / "config.json"
    config = Fields(read_json(file), file, fix="name the output of a run of train.py")
    tensors = read_file(model / "model.safetensors")

    for part, attribute, table, files in PARTS:
        folder = out / part
        folder.mkdir(parents=True)
        write_json(folder / "config.json", config.table(table).values)
        for name in files:
            shutil.copy(model / name, folder)

        prefix = f"{attribute}."
        own = {}
        for name, tensor in tensors.items():
            if name.startswith(prefix):
                own[name.removeprefix(prefix)] = tensor
        save_file(own, folder / "model.safetensors")


def main(argv: list[str]):
    parser = command_line.parser(__doc__)
    parser.add_argument("model", metavar="MODEL", type=Path, help="output of a run")
    parser.add_argument("out", metavar="OUT", type=Path, help="new folder to write")
    args = parser.parse_args(argv)
    take_apart(args.model, args.out)


if __name__ == "__main__":
    command_line.cli(main, __doc__)
