"""On which GPU a kernel runs, and which GPUs have none of ours. No GPU is needed here."""

import contextlib

import pytest
import torch

import config
import generate
import kernels
from config import UserError
from evals import lmms_eval
from kernels import attention, cross_entropy, decode, glu, int8, lora, nf4, norms, rope
from model import LLaVA
from training import parallel

FILES = (attention, cross_entropy, decode, glu, int8, lora, nf4, norms, rope)
GPU_1 = torch.device("cuda", 1)


class OnGPU1:
    """What a tensor on the second GPU says of itself."""

    is_cuda = True
    device = GPU_1

    def get_device(self) -> int:
        return 1


@pytest.fixture
def gpus(monkeypatch):
    """Pretend that there are two GPUs. Return a list whose last number is the current one."""
    current = [0]

    @contextlib.contextmanager
    def device(chosen):
        current.append(torch.device(chosen).index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    return current


def launched(monkeypatch, gpus) -> list[tuple[str, int]]:
    """Return a list that gets (kernel, current GPU) of each launch; no kernel runs."""
    launches = []
    some_kernel = norms.forward_kernel
    monkeypatch.setattr(
        type(some_kernel),
        "run",
        lambda kernel, *args, **kwargs: launches.append((kernel.fn.__name__, gpus[-1])),
    )
    return launches


def test_every_kernel_runs_on_its_tensors_gpu(monkeypatch, gpus):
    launches = launched(monkeypatch, gpus)
    kernel_type = type(norms.forward_kernel)
    count = 0
    for file in FILES:
        for value in vars(file).values():
            if type(value) is kernel_type:
                value[(1,)](OnGPU1(), 3, BLOCK=16)
                count += 1
    assert count >= 15
    assert len(launches) == count and {gpu for _, gpu in launches} == {1}
    assert gpus == [0]  # what the caller's current GPU was, it is again


def test_a_launch_on_the_current_gpu_or_the_cpu_changes_no_device(monkeypatch, gpus):
    launches = launched(monkeypatch, gpus)
    monkeypatch.setattr(torch.cuda, "device", None)  # not to be called
    gpus.append(1)
    norms.forward_kernel[(1,)](OnGPU1())
    norms.forward_kernel[(1,)](torch.zeros(2))
    assert launches == [("forward_kernel", 1)] * 2


@pytest.fixture
def card(request, monkeypatch):
    """Pretend that there is a GPU of a compute capability, which emulates bfloat16 if need be."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: request.param)
    monkeypatch.setattr(torch.cuda, "set_device", lambda *_: None)
    return request.param


OLD = [(6, 1), (7, 0), (7, 5)]
NEW = [(8, 0), (8, 9), (9, 0), (12, 0)]


@pytest.mark.parametrize("card", OLD, indirect=True)
def test_an_older_gpu_runs_the_references_in_float32(card):
    assert not kernels.fused(OnGPU1())
    assert kernels.default_dtype(GPU_1) == torch.float32
    assert not parallel.use_bf16("auto", GPU_1) and not parallel.use_bf16("fp32", GPU_1)
    with pytest.raises(UserError, match="train.precision: bf16, but this GPU.*write auto or fp32"):
        parallel.use_bf16("bf16", GPU_1)


@pytest.mark.parametrize("card", NEW, indirect=True)
def test_a_newer_gpu_runs_the_kernels_in_bfloat16(card):
    assert kernels.fused(OnGPU1())
    assert kernels.default_dtype(GPU_1) == torch.bfloat16
    assert parallel.use_bf16("auto", GPU_1) and parallel.use_bf16("bf16", GPU_1)
    assert not parallel.use_bf16("fp32", GPU_1)


class Loaded(Exception):
    pass


@pytest.mark.parametrize("card", [(7, 5), (8, 0)], indirect=True)
@pytest.mark.parametrize("weights", [None, "nf4", "bf16", "fp32"])
def test_models_are_loaded_in_what_the_gpu_has(card, weights, monkeypatch, tmp_path):
    """generate.py and lmms-eval; what is asked for in so many words is obeyed."""

    def load(folder, dtype=None, device="cpu", *_):
        raise Loaded(dtype, torch.device(device).type)

    monkeypatch.setattr(LLaVA, "from_pretrained", load)
    want = torch.bfloat16 if card >= (8, 0) else torch.float32
    if weights == "bf16":
        want = torch.bfloat16
    elif weights == "fp32":
        want = torch.float32

    words = ["--model", str(tmp_path)]
    if weights:
        words += ["--weights", weights]
    with pytest.raises(Loaded) as loaded:
        generate.load_chat(generate.arguments(words))
    assert loaded.value.args == (want, "cuda")

    names = {None: None, "bf16": "bfloat16", "fp32": "float32"}
    if weights in names:
        with pytest.raises(Loaded) as loaded:
            lmms_eval.Barellava(str(tmp_path), dtype=names[weights])
        assert loaded.value.args == (want, "cuda")


def test_precision_on_a_cpu_is_as_the_recipe_says(monkeypatch):
    cpu = torch.device("cpu")
    for has_it in (False, True):
        found = {"avx512_bf16": has_it, "amx_bf16": False}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found)
        assert parallel.use_bf16("auto", cpu) == has_it
        assert parallel.use_bf16("bf16", cpu) and not parallel.use_bf16("fp32", cpu)
    assert kernels.default_dtype(cpu) == torch.float32
    assert not kernels.has_bf16(torch.device("mps"))
    assert config.Train().precision == "auto"
