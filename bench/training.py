"""One training step of this code beside the same model in transformers (and PEFT), driven as TinyLLaVA Factory does.

    python bench/training.py                       # whole models on a CUDA GPU, meant to fit in 8 minutes on an H200
    python bench/training.py --cpu                 # about 100M parameters on the CPU, 15 minutes on two cores
    python bench/training.py --cpu "100M, full, bf16" --rounds 5
    python bench/training.py --json                # also into bench/results/MACHINE/training.json, for bench/report.py
    python bench/training.py --cpu --quick         # every case, the GPU's too, cut to a toy: tries the script

The vision encoder is frozen; the connector and the language model train, or LoRA of rank 128 on its linears. Weights
are random, the same for both by name, and both take the same rows: nine of ten have a picture, text is 20 to 1300
tokens, half of it below 120, and the second half of each text is supervised.

barellava      train.py's own functions on micro-batches packed up to a token budget
transformers   as the Factory's scripts have it: 8 padded rows a micro-batch (for full finetuning rows with and without
               a picture apart), a blank picture encoded for each row without one, gradient checkpointing of the
               language model, logits of all positions; in bf16 DeepSpeed's arithmetic: weights, activations and
               gradients in bf16, AdamW on float32 copies. Attention is FlashAttention-2 where it is installed on a GPU,
               else torch's scaled_dot_product_attention. Left out: loading the rows, and what DeepSpeed costs.

A step is one optimizer step: forward, backward, clipping, AdamW. Each path has a process of its own; on the CPU both
are there at once and take turns, so that clocks drift alike. The first step is not counted. The loss of every step and
the gradient norm of the first must agree, else the run ends with exit code 1: both computed the same.

Memory is the peak of the process above its imports (getrusage), on a GPU that of torch's allocator. Share is the
FLOPs that the rows ask for over the time, of the rate of a large product measured in the same run: no padding, no
recomputation, the head for supervised tokens only; plan.py has the arithmetic. It is the same number of FLOPs for
both paths.
"""

from __future__ import annotations

import datetime
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from checkpoints import peft
from checkpoints.names import rename, reverse

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import config  # noqa: E402
from config import UserError  # noqa: E402

RESULTS = ROOT / "bench" / "results"
OURS, PEER = "barellava", "transformers"
PER_DEVICE = 8  # rows of a micro-batch in the Factory's scripts


class Case(NamedTuple):
    model: str
    tune: str  # of the language model
    dtype: str
    rows: int  # of an optimizer step
    budget: int  # tokens of one of our micro-batches
    targets: dict[
        str, float
    ]  # least ratio of rows/s, most of memory, least share of the machine's rate


# config.json of the models on the Hub; the small one is SmolLM-135M with 16 of 30 layers and a ViT-S as SigLIP has it.
SO400M = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
          "num_attention_heads": 16, "image_size": 384, "patch_size": 14}  # fmt: skip
MODELS = {
    "100M": (
        {"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
         "num_hidden_layers": 16, "num_attention_heads": 9, "num_key_value_heads": 3, "rms_norm_eps": 1e-5,
         "rope_theta": 10000.0, "max_position_embeddings": 2048, "tie_word_embeddings": True},
        {"model_type": "siglip_vision_model", "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 9,
         "num_attention_heads": 6, "image_size": 224, "patch_size": 16}),
    "Phi-2-SigLIP-3.1B": (
        {"model_type": "phi", "vocab_size": 51200, "hidden_size": 2560, "intermediate_size": 10240,
         "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "layer_norm_eps": 1e-5,
         "rope_theta": 10000.0, "partial_rotary_factor": 0.4, "hidden_act": "gelu_new", "resid_pdrop": 0.0,
         "max_position_embeddings": 2048, "tie_word_embeddings": False},
        SO400M),
    "Qwen2-0.5B-SigLIP": (
        {"model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
         "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
         "rope_theta": 1000000.0, "max_position_embeddings": 32768, "tie_word_embeddings": True},
        SO400M),
}  # fmt: skip
CASES = {
    "cpu": {
        "100M, full, fp32": Case("100M", "full", "float32", 16, 1024, {"speed": 1.7, "leaner": 0.6}),
        "100M, full, bf16": Case("100M", "full", "bfloat16", 16, 1024, {"speed": 2.0, "leaner": 0.6}),
        "100M, LoRA, fp32": Case("100M", "lora", "float32", 16, 1024, {"speed": 1.8, "leaner": 0.6}),
        "100M, LoRA, bf16": Case("100M", "lora", "bfloat16", 16, 1024, {"speed": 1.8, "leaner": 0.6}),
    },
    "cuda": {
        "Phi-2-SigLIP-3.1B, full": Case("Phi-2-SigLIP-3.1B", "full", "bfloat16", 64, 8192,
                                        {"speed": 2.5, "share": 0.57}),
        "Phi-2-SigLIP-3.1B, LoRA": Case("Phi-2-SigLIP-3.1B", "lora", "bfloat16", 64, 8192, {"speed": 2.5}),
        "Qwen2-0.5B-SigLIP, full": Case("Qwen2-0.5B-SigLIP", "full", "bfloat16", 128, 16384,
                                        {"speed": 2.5, "share": 0.45}),
    },
}  # fmt: skip
# How far losses (all steps) and the first gradient norm may be apart, as a share of the peer's.
LOSS, NORM = {"float32": 1e-4, "bfloat16": 1e-3}, {"float32": 1e-3, "bfloat16": 2e-2}
RATES = {"full": 2e-5, "lora": 2e-4}  # of learning


def toy(case: Case) -> Case:
    return case._replace(rows=10, budget=512, targets={})


def sizes(case: Case, quick: bool) -> tuple[dict, dict]:
    """config.json of the language model and of the encoder."""
    text, vision = MODELS[case.model]
    if quick:
        heads = {
            "num_attention_heads": 4,
            "num_key_value_heads": 2 if text["model_type"] != "phi" else 4,
        }
        text = (
            text
            | heads
            | {
                "vocab_size": 500,
                "hidden_size": 64,
                "intermediate_size": 96,
                "num_hidden_layers": 2,
            }
        )
        vision = vision | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
                           "image_size": 56, "patch_size": 14}  # fmt: skip
    return text, vision


# ------------------------------------------------------------------------------------------ in a path's own process


def peak(device: str) -> int:
    """Bytes: of the process, or of the GPU's allocator."""
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    import torch

    return torch.cuda.max_memory_allocated()


def make_rows(case: Case, text: dict, vision: dict) -> list:
    """The samples of a step; pictures are noise."""
    import torch

    from bench.operations import sample_lengths
    from inputs.sample import Sample
    from packing import IGNORE, IMAGE_TOKEN, Item

    g, rows = torch.Generator().manual_seed(0), []
    n = (vision["image_size"] // vision["patch_size"]) ** 2 - 1  # the first is dropped
    for i, length in enumerate(
        sample_lengths(10**6, 0)[16 : 16 + case.rows]
    ):  # the first hold an unusually long one
        ids = torch.randint(text["vocab_size"], (length,), generator=g)
        labels = ids.index_fill(0, torch.arange(length - length // 2), IGNORE)
        side, images = vision["image_size"], []
        if i % 10 != 3:
            at = length // 4
            ids = torch.cat([ids[:at], torch.full((n,), IMAGE_TOKEN), ids[at:]])
            labels = torch.cat([labels[:at], torch.full((n,), IGNORE), labels[at:]])
            images = [Item(torch.randn(1, 3, side, side, generator=g))]
        rows.append(Sample(ids, labels, images, i, 0))
    return rows


def fill_by_name(parameters: dict):
    """The same random weights for the same names, whatever the dtype: matrices Normal(0, 0.02), biases 0, norms 1."""
    import zlib

    import torch

    with torch.no_grad():
        for name, p in parameters.items():
            if name.endswith(("bias", "lora_B.weight")) or p.dim() < 2:
                p.fill_(0.0 if name.endswith(("bias", "lora_B.weight")) else 1.0)
            else:
                g = torch.Generator(p.device).manual_seed(zlib.crc32(name.encode()))
                p.copy_(torch.randn(p.shape, generator=g, device=p.device) * 0.02)


def ours(case: Case, text: dict, vision: dict, device: str) -> tuple:
    """-> a function that makes one step and returns loss and gradient norm, its modules, and what there is to say."""
    import torch

    import lora
    import train
    from checkpoints import layouts
    from config import Model, Stage, Tune
    from model import LLaVA
    from packing import bin_pack, pack_samples
    from training.estimate import Row, estimate
    from training.parallel import ParallelModel
    from training.ranks import Ranks

    imports, bf16 = peak(device), case.dtype == "bfloat16"
    ranks = Ranks(0, 1, torch.device(device))
    stage = Stage(tune=Tune(llm=case.tune), learning_rate=RATES[case.tune], warmup_ratio=0.0,
                  micro_batch_tokens=case.budget)  # fmt: skip
    with torch.device(device):
        model = LLaVA(layouts.config_from_recipe(Model(llm_config=text, vision_config=vision), ""))
    for part in train.PARTS.values():
        module = getattr(model, part)
        back = reverse(getattr(module, "rename", ()))
        named = {f"{part}.{rename(k, back)}": p for k, p in module.named_parameters()}
        fill_by_name({k.replace(".vision_model.", "."): p for k, p in named.items()})
    peft.adapt(model, [stage], train.PARTS)
    back = reverse(model.language_model.rename)
    for name, m in lora.adapters(model.language_model).items():
        key = "language_model." + rename(f"{name}.weight", back).removesuffix("weight")
        fill_by_name({f"{key}lora_A.weight": m.lora_A, f"{key}lora_B.weight": m.lora_B})
    train.set_trainable(model, stage.tune)
    rows = make_rows(case, text, vision)
    places = [len(r.items) * model.image_tokens for r in rows]
    facts = [
        (len(r.items), n, len(r.ids) - n, int((r.labels >= 0).sum()))
        for r, n in zip(rows, places, strict=True)
    ]
    flops = sum(estimate(model, stage, Row(*fact), recompute=False).operations for fact in facts)
    if device == "cuda":  # as a user would: recompute only where it does not fit
        row = Row(*(sum(f) / len(facts) for f in zip(*facts, strict=True)))
        need = estimate(model, stage, row, recompute=False).memory.total
        model.language_model.model.gradient_checkpointing = (
            need > torch.cuda.get_device_properties(0).total_memory
        )
    if bf16:
        train.round_frozen(model)
    parallel, optimizer = ParallelModel(model, "none", ranks), train.make_optimizer(model, stage)
    batches = [
        pack_samples([rows[j] for j in b])
        for b in bin_pack([len(r.ids) for r in rows], case.budget)
    ]
    supervised = sum(b.supervised for b in batches)
    batches = [b.pin_memory() for b in batches] if device == "cuda" else batches
    autocast = torch.autocast(device, torch.bfloat16, enabled=bf16)

    def step() -> tuple[float, float]:
        losses = []
        for batch in batches:
            with autocast:
                loss = parallel.loss(batch.to(ranks.device)) / supervised
                loss.backward()
            losses.append(loss.detach())
        return sum(losses).item(), train.update(optimizer, stage, 0, 10**9)

    return step, model, {
        "imports": imports, "tokens": sum(len(r.ids) for r in rows), "images": sum(len(r.items) for r in rows),
        "supervised": supervised, "flops": flops, "batches": len(batches), "parameters": lora.count(model),
        "recompute": model.language_model.model.gradient_checkpointing}  # fmt: skip


def peer(case: Case, text: dict, vision: dict, device: str) -> tuple:
    """The same for transformers."""
    import importlib.util

    import torch
    import transformers
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM, SiglipVisionModel

    from packing import IMAGE_TOKEN

    if case.tune == "lora":
        import peft
    imports, bf16 = peak(device), case.dtype == "bfloat16"
    flash = device == "cuda" and bf16 and importlib.util.find_spec("flash_attn")
    attention = "flash_attention_2" if flash else "sdpa"
    kinds = [AutoConfig.for_model(**c) for c in (text, vision)]
    wide = {"dtype": torch.float32, "attn_implementation": attention}
    with torch.device(device):
        lm = AutoModelForCausalLM.from_config(kinds[0], **wide)
        tower = SiglipVisionModel._from_config(kinds[1], **wide)
        first = nn.Linear(vision["hidden_size"], text["hidden_size"])
        connector = nn.Sequential(
            first, nn.GELU(), nn.Linear(text["hidden_size"], text["hidden_size"])
        )
    for name, part in (("language_model", lm), ("vision_tower", tower), ("connector", connector)):
        fill_by_name(
            {f"{name}.{k}".replace(".vision_model.", "."): p for k, p in part.named_parameters()}
        )
    tower.requires_grad_(False)
    lm.config.use_cache = False
    if case.tune == "lora":
        lm.requires_grad_(False)
        targets = sorted(
            {k.split(".")[-1] for k, m in lm.named_modules() if isinstance(m, nn.Linear)}
            - {"lm_head"}
        )
        options = peft.LoraConfig(r=128, lora_alpha=256, lora_dropout=0.05, target_modules=targets)
        adapted = peft.get_peft_model(lm, options, autocast_adapter_dtype=False)
        named = {k.replace(".default", "").replace("base_model.model.", "language_model.", 1): p
                 for k, p in adapted.named_parameters() if ".lora_" in k}  # fmt: skip
        fill_by_name(named)
    lm.gradient_checkpointing_enable()
    lm.enable_input_require_grads()
    lm.train()
    trained = [p for m in (lm, connector) for p in m.parameters() if p.requires_grad]
    masters = [p.detach().clone().requires_grad_() for p in trained] if bf16 else trained
    for p in (p for m in (lm, tower, connector) for p in m.parameters()):
        p.data = p.data.to(
            getattr(torch, case.dtype)
        )  # not the table of rope's frequencies, as from_pretrained has it
    optimizer = torch.optim.AdamW(
        masters, lr=RATES[case.tune], betas=(0.9, 0.999), weight_decay=0.0, fused=True
    )
    rows = make_rows(case, text, vision)
    supervised = sum(int((r.labels >= 0).sum()) for r in rows)
    if case.tune == "full":  # group_by_modality_length
        rows.sort(key=lambda r: not r.items)
    batches, padded = [], 0
    for i in range(0, len(rows), PER_DEVICE):
        some = rows[i : i + PER_DEVICE]
        blank = torch.zeros(3, vision["image_size"], vision["image_size"])
        ids, labels = (nn.utils.rnn.pad_sequence([getattr(r, k) for r in some], True, v)
                       for k, v in (("ids", 0), ("labels", -100)))  # fmt: skip
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(r.ids) for r in some], True)
        images = torch.stack([r.items[0].pixels[0] if r.items else blank for r in some]).to(
            getattr(torch, case.dtype)
        )
        seen = torch.tensor([bool(r.items) for r in some])
        batch = ids, labels, mask, images, seen
        batches.append([t.pin_memory() for t in batch] if device == "cuda" else batch)
        padded += ids.numel()

    def step() -> tuple[float, float]:
        total = 0.0
        for batch in batches:
            ids, labels, mask, images, seen = (t.to(device, non_blocking=True) for t in batch)
            features = connector(tower(images, output_hidden_states=True).hidden_states[-2][:, 1:])[
                seen
            ]
            embedded = lm.get_input_embeddings()(ids.clamp(min=0))
            embedded = embedded.masked_scatter((ids == IMAGE_TOKEN)[..., None], features)
            loss = lm(
                inputs_embeds=embedded,
                attention_mask=mask,
                labels=labels,
                num_items_in_batch=supervised,
            ).loss
            loss.backward()
            total += loss.detach()
        if bf16:
            for master, p in zip(masters, trained, strict=True):
                master.grad, p.grad = p.grad.float(), None
        norm = nn.utils.clip_grad_norm_(masters, 1.0).item()
        optimizer.step()
        optimizer.zero_grad()
        if bf16:
            with torch.no_grad():
                torch._foreach_copy_(trained, masters)
        return total.item(), norm

    padding = 1 - sum(len(r.ids) for r in rows) / padded
    facts = {
        "imports": imports,
        "padding": padding,
        "attention": attention,
        "transformers": transformers.__version__,
    }
    return step, lm, facts


def serve(path: str, device: str, quick: str, *fields: str):
    """Build a path, say so, then make one step for every line that comes in."""
    import torch

    case = Case(*json.loads(fields[0]))
    step, model, facts = {OURS: ours, PEER: peer}[path](
        case, *sizes(case, quick == "quick"), device
    )
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()  # what building took, a run does not
    print(json.dumps(facts), flush=True)
    for number, _ in enumerate(sys.stdin):
        torch.manual_seed(number)
        for m in model.modules():  # none drops in the first step, so that both compute the same
            if isinstance(m, torch.nn.Dropout):
                m.p = 0.05 * (number > 0)
            elif hasattr(m, "options"):
                m.options = config.LoRA(**vars(m.options) | {"dropout": 0.05 * (number > 0)})
        start = time.perf_counter()
        loss, norm = step()
        if device == "cuda":
            torch.cuda.synchronize()
        made = {
            "seconds": time.perf_counter() - start,
            "loss": loss,
            "norm": norm,
            "peak": peak(device),
        }
        print(json.dumps(made), flush=True)


def machine(device: str, quick: str):
    """Its name, versions, and what a large product reaches, in FLOP/s."""
    import torch

    from bench.kernels import Setting, race, versions

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("bench/training.py", "torch sees no CUDA GPU", "take --cpu")
    name = "cpu" if device == "cpu" else torch.cuda.get_device_name()
    rates, n = {}, 256 if quick == "quick" else 2048 if device == "cpu" else 8192
    for dtype in ("float32", "bfloat16")[device == "cuda" :]:
        s = Setting(device, getattr(torch, dtype), 1, 1.0, False)
        a, b = s.randn(n, n), s.randn(n, n)
        rates[dtype] = 2 * n**3 / statistics.median(race({"": lambda a=a, b=b: a @ b}, s)[""]) * 1e3
    found = versions() | {"transformers": metadata.version("transformers")}
    print(
        json.dumps(
            {"machine": name, "versions": found, "rates": rates, "threads": torch.get_num_threads()}
        )
    )


# --------------------------------------------------------------------------------------------- in the first process


class Worker:
    """A process of this file: send it a line, it answers one of JSON."""

    def __init__(self, *arguments: str):
        self.errors = tempfile.TemporaryFile("w+")
        command = [sys.executable, __file__, "--child", *arguments]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self.errors, text=True
        )

    def answer(self) -> dict:
        """What it says, or as `reason` its last words if it has ended."""
        while line := self.process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        self.errors.seek(0)
        said = self.errors.read().strip()
        print(said, file=sys.stderr)
        return {"reason": (said or "it ended without a word").splitlines()[-1][:300]}

    def step(self) -> dict:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def race(case: Case, device: str, rounds: int, quick: bool) -> dict[str, dict]:
    """-> for each path its facts and its steps, of which the first does not count, or the reason why there are none."""
    paths = {}
    for group in (
        [(OURS, PEER)] if device == "cpu" else [(OURS,), (PEER,)]
    ):  # a GPU cannot hold both
        workers = {name: Worker(name, device, "quick" * quick, json.dumps(case)) for name in group}
        paths |= {name: worker.answer() | {"steps": []} for name, worker in workers.items()}
        for i in range(rounds + 1):
            for name, worker in list(workers.items())[:: 1 - i % 2 * 2]:
                made = {} if "reason" in paths[name] else worker.step()
                paths[name] |= (
                    made if "reason" in made else {"steps": [*paths[name]["steps"], made]}
                )
        for worker in workers.values():
            worker.close()
    return paths


def judge(result: dict) -> tuple[dict[str, dict], list[str]]:
    """What report.py writes of a case: numbers of each path; and what is wrong with ours."""
    case, paths, numbers = Case(*result["case"]), result["paths"], {}
    facts = paths[OURS]
    if "reason" in facts:
        return {}, [facts["reason"]]
    for name, path in paths.items():
        if "reason" in path:
            continue
        seconds = [step["seconds"] for step in path["steps"][1:]]
        middle = statistics.median(seconds)
        numbers[name] = {
            "seconds": middle, "range": [min(seconds), max(seconds)], "rows/s": case.rows / middle,
            "supervised/s": facts["supervised"] / middle, "memory": path["steps"][-1]["peak"] - path["imports"],
            "share": facts["flops"] / middle / result["rate"], "padding": path.get("padding", 0.0),
        }  # fmt: skip
    if len(numbers) < 2:
        return numbers, []
    mine, theirs = numbers[OURS], numbers[PEER]
    mine |= {
        "speed": theirs["seconds"] / mine["seconds"],
        "leaner": mine["memory"] / theirs["memory"],
    }
    both = list(zip(paths[OURS]["steps"], paths[PEER]["steps"], strict=True))
    loss = max(
        (abs(a["loss"] / b["loss"] - 1) for a, b in both), key=lambda x: (x != x, x)
    )  # NaN is the largest
    norm = abs(both[0][0]["norm"] / both[0][1]["norm"] - 1)
    mine |= {"loss": loss, "norm": norm}
    found = ("loss", loss, LOSS[case.dtype]), ("gradient norm", norm, NORM[case.dtype])
    return numbers, [
        f"{what} {value:.1e} away from the peer's"
        for what, value, most in found
        if not value <= most
    ]


def show(name: str, result: dict) -> list[str]:
    """Print a case -> what is wrong with ours."""
    case, (numbers, wrong), facts = Case(*result["case"]), judge(result), result["paths"][OURS]
    if "reason" not in facts:
        print(f"\n{name}: {facts['parameters'] / 1e6:.0f}M parameters; a step is {case.rows} rows, {facts['images']} "
              f"pictures, {facts['tokens']} tokens, {facts['supervised']} supervised, {facts['flops'] / 1e12:.2f} "
              f"TFLOP; large products {result['rate'] / 1e12:.3g} TFLOP/s")  # fmt: skip
        print(
            f"{'':14}{'seconds a step':>24}{'rows/s':>9}{'supervised/s':>14}{'padding':>9}{'share':>7}{'peak GB':>9}"
        )
    for path in result["paths"]:
        if path not in numbers:
            print(f"{path:14}{result['paths'][path].get('reason', 'nothing to compare with')}")
            continue
        n = numbers[path]
        spread = f"{n['seconds']:.3f} ({n['range'][0]:.3f} to {n['range'][1]:.3f})"
        print(f"{path:14}{spread:>24}{n['rows/s']:9.2f}{n['supervised/s']:14.0f}{n['padding']:9.0%}{n['share']:7.1%}"
              f"{n['memory'] / 1e9:9.2f}")  # fmt: skip
    goals = judged(case, numbers.get(OURS, {}))
    lines = [f"{what} {value} {'met' if met else 'MISSED'}" for what, value, met in goals]
    if "loss" in (n := numbers.get(OURS, {})):
        lines.append(f"apart: losses {n['loss']:.0e}, first gradient norms {n['norm']:.0e}")
    print("; ".join(lines), flush=True)
    return [f"{name}: {w}" for w in wrong]


def judged(case: Case, ours: dict) -> list[tuple[str, str, bool]]:
    """(what, its value beside the target, met) for each target of which there is a number."""
    words = {"speed": ("rows/s / transformers'", ".2f", "≥"), "leaner": ("memory / transformers'", ".2f", "≤"),
             "share": ("share", ".0%", "≥")}  # fmt: skip
    found = []
    for key, target in case.targets.items():
        if key in ours:
            what, form, sign = words[key]
            met = ours[key] <= target if sign == "≤" else ours[key] >= target
            found.append((what, f"{ours[key]:{form}} ({sign} {target:{form}})", met))
    return found


def table(result: dict) -> str:
    """One machine's cases for PERFORMANCE.md."""
    lines = ["| case | | seconds a step | rows/s | supervised tokens/s | padding | share | peak GB | |",
             "|---|---|--:|--:|--:|--:|--:|--:|---|"]  # fmt: skip
    told = []
    for name, one in result["cases"].items():
        case, (numbers, wrong) = Case(*one["case"]), judge(one)
        for path, n in numbers.items():
            goals = judged(case, n) if path == OURS else []
            words = "; ".join(
                f"{what} {value}" if met else f"{what} **{value}**" for what, value, met in goals
            )
            low, high = n["range"]
            lines.append(f"| {name} | {path} | {n['seconds']:.2f} ({low:.2f} to {high:.2f}) | {n['rows/s']:.2f} | "
                         f"{n['supervised/s']:.0f} | {n['padding']:.0%} | {n['share']:.0%} | {n['memory'] / 1e9:.2f} | "
                         f"{words} |")  # fmt: skip
        reasons = [f"{path}: {p['reason']}" for path, p in one["paths"].items() if "reason" in p]
        versions = [f"{k} {v}" for k, v in one["versions"].items() if v]
        apart = (
            f"losses {numbers[OURS]['loss']:.0e} apart" if "loss" in numbers.get(OURS, {}) else ""
        )
        facts = [
            one["date"],
            f"{one['threads']} threads",
            *versions,
            f"products {one['rate'] / 1e12:.3g} TFLOP/s",
        ]
        told.append(f"- {name}: " + ", ".join(filter(None, [*facts, apart, *reasons, *wrong])))
    return "\n".join([*lines, "", *told])


def main(argv: list[str]):
    if argv[:1] == ["--child"]:
        return machine(*argv[2:]) if argv[1] == "machine" else serve(*argv[1:])
    parser = config.parser(__doc__)
    every = "; ".join(name for cases in CASES.values() for name in cases)
    parser.add_argument(
        "cases", nargs="*", metavar="CASE", help=f"of {every}; without: all of the machine's"
    )
    parser.add_argument(
        "--json", nargs="?", const="", metavar="FILE", help="write the numbers to a file"
    )
    parser.add_argument("--quick", action="store_true", help="toy sizes, all cases")
    parser.add_argument("--cpu", action="store_true", help="on the CPU")
    parser.add_argument("--rounds", type=int, default=3, help="counted steps of each path")
    args = parser.parse_args(argv)
    device = "cpu" if args.cpu else "cuda"
    known = CASES["cpu"] | CASES["cuda"] if args.quick else CASES[device]
    if unknown := [name for name in args.cases if name not in known]:
        parser.error(f"{unknown[0]!r} is no case here, they are: {'; '.join(known)}")
    if args.rounds < 1:
        parser.error("--rounds starts at 1")
    if args.quick and args.json == "":
        parser.error("--quick --json would replace a whole result; name a file")
    # This process stays small and imports no torch: a child's peak starts at its parent's.
    facts = Worker("machine", device, "quick" * args.quick).answer()
    if "reason" in facts:
        sys.exit(facts["reason"])
    facts = {"date": f"{datetime.datetime.now():%Y-%m-%d %H:%M}"} | facts
    print(f"{facts['machine']}, {facts['date']}, {facts['threads']} threads,",
          ", ".join(f"{k} {v}" for k, v in facts["versions"].items() if v))  # fmt: skip
    file = (
        Path(args.json)
        if args.json
        else RESULTS / facts["machine"].lower().replace(" ", "-") / "training.json"
    )
    found = (
        json.loads(file.read_text()) if args.json is not None and file.exists() else {"cases": {}}
    )
    found |= {"machine": facts["machine"]}
    failures = []
    for name in args.cases or known:
        case = toy(known[name]) if args.quick else known[name]
        rate = facts["rates"][case.dtype]
        result = facts | {
            "case": list(case),
            "rate": rate,
            "paths": race(case, device, args.rounds, args.quick),
        }
        failures += show(name, result)
        found["cases"][name] = result
        if args.json is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(found, indent=1) + "\n")
    if failures:
        sys.exit(
            f"error: bench/training.py: {'; '.join(failures)}; fix: python -m pytest tests/test_train.py"
        )


if __name__ == "__main__":
    config.cli(main, __doc__)
