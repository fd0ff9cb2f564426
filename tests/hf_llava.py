"""Run by test_export.py under one version of transformers or another: write random LLaVAs, or read ours.

python tests/hf_llava.py write DIR      # small LlavaForConditionalGeneration models, one folder each, with answers
python tests/hf_llava.py read DIR...    # load each, answer its io.safetensors, say what did not fit
python tests/hf_llava.py chat DIR...    # answer the chats of its chat.json through processor and chat template
"""

import json
import sys
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoProcessor, LlavaConfig, LlavaForConditionalGeneration

IMAGE, PATCH, SIDE = 90, 4, 12  # the image token's id, and the encoder's pixels
MODELS = (("clip", "llama"), ("siglip", "qwen2"), ("siglip", "gemma"))


@torch.no_grad()
def answer(model, folder: Path):
    io = load_file(folder / "io.safetensors")
    inputs = {"input_ids": io["input_ids"], "pixel_values": io["images"]}
    logits = model(**inputs).logits.float().contiguous()
    new = model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    new = new[:, io["input_ids"].size(1) :].contiguous()
    save_file({"logits": logits, "generated": new}, folder / "answers.safetensors")


def write(folder: Path, tower: str, family: str):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12}
    tied = family == "gemma"
    text = AutoConfig.for_model(family, vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
                                initializer_range=0.2, tie_word_embeddings=tied, **heads)  # fmt: skip
    vision = AutoConfig.for_model(f"{tower}_vision_model", hidden_size=30, intermediate_size=44, num_hidden_layers=3,
                                  num_attention_heads=3, patch_size=PATCH, image_size=SIDE)  # fmt: skip
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, tie_word_embeddings=tied)
    )
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder)
    n = (SIDE // PATCH) ** 2 - (tower == "siglip")  # `default` drops CLIP's class token, and a patch of SigLIP's
    rows = [[1, 5, *[IMAGE] * n, 7, 9], [3, *[IMAGE] * n, 8, 2, 60]]
    save_file({"input_ids": torch.tensor(rows), "images": torch.randn(2, 3, SIDE, SIDE)}, folder / "io.safetensors")
    answer(model.eval(), folder)


def read(folder: Path):
    model, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    (folder / "info.json").write_text(json.dumps({k: sorted(map(str, v)) for k, v in info.items() if v}))
    answer(model.eval(), folder)


def chat(folder: Path):
    processor = AutoProcessor.from_pretrained(folder)
    model, got, pixels = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32), [], {}
    for asked in json.loads((folder / "chat.json").read_text()):
        prompt = processor.apply_chat_template(asked["messages"], add_generation_prompt=True)
        inputs = processor(text=prompt, images=Image.open(asked["image"]).convert("RGB"), return_tensors="pt")
        new = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].size(1) :]
        pixels[str(len(got))] = inputs["pixel_values"].contiguous()
        got.append({"prompt": prompt, "input_ids": inputs["input_ids"][0].tolist(), "generated": new.tolist()})
    save_file(pixels, folder / "pixels.safetensors")
    (folder / "answered.json").write_text(json.dumps(got))


if __name__ == "__main__":
    command, *folders = sys.argv[1:]
    if command == "write":
        for tower, family in MODELS:
            (Path(folders[0]) / f"{tower}-{family}").mkdir()
            write(Path(folders[0]) / f"{tower}-{family}", tower, family)
    else:
        for folder in map(Path, folders):
            {"read": read, "chat": chat}[command](folder)
