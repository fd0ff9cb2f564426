"""Without a GPU the kernels of the exercises run in Triton's interpreter."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any exercise imports the kernels
