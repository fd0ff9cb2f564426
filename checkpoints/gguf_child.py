"""The child process of gguf_check.py: the llama.cpp server of the package xllamacpp, asked.

It reads {"model", "mmproj", "context", "tokens", "conversations"} from its input, and writes a list
of answers, one for each conversation, as the last line of its output. llama.cpp ends its process
where it finds a mistake, so it is not a part of ours.
"""

import json
import os
import sys


def main(request: dict):
    """Answer the conversations of a request."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = request["model"]
    params.mmproj.path = request["mmproj"]
    params.n_ctx = request["context"]
    params.n_parallel = 1
    params.use_jinja = True
    params.warmup = False
    params.ui = False

    # As exact as ours: all on the CPU, with keys and values in float32.
    params.n_gpu_layers = 0
    params.mmproj_use_gpu = False
    params.cache_type_k = xllamacpp.ggml_type.GGML_TYPE_F32
    params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)

    answers = []
    for messages in request["conversations"]:
        body = {"messages": messages, "max_tokens": request["tokens"], "temperature": 0}
        response = server.handle_chat_completions(body)
        answers.append(response["choices"][0]["message"]["content"])
    print()
    print(json.dumps(answers), flush=True)
    os._exit(0)  # without waiting for the threads of the server


if __name__ == "__main__":
    main(json.load(sys.stdin))
