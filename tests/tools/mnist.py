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


def write(folder: Path):
    pixels = np.frombuffer(
        gzip.decompress((SOURCE / "t10k-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16
    )
    labels = np.frombuffer(
        gzip.decompress((SOURCE / "t10k-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8
    )
    (folder / "images").mkdir(parents=True)
    captions, questions = [], []
    for i, (picture, label) in enumerate(zip(pixels.reshape(-1, 28, 28), labels, strict=True)):
        name = f"images/{i:05d}.png"
        Image.fromarray(picture).save(folder / name)

        def row(question: str, answer: str, i=i, name=name) -> dict:
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            return {"id": f"mnist-{i}", "image": name, "conversations": turns}

        captions.append(row("<image>", f"Number {label}, {WORDS[label]}."))
        questions.append(row(QUESTION, str(label)))
    files = {
        "captions": captions[:-HELD_OUT],
        "questions": questions[:-HELD_OUT],
        "held-out": questions[-HELD_OUT:],
    }
    for name, rows in files.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))


def score(model_folder: Path, folder: Path) -> float:
    """Share of the held-out rows whose generated answer is exactly the digit."""
    from inputs.pictures import load_image
    from inputs.templates import encode_prompt, stop_id
    from inputs.tokenizer import load_tokenizer
    from model import LLaVA

    model, tokenizer = LLaVA.from_pretrained(model_folder), load_tokenizer(model_folder)
    template, rows = model.config.template, json.loads((folder / "held-out.json").read_text())
    ids = torch.tensor(encode_prompt([{"from": "human", "value": QUESTION}], tokenizer, template))
    right = 0
    for at in range(0, len(rows), 100):
        part = rows[at : at + 100]
        images = torch.stack(
            [model.vision_tower.preprocess(load_image(folder / r["image"])) for r in part]
        )
        eos = stop_id(tokenizer, template)
        new = model.generate([ids] * len(part), images, max_new_tokens=4, eos_token_id=eos)
        answers = [tokenizer.decode([t for t in row if t != eos]).strip() for row in new.tolist()]
        right += sum(
            a == r["conversations"][1]["value"] for a, r in zip(answers, part, strict=True)
        )
    return right / len(rows)


if __name__ == "__main__":
    command, *folders = sys.argv[1:]
    if command == "write":
        write(Path(folders[0]))
    else:
        print(f"exact digit: {100 * score(*map(Path, folders)):.1f} %")
