"""What a recipe needs before it runs: its files, its parameters, and an estimate of its memory and hours.

    python train.py --list                                      # all recipes and their published scores
    python train.py RECIPE [section.key=value ...] --dry-run    # what this one would take; loads no weights

Parameters are exact: the model is built from its config files on the meta device. The rest is an estimate.
Memory of one GPU in bytes; each holds the whole model, so more of them save none:
    weights      4 P          P parameters in float32; frozen matrices 2 in bfloat16, 0.516 in NF4, 1 in int8
    copies       2 P_m        in bfloat16, of the P_m in matrices that train: autocast makes and keeps them
    gradients    4 P_t        of the P_t that train; AdamW's two moments: 8 P_t
    activations  per token and block of width D: 2 for each input and output of each matrix, 16 D for norms and the
                 float32 residual stream. Kept by every block that backward passes through; with gradient
                 checkpointing these keep their input alone, 4 D, and one block at a time has the rest
    logits       16 V         per supervised token, V entries: in bfloat16 and float32, log-softmax, both gradients
Operations on one token of a part with N parameters in matrices (no embeddings; the head sees supervised tokens only):
    2 N     forward only         a frozen encoder
    4 N     + input gradients    a frozen part behind one that trains: the language model of stage 1
    6 N     + weight gradients   a part that trains
    + 2 N   where gradient checkpointing computes forward again
    attention: 4 T H d per token and block over T tokens, half of it if causal; 2.5 times as much again in backward
Hours are operations / (datasheet peak in bfloat16 * SHARE).
"""

import math
import tempfile
from contextlib import suppress
from dataclasses import replace
from itertools import dropwhile
from pathlib import Path

import torch
from torch import nn

from checkpoints import layouts, weights
from config import Recipe, Stage, UserError, load
from data import Steps
from encoders import VisionEncoder
from inputs.media import media_names
from inputs.rows import Mixture, Rows, files
from inputs.tiling import Tiling
from model import LLaVA
from packing import ItemShape
from training.ranks import print0

SHARE = 0.3  # of the peak, over a whole run: assumed, plain PyTorch reaches about 0.2 to 0.4
SPARE = 2e9  # bytes for CUDA's and NCCL's own use and for fragments: assumed
BYTES = {"qlora-nf4": 0.516, "qlora-int8": 1}  # of a weight in a quantized linear, its scales too
PICTURE = (640, 480)  # pixels, where it matters
TEXT, ANSWERS = (
    200,
    0.5,
)  # text tokens of a row and the supervised share of them: assumed where there is no data
GPUS = {
    "A100-40G": (40, 312e12),
    "A100-80G": (80, 312e12),
    "H100": (80, 989e12),
    "H200": (141, 989e12),
}  # GB, FLOP/s
BENCHMARKS = ("VQAv2", "GQA", "SQA-I", "TextVQA", "MM-Vet", "POPE", "MME", "MMMU")
VIDEO = ("VideoMME", "MVBench", "LongVideoBench", "MLVU", "MMVU")


def print_recipes(folder: Path):
    """Tables of the recipes in a folder that name a model: what it is of, what trains, the published scores."""
    tables = {kind: [("recipe", "llm", "vision", "trains", *kind)] for kind in (BENCHMARKS, VIDEO)}
    for file in sorted(folder.glob("*.toml")):
        recipe, _ = load([str(file)], file)
        c, stages = recipe.model, []
        if not (c.llm or c.llm_config or c.checkpoint):
            continue  # a base for others
        for stage in recipe.stage.values():
            ways = {part: getattr(stage.tune, part) for part in ("connector", "llm", "vision")}
            stages.append(
                "+".join(p[0] + f"({h})" * (h != "full") for p, h in ways.items() if h != "frozen")
            )
        parts = (
            (c.checkpoint, "", "")
            if c.checkpoint
            else (c.llm or "random", c.vision or "random", c.vision2)
        )
        llm, vision, vision2 = (name.split("/")[-1] for name in parts)
        names = (file.stem, llm, f"{vision} + {vision2}".removesuffix(" + "), " > ".join(stages))
        kind = VIDEO if recipe.published.keys() & set(VIDEO) else BENCHMARKS
        tables[kind].append((*names, *(str(recipe.published.get(name, "-")) for name in kind)))
    for rows in tables.values():
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows if len(rows) > 1 else ():
            print0("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip())
        print0()
    print0("trains: c connector, l llm, v vision, stage > stage; (partial:N) from block N on")


def locate(name: str, needs: tuple[str, ...], asks: str, scratch: Path) -> tuple[str, Path | None]:
    """Where weights.resolve would find a folder or Hugging Face id -> (in words, a folder with its JSON files).
    needs: globs of which one must be there; asks: the file whose presence on the Hub stands for the rest."""
    from huggingface_hub import (
        get_hf_file_metadata,
        hf_hub_download,
        hf_hub_url,
        try_to_load_from_cache,
    )
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    folder = Path(name).expanduser()
    if name and folder.is_dir():
        there = any(any(folder.glob(glob)) for glob in needs)
        return "found" if there else f"MISSING: it has no {' or '.join(needs)}", folder
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        return "MISSING: no such folder" if name else "MISSING: not set", None
    cached = try_to_load_from_cache(name, asks)
    if isinstance(cached, str) and any(any(Path(cached).parent.glob(glob)) for glob in needs):
        return f"in the Hugging Face cache: {Path(cached).parent}", Path(cached).parent
    try:
        get_hf_file_metadata(
            hf_hub_url(name, asks), timeout=10
        )  # asks once, where a download would retry for long
        for file in ("config.json", "preprocessor_config.json"):
            with suppress(
                EntryNotFoundError
            ):  # a language model has no processor, a tokenizer neither of the two
                hf_hub_download(
                    name, file, local_dir=scratch / name
                )  # in the cache it would look like a model
    except HfHubHTTPError as e:
        return (
            f"MISSING: the Hub answers {e.response.status_code}; check the name, or log in for a gated model",
            None,
        )
    except Exception as e:  # whatever its HTTP client raises without a network
        return f"would be downloaded, but the Hub cannot be reached now ({type(e).__name__})", None
    return "would be downloaded", scratch / name


def find(
    recipe: Recipe, scratch: Path, made: Path | None
) -> tuple[list[tuple[str, str, str]], dict[str, Path | None]]:
    """Every path of a recipe as (key, value, where it is), and for each part that is loaded a folder with its JSON."""
    c, lines, folders = recipe.model, [], {}
    made_here = {"llm": c.llm_config, "vision": c.vision_config, "vision2": not c.vision2}
    for part, random in ({"checkpoint": False} if c.checkpoint else made_here).items():
        if not random:
            needs = ("*.safetensors", "*.bin") if c.allow_pickle else ("*.safetensors",)
            where, folders[part] = locate(getattr(c, part), needs, "config.json", scratch)
            lines.append((f"model.{part}", getattr(c, part), where))
    name = c.text
    where, _ = locate(name, ("tokenizer.json", "tokenizer.model"), "tokenizer_config.json", scratch)
    lines.append(("model.tokenizer", name, where))
    for name, stage in recipe.stage.items():
        sources = {f"mixture.{k}.": source for k, source in stage.mixture.items()} or {"": stage}
        named = {"validation": stage.validation} if stage.validation else {}
        for key, s in sources.items():
            named |= {f"{key}data": s.data, f"{key}images": s.images or str(Path(s.data).parent)}
        lines += [
            (f"stage.{name}.{k}", v, "found" if v and (Path(v).exists() or files(v)) else "MISSING")
            for k, v in named.items()
        ]
    if made and not made.exists():
        lines = [
            (k, v, "train.py makes it" if Path(v).is_relative_to(made) else where)
            for k, v, where in lines
        ]
    return lines, folders


def passes(module: nn.Module, upstream: bool) -> set[nn.Parameter]:
    """The parameters that backward passes through: all if something trains `upstream`, else all from the first
    trainable one on, as modules register them in the order in which forward uses them."""
    return set(dropwhile(lambda p: not (upstream or p.requires_grad), module.parameters()))


def cost(
    part,
    blocks,
    width: int,
    heads: int,
    tokens: float,
    upstream: bool,
    recompute: bool,
    causal=False,
) -> tuple:
    """One sequence through a part with `blocks` of this width, `heads` being the sum of H d over them -> operations,
    bytes kept until backward, bytes of one block while it is computed."""
    passed, tables = (
        passes(part, upstream),
        {m.weight for m in part.modules() if isinstance(m, nn.Embedding)},
    )
    matrices = [p for p in part.parameters() if p.dim() > 1 and p not in tables]
    flops = tokens * sum(
        p.numel() * (2 + (2 + 2 * recompute) * (p in passed) + 2 * p.requires_grad)
        for p in matrices
    )
    inside = [
        tokens * (16 * width + 2 * sum(sum(p.shape) for p in b.parameters() if p.dim() > 1))
        for b in blocks
    ]
    deep = [not passed.isdisjoint(b.parameters()) for b in blocks]
    kept = sum(
        (4 * width * tokens if recompute else n) for n, d in zip(inside, deep, strict=True) if d
    )
    attention = (
        4
        * tokens**2
        * heads
        / (1 + causal)
        * (1 + (2.5 + recompute) * sum(deep) / max(1, len(deep)))
    )
    return flops + attention, kept, max(inside, default=0)


def estimate(
    model: LLaVA, stage: Stage, row: tuple[float, ...], recompute: bool
) -> tuple[dict, float]:
    """Bytes of one GPU by kind, and operations on a row, in a stage in which requires_grad says what trains.
    row: as of mean_row; recompute: gradient checkpointing."""
    views, positions, text, supervised = row
    lm, tower, connector = model.language_model, model.vision_tower, model.connector
    vocab, width = lm.lm_head.weight.shape
    tokens = min(positions + text, stage.max_tokens)
    vision_trains, connector_trains = (
        any(p.requires_grad for p in m.parameters()) for m in (tower, connector)
    )
    features_train, costs = vision_trains or connector_trains, []
    for t in (m for m in tower.modules() if isinstance(m, VisionEncoder)):  # two in a mixture
        n, c = t.config.tokens("cls_patch"), t.config.width
        costs.append(cost(t, t.blocks, c, c * len(t.blocks), n, False, recompute))
    costs.append(cost(connector, [connector], width, 0, n, vision_trains, False))
    costs = [[x * views for x in c] for c in costs]
    heads = sum(layer.heads for layer in lm.config.layers) * lm.config.head_dim
    costs.append(
        cost(lm.model, lm.blocks, width, heads, tokens, features_train, recompute, causal=True)
    )
    flops, kept, inside = zip(*costs, strict=True)
    head = 2 * vocab * width * supervised * (2 + lm.lm_head.weight.requires_grad)
    rows = min(
        stage.global_batch, max(1, stage.micro_batch_tokens // max(1, int(tokens)))
    )  # of a micro-batch
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = {}  # bytes of a parameter that does not train, where not 4
    for name, how in (("language_model", stage.tune.llm), ("vision_tower", stage.tune.vision)):
        for at, m in getattr(model, name).named_modules():
            if isinstance(m, nn.Linear):
                frozen[m.weight] = BYTES.get(how, 2) if at != "lm_head" else 2
    copied = sum(w.numel() for w in frozen if w.requires_grad)
    memory = {
        "weights": sum(p.numel() * (4 if p.requires_grad else frozen.get(p, 4)) for p in model.parameters()),
        "copies": 2 * copied + 2 * sum(p.numel() for p in connector.parameters() if p.requires_grad and p.dim() > 1),
        "gradients": 4 * trained, "AdamW": 8 * trained,
        "activations": rows * (sum(kept) + max(inside)),
        "logits": 16 * vocab * rows * supervised, "spare": SPARE,
    }  # fmt: skip
    return memory, head + sum(flops)


def mean_row(rows: Rows | None, template: str, views: Tiling) -> tuple[float, float, float, float]:
    """Views that the encoder sees, the positions of their items, text tokens and supervised tokens: of up to 200 rows
    at 4 characters a token, or what is assumed. Pictures of any row are taken to be of PICTURE's size."""
    items = {"image": views.shape(PICTURE), "video": ItemShape(views.frames)}
    if not rows:
        return items["image"].views, views.positions(items["image"]), TEXT, TEXT * ANSWERS
    seen, placed, asked, said = 0, 0, 0.0, 0.0
    picked = range(0, len(rows), math.ceil(len(rows) / 200))
    for row in map(rows.__getitem__, picked):
        kind, names = media_names(row, "")
        seen += len(names) * items[kind].views
        placed += len(names) * views.positions(items[kind])
        turns = [
            (turn["from"], len(turn["value"].replace("<image>", "").strip()) / 4)
            for turn in row["conversations"]
        ]
        said += sum(n for speaker, n in turns if speaker == "gpt")
        asked += sum(
            n for speaker, n in turns if speaker != "gpt" and template != "pretrain"
        )  # that leaves them out
    return (
        seen / len(picked),
        placed / len(picked),
        (asked + said) / len(picked),
        said / len(picked),
    )


def peak_share(model: LLaVA, stage: Stage, rows: Rows, device: torch.device) -> float:
    """Of this GPU's peak, what one token per second takes by `estimate`, recomputation left out; 0 = unknown."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peaks = [peak for gpu, (_, peak) in GPUS.items() if gpu.split("-")[0] in name]
    if not peaks:
        return 0.0
    row = mean_row(rows, stage.template, model.views)
    tokens = min(row[1] + row[2], stage.max_tokens)
    return estimate(model, stage, row, recompute=False)[1] / tokens / peaks[0]


def print_stage(name: str, stage: Stage, recipe: Recipe, model: LLaVA):
    """One stage: what trains, steps, memory and hours."""
    sources = list(stage.mixture.values()) or [stage]
    rows = (
        Mixture.of(stage, f"stage.{name}")
        if all(s.data and files(s.data) for s in sources)
        else None
    )
    steps = len(Steps(rows, None, stage, recipe.train)) if rows else stage.steps
    row = mean_row(rows, stage.template, model.views)
    memory, flops = estimate(model, stage, row, recipe.train.gradient_checkpointing)
    need = sum(memory.values()) / 1e9
    count, trained = (
        sum(p.numel() for p in model.parameters() if p.requires_grad >= only)
        for only in (False, True)
    )
    size = f"{steps} steps of {stage.global_batch} rows" if steps else "steps unknown: no data"
    print0(f"\nstage {name}: {size}; trains {trained:,} of {count:,} parameters")
    print0(
        "  a row has {:.2f} views of {:.0f} tokens, {:.0f} text tokens, {:.0f} supervised".format(
            *row
        ),
        end=" ",
    )
    print0(f"(data: {len(rows)} rows)" if rows else "(assumed: no data)")
    print0(
        f"  GB per GPU, estimate: {need:.1f} =",
        " + ".join(f"{kind} {n / 1e9:.1f}" for kind, n in memory.items()),
    )
    print0(
        f"  hours{'' if steps else ' per 100,000 rows'}, estimate:".ljust(35),
        *(f"{gpu:>10}" for gpu in GPUS),
    )
    for gpus in (1, 8):
        hours = (steps * stage.global_batch or 100_000) * flops / SHARE / gpus / 3600
        cells = (f"{hours / peak:.2f}" if need <= gb else "too small" for gb, peak in GPUS.values())
        print0(f"    on {gpus} of them".ljust(35), *(f"{cell:>10}" for cell in cells))


def dry_run(recipe: Recipe, path: Path, adapt, set_trainable, made: Path | None = None):
    """Print the plan of a recipe; train.py would make `made`. Raises UserError, last, for what is missing or far."""
    print0(f"{path}, dry run")
    with tempfile.TemporaryDirectory() as scratch:
        lines, folders = find(recipe, Path(scratch), made)
        for key, value, where in lines:
            print0(f"  {key:<28}{value:<50} {where}")
        if all(folders.values()):
            local = replace(recipe.model, **{part: str(folder) for part, folder in folders.items()})
            with weights.empty():
                model = LLaVA(layouts.config_from_recipe(local, ""))
                adapt(model, list(recipe.stage.values()))
            sizes = ", ".join(
                f"{k} {sum(p.numel() for p in m.parameters()):,}" for k, m in model.named_children()
            )
            print0(
                f"parameters: {sizes} (without blocks that never run); {model.image_tokens} tokens per image"
            )
            for name, stage in recipe.stage.items():
                set_trainable(model, stage.tune)
                print_stage(name, stage, recipe, model)
            print0(
                f"\nassumed: {SHARE:.0%} of the GPUs' peak in bfloat16; the arithmetic is at the top of plan.py"
            )
    gone = [line for line in lines if line[2].startswith("MISSING")]
    fix = "correct the path, or put it there" if gone else "connect, or name a local folder"
    for key, value, where in gone or [
        line for line in lines if "cannot be reached" in line[2]
    ]:  # the first of them
        raise UserError(f"{path}:{key}", f"{value!r}: {where}", fix)
