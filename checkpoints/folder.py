"""What the folders of all layouts share: tensors under a layout's names, and the files around them.

    Renamed(checkpoint, table)               # to read: tensors of a checkpoint under our names
    named_tensors(model, table)              # to write: tensors of a model under a layout's names
    write_folder(folder, tensors, files)     # weights first, config.json last
    card(model, opened_by)                   # the README.md of an exported folder

The model is a LLaVA (model.py). It comes as an argument: model.py builds on this wing, so this wing
cannot import it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from checkpoints import weights
from checkpoints.files import write_file
from checkpoints.names import Table, rename, reverse
from config import LLaVAConfig, UserError
from inputs.image_modes import MODES

# In config.json of every layout: SHA-256 of each adapter that is merged into the weights.
MERGED = "merged_adapters"

# ----------------------------------------------------------------------------------------- reading


class Renamed(Mapping):
    """A checkpoint seen through a layout's table of names.

    Its keys start with `language_model.`, `vision_tower.` or `connector.`. A tensor is read when it
    is asked for. Raises UserError for two tensors of the file that would get one name.
    """

    def __init__(self, source: Mapping, table: Table):
        self.source = source
        self.theirs: dict[str, str] = {}  # our name -> the name in the file

        for theirs in source:
            ours = rename(theirs, table)
            if ours in self.theirs:
                what = f"the same tensor as {self.theirs[ours]}"
                raise UserError(source.locate(theirs), what, "remove one of the two")
            self.theirs[ours] = theirs

    def __getitem__(self, key: str) -> Tensor:
        return self.source[self.theirs[key]]

    def __iter__(self):
        return iter(self.theirs)

    def __len__(self):
        return len(self.theirs)

    def locate(self, key: str) -> str:
        """Return `file:key` for messages, the key as it stands in the file."""
        return self.source.locate(self.theirs.get(key, key))


# ----------------------------------------------------------------------------------------- writing


def named_tensors(model, table: Table = (), hf_names: bool = True) -> dict[str, Tensor]:
    """Return every tensor of a LLaVA under the names of a layout.

    table: the layout's table of names. hf_names: whether the layout keeps Hugging Face's names
    inside language model and encoder, as all do but ours.
    """
    # Behind the prefix of its part, a name is ours or Hugging Face's.
    tensors = {}
    for name in model.PARTS:
        part = getattr(model, name)
        part_table = ()
        if hf_names:
            part_table = getattr(part, "rename", ())
        tensors |= weights.tensors(part, part_table, f"{name}.")

    # The layout has names of its own for the prefixes.
    back = reverse(table)
    return {rename(key, back): tensor for key, tensor in tensors.items()}


def write_folder(
    folder: Path, tensors: dict[str, Tensor], files: dict[str, dict | str], tokenizer=None
):
    """Write a whole checkpoint: tokenizer, weights, small files and, last, config.json.

    files: name -> a text, or what becomes JSON. A folder that has a config.json is whole.
    """
    if tokenizer:
        tokenizer.save(folder)
    weights.save(folder, tensors)

    # config.json comes last, because it says that all the rest is there.
    names = [name for name in files if name != "config.json"]
    for name in [*names, "config.json"]:
        content = files[name]
        if not isinstance(content, str):
            content = json.dumps(content, indent=2, ensure_ascii=False)
        write_file(folder / name, content + "\n")


def has_head_bias(model) -> bool:
    """Return whether the head of a LLaVA's language model has a bias that changes its logits.

    One without values, in a plan, counts: training moves it.
    """
    bias = model.language_model.lm_head.bias
    if bias is None:
        return False
    return bias.is_meta or bool(bias.any())


def merged_field(c: LLaVAConfig) -> dict:
    """Return the field of config.json that names the adapters in the weights, if there are any."""
    if not c.merged_adapters:
        return {}
    return {MERGED: list(c.merged_adapters)}


def folder_readme(model, opened_by: str, videos: bool = True) -> str:
    """Return README.md of an exported folder: its parts, its settings and what opens it.

    videos: whether the layout can say how many frames of a video are seen.
    """
    c = model.config
    lines = ["# A small multimodal model", ""]

    for part, key, config in (("language model", "llm", c.text), ("encoder", "vision", c.vision)):
        source = c.sources.get(key)
        if not source:
            source = f"{config.get('model_type')}, of random weights or an unknown source"
        lines.append(f"- {part}: {source}")

    mode = c.image_mode
    if MODES[mode].tiled:
        mode = f"{mode}, grids {c.image_grids}"
    size = f"{model.views.tokens_text} tokens for an image of one view"
    lines.append(f"- connector: {c.connector}; {size}, image mode {mode}")

    if videos:
        frames = f"{c.frames}"
        if c.fps > 0:
            frames += f" at most, {c.fps:g} a second"
        lines.append(f"- frames of a video: {frames}")

    millions = sum(p.numel() for p in model.parameters()) / 1e6
    lines.append(f"- chat template: {c.template}")
    lines.append(f"- {millions:.1f}M parameters")
    lines.append("")
    lines.append(f"Opens in {opened_by}")
    return "\n".join(lines)
