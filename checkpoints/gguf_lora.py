"""A LoRA adapter as a GGUF file, which llama.cpp adds to the text model that it was trained on.

    python export.py --model RUN --to gguf-lora OUT     # beside --to peft: of a run that tuned LoRA
    llama-server -m model.gguf --lora OUT/adapter.gguf

A linear's two matrices are `NAME.lora_a` (r, K) and `NAME.lora_b` (N, r), NAME its weight's name in
model.gguf. The file has one alpha, and llama.cpp multiplies by alpha / r: where another scale is
meant, the matrix B is scaled. Encoder and connector have no adapters there: mmproj.gguf of the run
itself (`--to gguf`) has what was trained of them.

N outputs, K inputs, r rank.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from checkpoints.gguf import FAMILIES, changed, check_text, file_name, refusal
from checkpoints.gguf_file import ARCHITECTURE, FileTensor, write_gguf
from checkpoints.names import matches
from lora import DoRALinear, LoRALinear, adapters

FILE = "adapter.gguf"
PART = "language_model."
FIX = "merge it, with --to gguf"


def write(folder: Path, model, file_type: str | None = None):
    """Write the adapters of a LLaVA's language model. file_type: None for float32.

    Raises UserError, before anything is written, for what llama.cpp cannot express.
    """
    check_text(model)
    found = language_adapters(model)
    first = next(iter(found.values()))
    alpha = first.scale * first.options.r
    if alpha == 0:
        alpha = 1.0  # llama.cpp takes 0 for a scale of 1

    tensors = []
    for name, adapter in found.items():
        tensors += pair(name, adapter, alpha, model)
    fields = {
        ARCHITECTURE: FAMILIES[model.config.text["model_type"]].architecture,
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": alpha,
    }
    if file_type is None:
        file_type = "float32"
    write_gguf(folder / FILE, fields, tensors, file_type)


def language_adapters(model) -> dict[str, LoRALinear]:
    """Return the adapters of the language model, by the name of their linear in it.

    Raises UserError for adapters elsewhere, DoRA, and what was trained whole in the language model.
    """
    found = {}
    for name, adapter in adapters(model).items():
        if not name.startswith(PART):
            raise refusal(f"an adapter of {name}: llama.cpp has those of the language model", FIX)
        if isinstance(adapter, DoRALinear):
            raise refusal("DoRA: llama.cpp's adapters have no magnitudes", FIX)
        found[name.removeprefix(PART)] = adapter
    if not found:
        raise refusal("no adapter of the language model", FIX)

    for name, parameter in model.language_model.named_parameters():
        if parameter.requires_grad and name.rpartition(".")[0] not in found:
            raise refusal(f"{name} was trained whole: an adapter of llama.cpp has no place", FIX)
    return found


def pair(name: str, adapter: LoRALinear, alpha: float, model) -> list[FileTensor]:
    """Return the two matrices of an adapter. Raises UserError for one of a part of a tensor."""
    lm = model.language_model
    family = FAMILIES[model.config.text["model_type"]]
    weight = file_name(f"{name}.weight", family)
    if matches(weight, family.fused):
        raise refusal(f"an adapter of {name}: llama.cpp has it in one tensor with others", FIX)
    A = adapter.lora_A
    B = adapter.lora_B
    r = adapter.options.r

    def scaled() -> Tensor:
        return changed(adapter.scale * r / alpha * B.detach().cpu().float(), weight, family, lm)

    return [
        FileTensor(f"{weight}.lora_a", tuple(A.shape), lambda: A.detach().cpu().float()),
        FileTensor(f"{weight}.lora_b", tuple(B.shape), scaled),
    ]
