"""What bench/generate.py measures: greedy decoding, and many questions about one picture.

write("toy", folder)                                   # a random checkpoint that both load
case = decode("bfloat16", 8, ...)                      # tokens per second of all, in turns
asked = ask_questions(folder, "float32", rounds, "cpu")
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

import lora
from bench import llama_cpp
from bench.common import LLAMA_CPP, OURS, PEER, missing_peer
from config import Model
from export import export
from inference.cache import slots_of
from inference.engine import Engine, Request
from model import LLaVA
from packing import IMAGE_TOKEN

PROMPT = 32  # tokens
QUESTIONS = 16
QUESTION = 16  # tokens
ANSWER = 8  # tokens

SIGLIP = {
    "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
    "num_hidden_layers": 27, "num_attention_heads": 16, "patch_size": 14, "image_size": 384,
}  # fmt: skip
SMALL = {
    "model_type": "siglip_vision_model", "hidden_size": 384, "intermediate_size": 1536,
    "num_hidden_layers": 6, "num_attention_heads": 6, "patch_size": 16, "image_size": 224,
}  # fmt: skip
TINY = {
    "model_type": "siglip_vision_model", "hidden_size": 48, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 16, "image_size": 96,
}  # fmt: skip
PHI_2 = {  # without the head's bias, which Hugging Face's LLaVA has no place for
    "model_type": "phi", "vocab_size": 51200, "hidden_size": 2560, "intermediate_size": 10240,
    "num_hidden_layers": 32, "num_attention_heads": 32, "partial_rotary_factor": 0.4,
    "max_position_embeddings": 4096, "lm_head_bias": False,
}  # fmt: skip
QWEN2 = {
    "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
    "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
    "rope_theta": 1e6, "max_position_embeddings": 4096, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048,
    "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}  # fmt: skip
TOY = {
    "model_type": "llama", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 4096,
}  # fmt: skip
# config.json of the language model and of the encoder.
MODELS = {
    "Phi-2-SigLIP": (PHI_2, SIGLIP),
    "Qwen2-0.5B-SigLIP": (QWEN2, SIGLIP),
    "Llama-110M": (LLAMA, SMALL),
    "toy": (TOY, TINY),
}


class Setting(NamedTuple):
    """Where and how long to measure a model."""

    folder: Path  # the model's
    device: str
    rounds: int
    new_tokens: int
    threads: int
    has_llama_cpp: bool


# ---------------------------------------------------------------------- models


def write(name: str, folder: Path):
    """Write random weights of that shape as Hugging Face's LLaVA."""
    text, vision = MODELS[name]
    model = LLaVA.from_parts(Model(llm_config=text, vision_config=vision), "plain")
    export(model, None, "hf-llava", folder)


def dtype_of(kind: str) -> torch.dtype:
    """Return the dtype of computation; int8 and NF4 weights compute in bf16."""
    return torch.float32 if kind == "float32" else torch.bfloat16


def load_ours(folder: Path, kind: str, device: str) -> LLaVA:
    model = LLaVA.from_pretrained(folder, dtype_of(kind), device).eval()
    if kind in lora.KINDS:
        lora.quantize(model.language_model, kind)
    return model


def load_theirs(folder: Path, dtype: torch.dtype, device: str):
    try:
        from transformers import LlavaForConditionalGeneration
    except ImportError:
        raise missing_peer("generate.py") from None
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(device).eval()


# ---------------------------------------------------------------------- the machine


def clock(call: Callable, device: str) -> tuple[float, object]:
    """Return the seconds that a call takes, and what it returns."""
    start = time.perf_counter()
    made = call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, made


def memory_rate(device: str) -> float:
    """Return the bytes per second of the memory, the best of ten.

    On a GPU that is a large copy, in and out; on a CPU a large read, by torch's own threads.
    """
    if device == "cuda":
        source = torch.zeros(1 << 30, dtype=torch.uint8, device=device)
        target = torch.zeros_like(source)
        fastest = min(clock(lambda: target.copy_(source), device)[0] for _ in range(10))
        return 2 * source.nbytes / fastest

    source = torch.zeros(1 << 27)
    fastest = min(clock(source.sum, device)[0] for _ in range(10))
    return source.nbytes / fastest


def step_bytes(model: LLaVA, batch: int, filled: int) -> int:
    """Return what a step of decoding has to read, with `filled` tokens in the cache.

    That is every weight once, except that of a table of embeddings only a row is read, unless the
    table is the head too; and the keys and values.
    """
    lm = model.language_model
    config = lm.config
    tensors = {t.data_ptr(): t.nbytes for t in (*lm.parameters(), *lm.buffers())}
    weights = sum(tensors.values())
    if not config.tied:
        weights -= lm.model.embed_tokens.weight.nbytes

    itemsize = lm.model.norm.weight.itemsize
    cache = 0
    for layer in config.layers:
        slots = slots_of(layer.window, filled)
        cache += 2 * layer.kv_heads * config.head_dim * batch * slots * itemsize
    return weights + cache


def step_seconds(model: LLaVA, prompts: torch.Tensor, new: int) -> float:
    """Return the median of the times between the tokens of a call."""
    at = []
    model.generate(
        prompts, max_new_tokens=new, stream=lambda tokens: at.append(time.perf_counter())
    )
    return statistics.median(after - before for before, after in zip(at, at[1:], strict=False))


# ---------------------------------------------------------------------- decoding


def decode(kind: str, batch: int, s: Setting, theirs) -> dict:
    """Return one case: all decode from the same random prompts, in turns.

    Prompts differ from round to round, because ours would go on from what its cache has of the
    last. The first round does not count.
    """
    model = load_ours(s.folder, kind, s.device)
    new = s.new_tokens
    options = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0}

    def decode_ours(ids):
        return model.generate(ids, max_new_tokens=new)

    def decode_theirs(ids):
        mask = torch.ones_like(ids)
        return theirs.generate(input_ids=ids, attention_mask=mask, **options)[:, PROMPT:]

    calls = {OURS: decode_ours, PEER: decode_theirs}
    if s.has_llama_cpp:
        file = s.folder / f"{kind}.gguf"
        if not file.exists():
            dense = load_ours(s.folder, "float32", s.device)
            llama_cpp.write(dense, kind, file)
        llama = llama_cpp.LlamaCpp(file, batch, s.threads)
        calls[LLAMA_CPP] = partial(llama.decode, new=new)

    last_id = model.language_model.config.vocab - 1  # the token of images
    g = torch.Generator().manual_seed(batch)
    rates = {name: [] for name in calls}
    peers = [name for name in calls if name != OURS]
    equal = dict.fromkeys(peers, 0)
    for turn in range(s.rounds + 1):
        ids = torch.randint(3, last_id, (batch, PROMPT), generator=g).to(s.device)
        tokens = {}
        for name in calls if turn % 2 == 0 else reversed(calls):
            seconds, tokens[name] = clock(partial(calls[name], ids), s.device)
            if turn > 0:
                rates[name].append(batch * new / seconds)
        for name in peers:
            equal[name] += int((tokens[OURS] == tokens[name]).sum())

    ratios = {}
    for name in peers:
        ratios[name] = [a / b for a, b in zip(rates[OURS], rates[name], strict=True)]
    return {
        "kind": kind,
        "batch": batch,
        "threads": s.threads,
        "rates": rates,
        "ratios": ratios,
        "step_ms": 1e3 * step_seconds(model, ids, new),
        "bytes": step_bytes(model, batch, PROMPT + new // 2),
        "equal": equal,
        "tokens": (s.rounds + 1) * batch * new,
    }


# ---------------------------------------------------------------------- questions about one picture


class Interview:
    """One picture and QUESTIONS questions about it, answered one after the other."""

    def __init__(self, folder: Path, kind: str, device: str):
        self.model = load_ours(folder, kind, device)
        self.device = device
        self.engine = Engine(self.model, 1, 1024)

        g = torch.Generator().manual_seed(0)
        side = self.model.vision_tower.processor.side
        dtype = self.model.language_model.model.norm.weight.dtype
        self.image = torch.randn(1, 3, side, side, generator=g).to(device, dtype)

        last_id = self.model.language_model.config.vocab - 1  # the token of images
        front = torch.tensor([5, IMAGE_TOKEN])
        self.prefill = Request(front, self.image, 1)
        self.requests = []
        for _ in range(QUESTIONS):
            text = torch.randint(3, last_id, (QUESTION,), generator=g)
            self.requests.append(Request(torch.cat([front, text]), self.image, ANSWER))

    def answer(self, requests: list[Request]) -> list[list[int]]:
        """Return the answers, with what the engine still has of earlier requests."""
        return [tokens for _, tokens in self.engine.serve(requests)]

    def answer_afresh(self, requests: list[Request]) -> list[list[int]]:
        """Return the answers of an engine that has forgotten earlier requests."""
        self.engine.forget()
        return self.answer(requests)

    def answer_alone(self) -> list[list[int]]:
        """Return all answers, each question on its own."""
        return [self.answer_afresh([request])[0] for request in self.requests]

    def round(self) -> tuple[dict[str, float], bool]:
        """Return the seconds of the parts, the gain and what is possible; and if answers agree."""
        v, _ = clock(lambda: self.model.encode_images(self.image), self.device)
        v_and_i, _ = clock(lambda: self.answer_afresh([self.prefill]), self.device)
        i = v_and_i - v

        # A question alone, once the picture is in the cache.
        self.answer_afresh(self.requests[:1])
        times = []
        for request in self.requests[1:5]:
            seconds, _ = clock(partial(self.answer, [request]), self.device)
            times.append(seconds)
        q = statistics.median(times)

        alone, apart = clock(self.answer_alone, self.device)
        together, joined = clock(lambda: self.answer_afresh(self.requests), self.device)
        possible = QUESTIONS * (v + i + q) / (v + i + QUESTIONS * q)
        found = {"v": v, "i": i, "q": q, "gain": alone / together, "possible": possible}
        return found, apart == joined


def ask_questions(folder: Path, kind: str, rounds: int, device: str) -> dict:
    """Return the gain of asking everything about one picture at once, and what is possible."""
    interview = Interview(folder, kind, device)
    interview.answer_afresh(interview.requests)  # does not count

    found = []
    equal = True
    for _ in range(rounds):
        numbers, agree = interview.round()
        found.append(numbers)
        equal = equal and agree
    return {
        "kind": kind,
        "rounds": found,
        "equal": equal,
        "shares": [numbers["gain"] / numbers["possible"] for numbers in found],
    }
