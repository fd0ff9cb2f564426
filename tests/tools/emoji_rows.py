"""A real data set as a user's own: Twitter's emoji as rows of two questions each.

    npm pack emoji-datasource-twitter@16.0.0 && tar xzf emoji-datasource-twitter-16.0.0.tgz
    python tests/tools/emoji_rows.py package OUT       # writes three folders in OUT
    python data.py check --data OUT/train
    python train.py recipes/own.toml model.checkpoint=out/demo stage.own.data=OUT/train
    python evaluate.py --model out/own --task rows --data OUT/categories --baseline out/demo

Each is a folder of pictures with a metadata.csv of file_name, question, answer: what a user has who
labels pictures. OUT/train asks what an emoji is called, and of what category it is. OUT/names and
OUT/categories ask the one and the other about emoji that are held out.

The package has 1,911 emoji and 1,875 pictures of the same in other tones of skin. The latter are
left out: a model that has seen one tone knows the others. One in five emoji is held out, by a hash
of its picture.

The pictures are Twitter's, CC-BY 4.0, and nothing of the package belongs in this repository.
"""

import csv
import hashlib
import json
import shutil
import sys
from pathlib import Path

PICTURES = "img/twitter/64"  # 64 x 64 pixels, transparent around the emoji
QUESTIONS = {"names": "What is this?", "categories": "Which category?"}
ONE_IN = 5


def read_emoji(package: Path) -> list[tuple[Path, dict[str, str]]]:
    """Return the picture of each emoji, and its answer to each of QUESTIONS."""
    found = []
    for emoji in json.loads((package / "emoji.json").read_text()):
        # Five components of others, as a tone of skin, are no pictures of anything.
        if emoji["has_img_twitter"] and emoji["category"] != "Component":
            answers = {"names": emoji["name"].lower(), "categories": emoji["category"].lower()}
            found.append((package / PICTURES / emoji["image"], answers))
    return found


def is_held_out(picture: Path) -> bool:
    """Say whether an emoji is held out, by a hash of its picture."""
    digest = hashlib.sha256(picture.read_bytes()).digest()
    return int.from_bytes(digest[:8]) % ONE_IN == 0


def write(package: Path, out: Path):
    """Write the folders of pictures, each with its metadata.csv."""
    rows = {"train": [], "names": [], "categories": []}
    for picture, answers in read_emoji(package):
        for kind, question in QUESTIONS.items():
            folder = kind if is_held_out(picture) else "train"
            rows[folder].append((picture, question, answers[kind]))

    for name, of_folder in rows.items():
        folder = out / name
        folder.mkdir(parents=True)
        with open(folder / "metadata.csv", "w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["file_name", "question", "answer"])
            for picture, question, answer in of_folder:
                shutil.copyfile(picture, folder / picture.name)
                table.writerow([picture.name, question, answer])


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
