"""llama.cpp as a peer of bench/generate.py: the same weights at the same bits, in its own server.

    write(model, "bfloat16", file)               # as GGUF
    peer = LlamaCpp(file, rows=8, threads=1)
    tokens = peer.decode(prompts, 64)            # (B, T) -> (B, 64), greedy

It is PyPI's `xllamacpp`, which has llama.cpp's server in the process; `gguf` writes the file.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from checkpoints.gguf import graph_fields, text_tensors
from checkpoints.gguf_file import write_gguf

# Of our kinds of weights, llama.cpp's with as many bits. Its head has 8 bits in the last two; ours
# is bfloat16 there.
FILE_TYPES = {"float32": "float32", "bfloat16": "bfloat16", "int8": "q8_0", "nf4": "q4_0"}

NORMAL = 1  # llama.cpp's type of a token that is neither control nor byte


def installed() -> bool:
    """Return whether both packages are there."""
    try:
        import gguf  # noqa: F401
        import xllamacpp  # noqa: F401
    except ImportError:
        return False
    return True


def write(model, kind: str, file: Path):
    """Write the language model of a LLaVA as GGUF. Token i has the text <i>."""
    vocabulary = model.language_model.config.vocab
    tokens = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [f"<{i}>" for i in range(vocabulary)],
        "tokenizer.ggml.scores": [0.0] * vocabulary,
        "tokenizer.ggml.token_type": [NORMAL] * vocabulary,
    }
    fields = graph_fields(model) | tokens
    write_gguf(file, fields, text_tensors(model), FILE_TYPES[kind])


class LlamaCpp:
    """llama.cpp's server with a model, for so many sequences at once."""

    def __init__(self, file: Path, rows: int, threads: int):
        from xllamacpp import CommonParams, Server

        params = CommonParams()
        params.model.path = str(file)
        params.n_parallel = rows
        params.n_ctx = 256 * rows
        params.cpuparams.n_threads = threads
        params.cpuparams_batch.n_threads = threads
        params.verbosity = -1
        params.warmup = False
        self.server = Server(params)
        self.pool = ThreadPoolExecutor(rows)

    def decode(self, prompts: torch.Tensor, new: int) -> torch.Tensor:
        """Return the greedy answers (B, new) to prompts (B, T), all asked at once."""

        def answer(ids: list[int]) -> list[int]:
            request = {
                "prompt": ids,
                "max_tokens": new,
                "temperature": 0.0,
                "ignore_eos": True,
                "cache_prompt": False,
            }
            text = self.server.handle_completions(request)["choices"][0]["text"]
            return [int(number) for number in re.findall(r"<(\d+)>", text)]

        return torch.tensor(list(self.pool.map(answer, prompts.tolist())))
