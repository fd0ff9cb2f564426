"""Run under one version of transformers or another: write random LLaVAs, or read ours.

python tests/tools/hf_llava.py write DIR      # small models, one folder each, with answers
python tests/tools/hf_llava.py read DIR...    # load each, answer its io.safetensors
python tests/tools/hf_llava.py chat DIR...    # answer chat.json by processor, template, pipeline
"""

import json
import sys
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    pipeline,
)

IMAGE, PATCH, SIDE = 90, 4, 12  # the image token's id, and the encoder's pixels
MODELS = (("clip", "llama"), ("siglip", "qwen2"), ("siglip", "gemma"), ("clip", "gemma3_text"))


@torch.no_grad()
def answer(model, folder: Path):
    io = load_file(folder / "io.safetensors")
    inputs = {"input_ids": io["input_ids"], "pixel_values": io["images"]}
    logits = model(**inputs).logits.float().contiguous()
    new = model.generate(
        **inputs, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    new = new[:, io["input_ids"].size(1) :].contiguous()
    save_file({"logits": logits, "generated": new}, folder / "answers.safetensors")


def write(folder: Path, tower: str, family: str):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12}
    tied = family in ("gemma", "gemma3_text")
    windows = {}
    if family == "gemma3_text":
        windows = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
    text = AutoConfig.for_model(
        family,
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        **heads,
        **windows,
    )
    vision = AutoConfig.for_model(
        f"{tower}_vision_model",
        hidden_size=30,
        intermediate_size=44,
        num_hidden_layers=3,
        num_attention_heads=3,
        patch_size=PATCH,
        image_size=SIDE,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=IMAGE,
            tie_word_embeddings=tied,
        )
    )
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder)
    # The feature selection `default` drops the first token: CLIP's class token, or a patch of
    # SigLIP's.
    n = (SIDE // PATCH) ** 2
    if tower == "siglip":
        n -= 1
    rows = [[1, 5, *[IMAGE] * n, 7, 9], [3, *[IMAGE] * n, 8, 2, 60]]
    save_file(
        {"input_ids": torch.tensor(rows), "images": torch.randn(2, 3, SIDE, SIDE)},
        folder / "io.safetensors",
    )
    answer(model.eval(), folder)


def load(folder: Path):
    kind = AutoModelForImageTextToText
    model, info = kind.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert json.loads((folder / "config.json").read_text())["architectures"] == [
        type(model).__name__
    ]
    (folder / "info.json").write_text(
        json.dumps({k: sorted(map(str, v)) for k, v in info.items() if v})
    )
    return model.eval()


@torch.no_grad()
def chat(folder: Path):
    """Of each chat: prompt, ids, pixels, 1000 logits, the greedy answer; and all in one batch.

    The pipeline answers the last of them: it takes pictures by the paths in their messages.
    """
    processor, model, got, tensors = AutoProcessor.from_pretrained(folder), load(folder), [], {}
    asked = json.loads((folder / "chat.json").read_text())
    prompts = [
        processor.apply_chat_template(a["messages"], add_generation_prompt=True) for a in asked
    ]
    images = [[Image.open(path).convert("RGB") for path in a["images"]] for a in asked]
    greedy = {"max_new_tokens": 12, "do_sample": False}
    for i, (prompt, shown) in enumerate(zip(prompts, images, strict=True)):
        inputs = processor(text=prompt, images=shown, return_tensors="pt")
        new = model.generate(**inputs, **greedy)[0, inputs["input_ids"].size(1) :]
        tensors[f"pixels{i}"] = inputs["pixel_values"].contiguous()
        tensors[f"logits{i}"] = model(**inputs).logits[0, :, :1000].contiguous()
        got.append(
            {
                "prompt": prompt,
                "input_ids": inputs["input_ids"][0].tolist(),
                "generated": new.tolist(),
            }
        )
    inputs = processor(text=prompts, images=sum(images, []), padding=True, return_tensors="pt")
    together = model.generate(**inputs, **greedy)[:, inputs["input_ids"].size(1) :].tolist()
    ask = pipeline("image-text-to-text", model=model, processor=processor)
    said = ask(text=asked[-1]["messages"], return_full_text=False, generate_kwargs=greedy)
    save_file(tensors, folder / "chat.safetensors")
    said = [
        said[0]["generated_text"],
        processor.decode(got[-1]["generated"], skip_special_tokens=True),
    ]
    (folder / "answered.json").write_text(
        json.dumps({"alone": got, "together": together, "pipeline": said})
    )


if __name__ == "__main__":
    command, *folders = sys.argv[1:]
    if command == "write":
        for tower, family in MODELS:
            (Path(folders[0]) / f"{tower}-{family}").mkdir()
            write(Path(folders[0]) / f"{tower}-{family}", tower, family)
    else:
        for folder in map(Path, folders):
            chat(folder) if command == "chat" else answer(load(folder), folder)
