"""Ask nanoVLM's own code, which is fetched for the purpose and is no part of this repository.

    git clone https://github.com/huggingface/nanoVLM /tmp/nanovlm      # or NANOVLM=ANOTHER/FOLDER
    python tests/tools/nanovlm.py golden        # writes tests/golden/nanovlm anew

    python tests/tools/nanovlm.py make CONFIG.json DIR     # a folder of random weights
    python tests/tools/nanovlm.py answer DIR    # DIR/cases.json -> DIR/answers.safetensors

nanoVLM runs with transformers 4 (.venv/hf4). Of torchvision and einops it needs three functions:
where they are not installed, these have stand-ins here.
"""

import json
import os
import random
import subprocess
import sys
import types
from pathlib import Path

import tokenizers
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers

ROOT = Path(__file__).resolve().parents[2]
OLDER = ROOT / ".venv" / "hf4"
REFERENCE = Path(os.environ.get("NANOVLM", "/tmp/nanovlm"))
GOLDEN = ROOT / "tests" / "golden" / "nanovlm"

# Two small odd models: 9 x 9 patches in squares of 3, and 6 x 6 in squares of 2. The first one
# enlarges each picture, to 3 views along an edge; a square of 26 pixels gets a row more.
CONFIGS = {
    "enlarged": {
        "vit_hidden_dim": 24,
        "vit_inter_dim": 40,
        "vit_patch_size": 2,
        "vit_img_size": 18,
        "vit_n_heads": 2,
        "vit_n_blocks": 1,
        "lm_hidden_dim": 36,
        "lm_inter_dim": 52,
        "lm_n_heads": 6,
        "lm_n_kv_heads": 2,
        "lm_n_blocks": 2,
        "lm_re_base": 777,
        "mp_pixel_shuffle_factor": 3,
        "mp_image_token_length": 9,
        "max_img_size": 54,
    },
    "untied": {
        "vit_hidden_dim": 16,
        "vit_inter_dim": 24,
        "vit_patch_size": 7,
        "vit_img_size": 42,
        "vit_n_heads": 2,
        "vit_n_blocks": 3,
        "vit_ln_eps": 1e-5,
        "lm_hidden_dim": 32,
        "lm_inter_dim": 48,
        "lm_n_heads": 4,
        "lm_n_kv_heads": 1,
        "lm_n_blocks": 3,
        "lm_tie_weights": False,
        "mp_pixel_shuffle_factor": 2,
        "mp_image_token_length": 9,
        "max_img_size": 168,
        "resize_to_max_side_len": False,
    },
}
CONTROLS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def write_tokenizer(folder: Path):
    """Write a byte-level tokenizer with the control tokens of SmolLM2-Instruct."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    fast = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(list(CONTROLS))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "add_bos_token": False,
        "model_max_length": 8192,
    }
    folder.mkdir(parents=True, exist_ok=True)
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def config_of(name: str, tokenizer: Path) -> dict:
    """Return a config.json with the vocabulary that the tokenizer has behind the added tokens."""
    size = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json")).get_vocab_size()
    return {
        **CONFIGS[name],
        "lm_base_vocab_size": size,
        "lm_vocab_size": size + 66,
        "lm_tokenizer": str(tokenizer),
    }


def drawn(size: tuple[int, int], seed: int) -> Image.Image:
    """Return a picture of noise."""
    width, height = size
    pixels = random.Random(seed).randbytes(3 * width * height)
    return Image.frombytes("RGB", size, pixels)


def run(*arguments):
    """Run this script in a process of its own, with transformers 4."""
    env = {**os.environ, "PYTHONPATH": str(OLDER), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr


# ----------------------------------------------------------------------------- under transformers 4


def resize(image, size: list[int], interpolation: str = "bilinear"):
    """torchvision's: of a picture by Pillow, of a tensor by torch, with antialiasing."""
    if isinstance(image, Image.Image):
        return image.resize(size[::-1], Image.Resampling[interpolation.upper()])
    return torch.nn.functional.interpolate(image, size, mode=interpolation, antialias=True)


class ToTensor:
    """torchvision's: a picture as (3, H, W) float32 from 0 to 1."""

    def __call__(self, image: Image.Image) -> torch.Tensor:
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return pixels.view(image.height, image.width, 3).permute(2, 0, 1).contiguous().div(255)


class Compose:
    """torchvision's: one step after the other."""

    def __init__(self, steps):
        self.steps = steps

    def __call__(self, value):
        for step in self.steps:
            value = step(value)
        return value


def rearrange(x: torch.Tensor, pattern: str, ph: int, pw: int) -> torch.Tensor:
    """einops', of the one pattern that nanoVLM has."""
    assert pattern == "b c (nh ph) (nw pw) -> (b nh nw) c ph pw"
    x = x.unflatten(3, (-1, pw)).unflatten(2, (-1, ph))  # (b, c, nh, ph, nw, pw)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def stand_in(name: str, **members):
    """Put a module into sys.modules, unless the package is installed."""
    module = types.ModuleType(name)
    for key, value in members.items():
        setattr(module, key, value)
    sys.modules[name] = module


def import_reference(folder: Path = REFERENCE):
    """Make nanoVLM's packages `models` and `data` importable."""
    import transformers  # noqa: F401 (it looks for torchvision, and would take a stand-in for it)

    try:
        import torchvision  # noqa: F401
    except ImportError:
        modes = types.SimpleNamespace(BICUBIC="bicubic", BILINEAR="bilinear")
        functional = {"resize": resize, "InterpolationMode": modes}
        stand_in("torchvision")
        stand_in("torchvision.transforms", Compose=Compose, ToTensor=ToTensor)
        stand_in("torchvision.transforms.functional", **functional)
        sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]
    try:
        import einops  # noqa: F401
    except ImportError:
        stand_in("einops", rearrange=rearrange)

    # Before our own files of these names.
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != ROOT]
    sys.path.insert(0, str(folder))


def make(config: Path, folder: Path):
    """Write a model of random weights."""
    from models.config import VLMConfig
    from models.vision_language_model import VisionLanguageModel

    torch.manual_seed(3)
    cfg = VLMConfig(**json.loads(config.read_text()))
    model = VisionLanguageModel(cfg, load_backbone=False)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, 0.2)
            if p.dim() == 1:
                p.add_(1.0)
    model.save_pretrained(folder)


def answer(folder: Path):
    """Write what nanoVLM computes of each case: {"images": [files], "user": ..., "assistant": ...}.

    ids, targets, pixels, loss and gradients ("all", or of the names given) of the finished
    conversation; ids, the last logits (0 = all) and eight greedy tokens of the prompt.
    """
    from data.datasets import VQADataset
    from data.processors import get_image_processor, get_image_string, get_tokenizer
    from models.vision_language_model import VisionLanguageModel

    model = VisionLanguageModel.from_pretrained(str(folder))
    c = model.cfg
    tok = get_tokenizer(c.lm_tokenizer, c.vlm_extra_tokens, c.lm_chat_template)
    process = get_image_processor(c.max_img_size, c.vit_img_size, c.resize_to_max_side_len)
    rows = VQADataset([], tok, process, c.mp_image_token_length)

    found = {}
    for i, case in enumerate(json.loads((folder / "cases.json").read_text())):
        images = [Image.open(folder / name).convert("RGB") for name in case["images"]]
        row = rows._process_data({"images": images, "texts": [case]})
        found[f"{i}.ids"] = row["input_ids"]
        found[f"{i}.targets"] = row["labels"]
        for k, pixels in enumerate(row["images"]):
            found[f"{i}.pixels.{k}"] = pixels

        model.zero_grad()
        _, loss = model(row["input_ids"][None], [row["images"]], targets=row["labels"][None])
        loss.backward()
        found[f"{i}.loss"] = loss.detach()
        for name, p in model.named_parameters():
            if case["gradients"] == "all" or name in case["gradients"]:
                found[f"{i}.gradient.{name}"] = p.grad.clone()

        counts = [process(image)[1] for image in images]
        content = get_image_string(tok, counts, c.mp_image_token_length) + case["user"]
        messages = [{"role": "user", "content": content}]
        prompt = tok.apply_chat_template([messages], tokenize=True, add_generation_prompt=True)
        ids = torch.tensor(prompt)
        with torch.no_grad():
            hidden, _ = model(ids, [row["images"]])
            found[f"{i}.logits"] = model.decoder.head(hidden)[0, -case["logits"] :]
        new = model.generate(ids, [row["images"]], max_new_tokens=8, greedy=True)
        found[f"{i}.prompt"] = ids[0]
        found[f"{i}.tokens"] = new[0]
    found["image_token"] = torch.tensor(tok.image_token_id)
    save_file(
        {key: value.contiguous() for key, value in found.items()}, folder / "answers.safetensors"
    )


# --------------------------------------------------------------------------------- the golden case

GOLDEN_SIZES = ((30, 20), (20, 50), (26, 26), (5, 6))
GOLDEN_TALKS = (
    (["0.png"], "What is this?", "A dog."),
    (["1.png", "3.png"], "And these?", "Two."),
    (["2.png"], "A square", "Yes."),
    ([], "No picture", "None."),
)
GOLDEN_GRADIENTS = [
    "vision_encoder.blocks.0.attn.qkv_proj.bias",
    "vision_encoder.patch_embedding.conv.weight",
    "decoder.blocks.1.norm2.weight",
]


def cases(talks, gradients: list[str] | str, logits: int) -> list[dict]:
    """Return what `answer` reads, of (pictures, question, answer)."""
    made = []
    for images, user, assistant in talks:
        made.append(
            {
                "images": images,
                "user": user,
                "assistant": assistant,
                "gradients": gradients if images else [],
                "logits": logits,
            }
        )
    return made


def write_golden():
    """Write tests/golden/nanovlm: a model, its tokenizer, pictures, and nanoVLM's answers."""
    write_tokenizer(GOLDEN)
    config = GOLDEN / "config.json"
    config.write_text(json.dumps(config_of("enlarged", GOLDEN)))
    run("make", config, GOLDEN)
    for i, size in enumerate(GOLDEN_SIZES):
        drawn(size, i).save(GOLDEN / f"{i}.png")
    (GOLDEN / "cases.json").write_text(json.dumps(cases(GOLDEN_TALKS, GOLDEN_GRADIENTS, 4)))
    run("answer", GOLDEN)

    # The folder of the tokenizer is on this machine alone.
    said = json.loads(config.read_text())
    said["lm_tokenizer"] = "HuggingFaceTB/SmolLM2-360M-Instruct"
    config.write_text(json.dumps(said, indent=4))


if __name__ == "__main__":
    verb, *rest = sys.argv[1:]
    if verb == "golden":
        write_golden()
    else:
        import_reference()
        {"make": make, "answer": answer}[verb](*map(Path, rest))
