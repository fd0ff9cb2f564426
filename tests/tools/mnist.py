"""MNIST's test set as LLaVA rows, and the score of a model on the rows that were held out.

python tests/tools/mnist.py write out/mnist-data            # 9,000 rows to train, 1,000 held out
torchrun train.py tests/tools/mnist.toml
python tests/tools/mnist.py score out/mnist out/mnist-data  # exact digit on the held-out rows
"""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
SOURCE = Path(__file__).resolve().parents[3] / "shared" / "assets" / "datasets" / "mnist"
WORDS = "zero one two three four five six seven eight nine".split()
HELD_OUT = 1000  # the last ones
QUESTION = "<image>\nWhat digit is this?"
BATCH = 100


def read_idx(name: str, header: int) -> np.ndarray:
    """Return the bytes of one of MNIST's files after its header."""
    return np.frombuffer(gzip.decompress((SOURCE / name).read_bytes()), np.uint8, offset=header)


def make_row(number: int, image: str, question: str, answer: str) -> dict:
    """Return one LLaVA row."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": f"mnist-{number}", "image": image, "conversations": turns}


def write(folder: Path):
    """Write the pictures, and captions and questions to train on and to hold out."""
    pixels = read_idx("t10k-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
    labels = read_idx("t10k-labels-idx1-ubyte.gz", 8)
    (folder / "images").mkdir(parents=True)
    captions = []
    questions = []
    for i, (picture, label) in enumerate(zip(pixels, labels, strict=True)):
        name = f"images/{i:05d}.png"
        Image.fromarray(picture).save(folder / name)
        captions.append(make_row(i, name, "<image>", f"Number {label}, {WORDS[label]}."))
        questions.append(make_row(i, name, QUESTION, str(label)))

    files = {
        "captions": captions[:-HELD_OUT],
        "questions": questions[:-HELD_OUT],
        "held-out": questions[-HELD_OUT:],
    }
    for name, rows in files.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))


def score(model_folder: Path, folder: Path) -> float:
    """Return the share of the held-out rows whose generated answer is exactly the digit."""
    from inputs.pictures import load_image
    from inputs.templates import encode_prompt, stop_id
    from inputs.tokenizer import load_tokenizer
    from model import LLaVA

    model = LLaVA.from_pretrained(model_folder)
    tokenizer = load_tokenizer(model_folder)
    template = model.config.template
    prompt = [{"from": "human", "value": QUESTION}]
    ids = torch.tensor(encode_prompt(prompt, tokenizer, template))
    eos = stop_id(tokenizer, template)

    rows = json.loads((folder / "held-out.json").read_text())
    right = 0
    for at in range(0, len(rows), BATCH):
        part = rows[at : at + BATCH]
        pictures = [load_image(folder / row["image"]) for row in part]
        images = torch.stack([model.vision_tower.processor(picture) for picture in pictures])
        new = model.generate([ids] * len(part), images, max_new_tokens=4, eos_token_id=eos)
        for row, tokens in zip(part, new.tolist(), strict=True):
            answer = tokenizer.decode([t for t in tokens if t != eos]).strip()
            if answer == row["conversations"][1]["value"]:
                right += 1
    return right / len(rows)


if __name__ == "__main__":
    command, *folders = sys.argv[1:]
    if command == "write":
        write(Path(folders[0]))
    else:
        print(f"exact digit: {100 * score(*map(Path, folders)):.1f} %")
