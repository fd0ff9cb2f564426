"""The peer's path of bench/training.py: transformers (and PEFT), as TinyLLaVA Factory has them."""

from __future__ import annotations

import importlib.util

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, SiglipVisionModel

from bench.training_cases import LEARNING_RATES, Case, fill_by_name, make_rows, peak_memory
from inputs.sample import Sample
from packing import IGNORE, IMAGE_TOKEN

PER_DEVICE = 8  # rows of a micro-batch in the Factory's scripts


class Path:
    """A model and the padded micro-batches of one step: B rows of T tokens, n of a picture."""

    def __init__(self, case: Case, text: dict, vision: dict, device: str):
        if case.tune == "lora":
            import peft  # noqa: F401 (it counts among the imports)
        imports = peak_memory(device)
        self.device = device
        self.bf16 = case.dtype == "bfloat16"
        self.dtype = getattr(torch, case.dtype)

        flash = device == "cuda" and self.bf16 and importlib.util.find_spec("flash_attn")
        attention = "flash_attention_2" if flash else "sdpa"
        self.build(text, vision, attention)
        if case.tune == "lora":
            self.adapt()
        self.lm.gradient_checkpointing_enable()
        self.lm.enable_input_require_grads()
        self.lm.train()
        self.make_optimizer(LEARNING_RATES[case.tune])
        self.model = self.lm
        self.droppers = []
        for module in self.lm.modules():
            if isinstance(module, nn.Dropout) and module.p > 0:
                self.droppers.append(module)

        rows = make_rows(case, text, vision)
        if case.tune == "full":  # the Factory's group_by_modality_length
            rows.sort(key=lambda row: not row.items)
        self.supervised = sum(int((row.labels >= 0).sum()) for row in rows)
        self.batches = []
        padded = 0
        for i in range(0, len(rows), PER_DEVICE):
            batch = self.collate(rows[i : i + PER_DEVICE], vision["image_size"])
            padded += batch[0].numel()
            self.batches.append(batch)

        self.facts = {
            "imports": imports,
            "padding": 1 - sum(len(row.ids) for row in rows) / padded,
            "attention": attention,
            "transformers": transformers.__version__,
        }

    def build(self, text: dict, vision: dict, attention: str):
        """Make the parts in float32 and fill them by name; the encoder is frozen."""
        options = {"dtype": torch.float32, "attn_implementation": attention}
        with torch.device(self.device):
            self.lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(**text), **options)
            self.tower = SiglipVisionModel._from_config(AutoConfig.for_model(**vision), **options)
            self.connector = nn.Sequential(
                nn.Linear(vision["hidden_size"], text["hidden_size"]),
                nn.GELU(),
                nn.Linear(text["hidden_size"], text["hidden_size"]),
            )
        self.parts = {
            "language_model": self.lm,
            "vision_tower": self.tower,
            "connector": self.connector,
        }
        for part, module in self.parts.items():
            named = {}
            for name, p in module.named_parameters():
                named[f"{part}.{name}".replace(".vision_model.", ".")] = p
            fill_by_name(named)
        self.tower.requires_grad_(False)
        self.lm.config.use_cache = False

    def adapt(self):
        """Freeze the language model and adapt its linears at rank 128, but for the head."""
        import peft

        self.lm.requires_grad_(False)
        targets = set()
        for name, module in self.lm.named_modules():
            if isinstance(module, nn.Linear):
                targets.add(name.split(".")[-1])
        options = peft.LoraConfig(
            r=128,
            lora_alpha=256,
            lora_dropout=0.05,
            target_modules=sorted(targets - {"lm_head"}),
        )
        adapted = peft.get_peft_model(self.lm, options, autocast_adapter_dtype=False)

        named = {}
        for name, p in adapted.named_parameters():
            if ".lora_" in name:
                name = name.replace(".default", "")
                named[name.replace("base_model.model.", "language_model.", 1)] = p
        fill_by_name(named)

    def make_optimizer(self, learning_rate: float):
        """Set up AdamW on float32 weights: in bf16, as with DeepSpeed, on copies of the weights."""
        self.trained = []
        for module in (self.lm, self.connector):
            self.trained += [p for p in module.parameters() if p.requires_grad]
        self.masters = self.trained
        if self.bf16:
            self.masters = [p.detach().clone().requires_grad_() for p in self.trained]

        # Parameters only: the table of rope's frequencies stays in float32, as in from_pretrained.
        for module in self.parts.values():
            for p in module.parameters():
                p.data = p.data.to(self.dtype)
        self.optimizer = torch.optim.AdamW(
            self.masters, lr=learning_rate, betas=(0.9, 0.999), weight_decay=0.0, fused=True
        )

    def collate(self, rows: list[Sample], side: int) -> list[Tensor]:
        """Return padded ids and labels and their mask (B, T), pictures, and which rows have one.

        A row without a picture gets a blank one, which is encoded and then not used.
        """
        pad = nn.utils.rnn.pad_sequence
        ids = pad([row.ids for row in rows], True, 0)
        labels = pad([row.labels for row in rows], True, IGNORE)
        mask = pad([torch.ones_like(row.ids) for row in rows], True)

        pictures = []
        for row in rows:
            if row.items:
                pictures.append(row.items[0].pixels[0])
            else:
                pictures.append(torch.zeros(3, side, side))
        pixels = torch.stack(pictures).to(self.dtype)  # (B, 3, side, side)
        seen = torch.tensor([bool(row.items) for row in rows])

        batch = [ids, labels, mask, pixels, seen]
        if self.device == "cuda":
            batch = [tensor.pin_memory() for tensor in batch]
        return batch

    def set_dropout(self, p: float):
        for module in self.droppers:
            module.p = p

    def loss(self, batch: list[Tensor]) -> Tensor:
        """Return the loss of a micro-batch over the supervised tokens of the whole step."""
        ids, labels, mask, pixels, seen = [t.to(self.device, non_blocking=True) for t in batch]
        hidden_states = self.tower(pixels, output_hidden_states=True).hidden_states[-2]
        features = self.connector(hidden_states[:, 1:])[seen]  # (pictures, n, D)
        embedded = self.lm.get_input_embeddings()(ids.clamp(min=0))  # (B, T, D)
        embedded = embedded.masked_scatter((ids == IMAGE_TOKEN)[..., None], features)
        output = self.lm(
            inputs_embeds=embedded,
            attention_mask=mask,
            labels=labels,
            num_items_in_batch=self.supervised,
        )
        return output.loss

    def step(self) -> tuple[float, float]:
        """Make an optimizer step; return its loss and gradient norm."""
        total = 0.0
        for batch in self.batches:
            loss = self.loss(batch)
            loss.backward()
            total += loss.detach()

        # Gradients go to the float32 copies, and the copies' new values come back.
        if self.bf16:
            for master, p in zip(self.masters, self.trained, strict=True):
                master.grad = p.grad.float()
                p.grad = None
        norm = nn.utils.clip_grad_norm_(self.masters, 1.0).item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.bf16:
            with torch.no_grad():
                torch._foreach_copy_(self.trained, self.masters)
        return total.item(), norm
