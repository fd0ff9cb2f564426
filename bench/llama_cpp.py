"""llama.cpp as a peer of bench/generate.py: the same weights at the same bits, in its own server.

    write(lm, "bfloat16", file)                  # a Llama as GGUF
    peer = LlamaCpp(file, rows=8, threads=1)
    tokens = peer.decode(prompts, 64)            # (B, T) -> (B, 64), greedy

It is PyPI's `xllamacpp`, which has llama.cpp's server in the process; `gguf` writes the file.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

# Of our kinds of weights, the type of llama.cpp with as many bits. Its head has it, too; ours is
# bfloat16 beside int8 and NF4 weights.
TYPES = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0", "nf4": "Q4_0"}

LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def installed() -> bool:
    """Return whether both packages are there."""
    try:
        import gguf  # noqa: F401
        import xllamacpp  # noqa: F401
    except ImportError:
        return False
    return True


def write(lm, kind: str, file: Path):
    """Write a Llama with a tied head as GGUF; the tokens have no text."""
    import gguf

    c = lm.config
    layer = c.layers[0]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(len(c.layers))
    writer.add_context_length(4096)
    writer.add_embedding_length(c.width)
    writer.add_feed_forward_length(layer.intermediate)
    writer.add_head_count(layer.heads)
    writer.add_head_count_kv(layer.kv_heads)
    writer.add_layer_norm_rms_eps(lm.model.norm.eps)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_rope_dimension_count(c.rotary_dim)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{i}>" for i in range(c.vocab)])
    writer.add_token_scores([0.0] * c.vocab)
    writer.add_token_types([gguf.TokenType.NORMAL] * c.vocab)

    def add(name: str, tensor: torch.Tensor):
        values = tensor.detach().float().numpy()
        type = gguf.GGMLQuantizationType[TYPES[kind]]
        if values.ndim == 1:
            type = gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{name}.weight", gguf.quantize(values, type), raw_dtype=type)

    add("token_embd", lm.model.embed_tokens.weight)
    if not c.tied:
        add("output", lm.lm_head.weight)
    add("output_norm", lm.model.norm.weight)
    for i, block in enumerate(lm.blocks):
        for ours, theirs in LAYER.items():
            weight = block.get_submodule(ours).weight
            if theirs in ("attn_q", "attn_k"):
                # Its graph turns neighbours in a head where ours turns halves.
                halves = weight.unflatten(0, (-1, 2, c.head_dim // 2))
                weight = halves.transpose(1, 2).reshape(weight.shape)
            add(f"blk.{i}.{theirs}", weight)

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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
