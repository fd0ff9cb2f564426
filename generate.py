"""Ask a trained model about pictures.

    python generate.py --model out/demo --image photo.png --prompt "What colour is the circle?"
    python generate.py --model out/demo                       # a chat; /image FILE, /reset and /quit are commands

Several --image go into the prompt in their order, in front of the text unless it says <image> itself. The answer
is printed as it is made, then how long it took. Folders and Hugging Face ids both work as --model.
"""

from __future__ import annotations

import sys
import time

import torch

import config
import weights
from config import UserError
from data import load_image
from model import LLaVA
from templates import IMAGE, encode_prompt, load_tokenizer, stop_id


class Chat:
    """A model, its tokenizer, and a conversation that grows: turns and the pictures that stand in them."""

    def __init__(self, model: LLaVA, tokenizer, options: dict):
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.device = model.language_model.lm_head.weight.device
        self.turns: list[dict] = []
        self.images: list[torch.Tensor] = []
        self.waiting = 0  # pictures given but not yet asked about

    def add_image(self, file: str):
        """Show a picture; the next question is about it. Raises UserError when it cannot be read."""
        try:
            image = load_image(file)
        except ValueError as e:
            raise UserError(file, str(e), "give an image file") from None
        self.images.append(self.model.vision_tower.preprocess(image, self.model.config.image_mode))
        self.waiting += 1

    def ask(self, text: str, show=lambda text: print(text, end="", flush=True)) -> str:
        """Put a question, stream the answer to `show`, keep both in the conversation. Returns the answer."""
        if text.count(IMAGE) != self.waiting:
            text = f"{IMAGE}\n" * self.waiting + text.replace(IMAGE, "")
        self.waiting = 0
        self.turns += [{"from": "human", "value": text}, {"from": "gpt", "value": None}]
        template = self.model.config.template
        ids = torch.tensor(encode_prompt(self.turns, self.tokenizer, template))
        eos, made, shown = stop_id(self.tokenizer, template), [], ""

        def stream(step: list[int]):
            nonlocal shown
            made.extend(t for t in step if t != eos)
            answer = self.tokenizer.decode(made)
            if not answer.endswith("\ufffd"):  # half a character: wait for its other bytes
                show(answer[len(shown) :])
                shown = answer

        images = torch.stack(self.images).to(self.device) if self.images else None
        start = time.perf_counter()
        new = self.model.generate([ids], images, eos_token_id=eos, stream=stream, **self.options)
        seconds = time.perf_counter() - start
        answer = self.tokenizer.decode([t for t in new[0].tolist() if t != eos])
        show(answer[len(shown) :])  # beam search has streamed nothing; a last half character is shown as it is
        show(f"\n[{new.size(1)} tokens, {new.size(1) / seconds:.1f} tokens/s]\n")
        self.turns[-1]["value"] = answer.strip()
        return answer.strip()

    def command(self, line: str) -> bool:
        """One line of the interactive chat; False ends it."""
        word, _, rest = line.partition(" ")
        if word == "/quit":
            return False
        if word == "/reset":
            self.turns, self.images, self.waiting = [], [], 0
        elif word == "/image":
            self.add_image(rest.strip())
        elif word.startswith("/"):
            print("commands: /image FILE, /reset, /quit")
        elif line:
            self.ask(line)
        return True


def main(argv: list[str]):
    parser = config.parser(__doc__)
    parser.add_argument("--model", required=True, help="folder or Hugging Face id of a trained model")
    parser.add_argument("--image", action="append", default=[], help="a picture; may be given several times")
    parser.add_argument("--prompt", help="the question; without it a chat starts")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer (256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (0)")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from the smallest set of this probability (1)")
    parser.add_argument("--beams", type=int, default=1, help="beam search with so many beams (1)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights (float32)")
    parser.add_argument("--allow-pickle", action="store_true", help="also read pytorch_model.bin, tensors only")
    a = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = weights.resolve(a.model, allow_pickle=a.allow_pickle)
    model = LLaVA.from_pretrained(folder, getattr(torch, a.dtype), device, a.allow_pickle)
    options = {"max_new_tokens": a.max_new_tokens, "temperature": a.temperature, "top_p": a.top_p, "num_beams": a.beams}
    chat = Chat(model, load_tokenizer(folder), options)
    for file in a.image:
        chat.add_image(file)
    if a.prompt is not None:
        chat.ask(a.prompt)
        return
    if sys.stdin.isatty():
        print("Ask about pictures. /image FILE shows one, /reset forgets all, /quit leaves.")
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            return
        try:
            if not chat.command(line.strip()):
                return
        except UserError as e:
            print(f"error: {e}")


if __name__ == "__main__":
    config.cli(main, __doc__)
