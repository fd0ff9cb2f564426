"""Our path of bench/training.py: train.py's own functions on packed micro-batches."""

from __future__ import annotations

import dataclasses

import torch

import lora
import train
from bench.training_cases import LEARNING_RATES, Case, fill_by_name, make_rows, peak_memory
from checkpoints import layouts, peft
from checkpoints.names import rename, reverse
from config import Model, Stage, Tune
from inputs.sample import Sample
from model import LLaVA
from packing import bin_pack, pack_samples
from training import estimate, memory
from training.estimate import RowSize


class Path:
    """A model and the micro-batches of one step."""

    def __init__(self, case: Case, text: dict, vision: dict, device: str):
        imports = peak_memory(device)
        self.device = device
        self.stage = Stage(
            tune=Tune(llm=case.tune),
            learning_rate=LEARNING_RATES[case.tune],
            warmup_ratio=0.0,
            micro_batch_tokens=case.budget,
        )

        recipe = Model(llm_config=text, vision_config=vision)
        with torch.device(device):
            self.model = LLaVA(layouts.config_from_recipe(recipe, ""))
        fill_model(self.model)
        peft.adapt(self.model, [self.stage], train.PARTS)
        fill_adapters(self.model)
        train.set_trainable(self.model, self.stage.tune)

        rows = make_rows(case, text, vision)
        operations, mean = estimate_rows(self.model, self.stage, rows)
        bf16 = case.dtype == "bfloat16"
        if bf16:
            train.round_frozen(self.model)
        if device == "cuda":  # as a user would: recompute only where it does not fit
            needs = memory.measure(self.model, self.stage, mean, bf16).total
            total = torch.cuda.get_device_properties(0).total_memory
            self.model.language_model.model.gradient_checkpointing = needs > total
        self.autocast = torch.autocast(device, torch.bfloat16, enabled=bf16)
        self.optimizer = train.make_optimizer(self.model, self.stage)

        self.batches = []
        for numbers in bin_pack([len(row.ids) for row in rows], case.budget):
            batch = pack_samples([rows[j] for j in numbers])
            if device == "cuda":
                batch = batch.pin_memory()
            self.batches.append(batch)
        self.supervised = sum(batch.supervised for batch in self.batches)

        self.facts = {
            "imports": imports,
            "tokens": sum(len(row.ids) for row in rows),
            "images": sum(len(row.items) for row in rows),
            "supervised": self.supervised,
            "flops": operations,
            "batches": len(self.batches),
            "parameters": lora.count(self.model),
            "recompute": self.model.language_model.model.gradient_checkpointing,
        }

    def set_dropout(self, p: float):
        for adapter in lora.adapters(self.model.language_model).values():
            adapter.options = dataclasses.replace(adapter.options, dropout=p)

    def step(self) -> tuple[float, float]:
        """Make an optimizer step; return its loss and gradient norm."""
        losses = []
        for batch in self.batches:
            with self.autocast:
                loss = self.model.loss(batch.to(self.device)) / self.supervised
                loss.backward()
            losses.append(loss.detach())
        norm = train.update(self.optimizer, self.stage, 0, 10**9)
        return sum(losses).item(), norm


def fill_model(model: LLaVA):
    """Fill the parameters by their names in the published files."""
    for part in train.PARTS.values():
        module = getattr(model, part)
        to_published = reverse(getattr(module, "rename", ()))
        named = {}
        for name, p in module.named_parameters():
            published = f"{part}.{rename(name, to_published)}"
            named[published.replace(".vision_model.", ".")] = p
        fill_by_name(named)


def fill_adapters(model: LLaVA):
    """Fill the adapters of the language model by their names in PEFT's files."""
    to_published = reverse(model.language_model.rename)
    for name, adapter in lora.adapters(model.language_model).items():
        published = rename(f"{name}.weight", to_published).removesuffix("weight")
        key = f"language_model.{published}"
        fill_by_name({f"{key}lora_A.weight": adapter.lora_A, f"{key}lora_B.weight": adapter.lora_B})


def estimate_rows(model: LLaVA, stage: Stage, rows: list[Sample]) -> tuple[float, RowSize]:
    """Return the FLOPs that the rows ask for, and the row that is their mean in everything."""
    needs = []
    for row in rows:
        positions = len(row.items) * model.image_tokens
        supervised = int((row.labels >= 0).sum())
        needs.append(RowSize(len(row.items), positions, len(row.ids) - positions, supervised))

    operations = 0.0
    for need in needs:
        operations += estimate.operations(model, stage, need, recompute=False)

    mean = RowSize(
        views=sum(need.views for need in needs) / len(needs),
        positions=sum(need.positions for need in needs) / len(needs),
        text=sum(need.text for need in needs) / len(needs),
        supervised=sum(need.supervised for need in needs) / len(needs),
        items=sum(need.views for need in needs) / len(needs),
    )
    return operations, mean
