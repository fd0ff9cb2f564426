"""The peer's path of bench/nanovlm.py: nanoVLM's own code, driven as its train.py does.

nanoVLM's packages are called `models` and `data`, so its folder goes to the front of sys.path, and
nothing of ours that is called so may be imported before.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path as Folder

import torch
from torch import nn

from bench.nanovlm import (
    ALONE,
    BATCH,
    BUFFER,
    CONNECTOR_RATE,
    LEARNING_RATE,
    make_rows,
    peak_memory,
)
from checkpoints.layouts import read_config
from model import tiling_of
from packing import IMAGE_TOKEN


def import_peer(peer: Folder):
    """Make nanoVLM's packages importable, without the packages that only its transforms need.

    No picture is resized or cut by nanoVLM here.
    """
    import transformers  # noqa: F401 (it looks for torchvision, and would take the stand-in for it)

    members = {
        "torchvision": (),
        "torchvision.transforms": (),
        "torchvision.transforms.functional": ("resize", "InterpolationMode"),
        "einops": ("rearrange",),
    }
    for package in ("torchvision", "einops"):
        if importlib.util.find_spec(package) is not None:
            continue
        for name in members:
            if name.partition(".")[0] == package:
                module = types.ModuleType(name)
                for member in members[name]:
                    setattr(module, member, types.SimpleNamespace(BICUBIC=None))
                sys.modules[name] = module
    if not hasattr(sys.modules.get("torchvision"), "transforms"):
        torchvision = importlib.import_module("torchvision")
        torchvision.transforms = importlib.import_module("torchvision.transforms")
    sys.path.insert(0, str(peer))


def write_model(peer: Folder, folder: Folder, fields: dict):
    """Write a model of random weights with these fields of VLMConfig."""
    import_peer(peer)
    from models.config import VLMConfig
    from models.vision_language_model import VisionLanguageModel

    torch.manual_seed(0)
    VisionLanguageModel(VLMConfig(**fields), load_backbone=False).save_pretrained(str(folder))


class Rows:
    """Samples as ConstantLengthDataset reads them."""

    def __init__(self, samples: list[dict], tokenizer, image_tokens: int):
        self.samples = samples
        self.dataset = samples
        self.tokenizer = tokenizer
        self.mp_image_token_length = image_tokens

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> dict:
        return dict(self.samples[i])


class Path:
    """A model and the padded batches of one step."""

    def __init__(self, peer: Folder, folder: Folder):
        import_peer(peer)
        from data.advanced_datasets import ConstantLengthDataset
        from data.collators import VQACollator
        from models.config import TrainConfig
        from models.vision_language_model import VisionLanguageModel

        imports = peak_memory("cpu")
        self.model = VisionLanguageModel.from_pretrained(str(folder))
        c = self.model.cfg
        tok = self.model.tokenizer
        self.make_optimizer()
        self.views = tiling_of(read_config(folder))
        self.samples = [self.sample(row) for row in make_rows(folder)]

        train = TrainConfig()
        packed = ConstantLengthDataset(
            Rows(self.samples, tok, c.mp_image_token_length),
            max_sample_length=train.max_sample_length,
            seq_length=c.lm_max_length,
            num_of_sequences=BUFFER,
            queue_size=8,
            max_images_per_example=train.max_images_per_example,
            max_images_per_knapsack=train.max_images_per_knapsack,
        )
        collate = VQACollator(tok, c.lm_max_length)
        sequences = list(packed)
        self.batches = []
        for i in range(0, len(sequences), BATCH):
            self.batches.append(collate(sequences[i : i + BATCH]))
        self.facts = {
            "imports": imports,
            "batches": len(self.batches),
            "positions": sum(batch["input_ids"].numel() for batch in self.batches),
        }

    def sample(self, row) -> dict:
        """Return a row as VQADataset does: labels shifted, the text of pictures in place."""
        placeholder = torch.tensor(self.views.placeholder(row.items[0].shape))
        placeholder[placeholder == IMAGE_TOKEN] = self.model.tokenizer.image_token_id
        ids = row.ids.clone()
        ids[ids == IMAGE_TOKEN] = placeholder
        labels = row.labels.roll(-1)
        labels[-1] = -100
        return {
            "input_ids": ids,
            "labels": labels,
            "attention_mask": torch.ones_like(ids),
            "images": [item.pixels for item in row.items],
        }

    def make_optimizer(self):
        """Set up AdamW as nanoVLM has it, with the same rates as ours."""
        groups = [
            {"params": list(self.model.MP.parameters()), "lr": CONNECTOR_RATE},
            {"params": list(self.model.vision_encoder.parameters()), "lr": LEARNING_RATE},
            {"params": list(self.model.decoder.parameters()), "lr": LEARNING_RATE},
        ]
        self.optimizer = torch.optim.AdamW(groups)
        self.trained = [p for group in self.optimizer.param_groups for p in group["params"]]

    def alone(self) -> dict:
        """Return the loss of each of the first rows, and the norm of their mean's gradient."""
        self.model.train()
        losses = []
        for sample in self.samples[:ALONE]:
            _, loss = self.model(
                sample["input_ids"][None], [sample["images"]], targets=sample["labels"][None]
            )
            (loss / ALONE).backward()
            losses.append(loss.item())
        norm = nn.utils.clip_grad_norm_(self.trained, float("inf")).item()
        self.optimizer.zero_grad()
        return {"losses": losses, "norm": norm}

    def step(self) -> float:
        """Make an optimizer step; return its loss."""
        total = 0.0
        for batch in self.batches:
            with torch.autocast("cpu", torch.bfloat16):
                _, loss = self.model(
                    batch["input_ids"],
                    batch["images"],
                    attention_mask=batch["attention_mask"],
                    targets=batch["labels"],
                )
            loss = loss / len(self.batches)
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(self.trained, max_norm=1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total
