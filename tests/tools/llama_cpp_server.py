"""The process behind tests/tools/llama_cpp.py: llama.cpp's server with one model, until stdin ends.

python -m tests.tools.llama_cpp_server SETTINGS     # JSON; prints where it listens
"""

import json
import os
import sys

import xllamacpp


def main(settings: dict):
    """Serve until stdin is closed."""
    params = xllamacpp.CommonParams()
    params.model.path = settings["text"]
    params.mmproj.path = settings["mmproj"]
    params.n_ctx = settings["context"]
    params.n_parallel = 1
    params.cpuparams.n_threads = 1
    params.cpuparams_batch.n_threads = 1
    params.n_gpu_layers = 0
    params.mmproj_use_gpu = False
    params.warmup = False
    params.fit_params = False
    params.use_jinja = True
    params.ui = False
    params.cache_ram_mib = 0
    if settings["exact"]:
        params.cache_type_k = xllamacpp.ggml_type.GGML_TYPE_F32
        params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if settings["adapter"]:
        adapter = xllamacpp.CommonAdapterLoraInfo()
        adapter.path = settings["adapter"]
        adapter.scale = 1.0
        params.lora_adapters = [adapter]
    params.hostnames = ["127.0.0.1"]
    params.port = 0

    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()
    os._exit(0)  # without waiting for the threads of the server


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
