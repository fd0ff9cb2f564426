"""Ask a trained model about pictures and videos.

    python generate.py --model out/demo --image photo.png --prompt "What colour is the circle?"
    python generate.py --model DIR --video clip.mp4 --prompt "What happens?"
    python generate.py --model out/demo            # a chat; /image FILE, /video FILE, /reset and /quit are commands
    python generate.py --model out/demo --weights nf4 --temperature 0.7 --top-p 0.9 --seed 1 --stop "\\n"

Several --image, then --video, go into the prompt in their order, in front of the text unless it says <image> itself.
The answer is printed as it is made, then how many tokens a second; a later question of a chat starts from what has been
read of the earlier ones. Folders and Hugging Face ids both work as --model. With a temperature equal seeds give equal
answers. --weights int8 and nf4 quantize the language model as it is loaded, as bitsandbytes does, and compute in bf16.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import torch

import config
import lora
from checkpoints.files import resolve
from config import UserError
from inputs.sample import load_item
from inputs.templates import IMAGE, encode_prompt, stop_id
from inputs.tokenizer import load_tokenizer
from model import LLaVA
from packing import Item


class Chat:
    """A model, its tokenizer, and a conversation that grows: turns and the pictures that stand in them.

    options are LLaVA.generate's; an answer also ends where it contains one of `stop`, which is left out of it.
    """

    def __init__(self, model: LLaVA, tokenizer, options: dict, stop: Sequence[str] = ()):
        self.model, self.tokenizer, self.options, self.stop = model.eval(), tokenizer, options, stop
        self.device = model.language_model.lm_head.weight.device
        self.turns: list[dict] = []
        self.items: list[Item] = []
        self.waiting = 0  # pictures given but not yet asked about

    def show(self, file: str, kind: str = "image"):
        """Show a picture or a video (kind); the next question is about it. Raises UserError if it cannot be read."""
        try:
            self.items.append(load_item(file, kind, self.model.views))
        except UserError:
            raise
        except ValueError as e:
            raise UserError(file, str(e), f"give another {kind} file") from None
        self.waiting += 1

    def ask(self, text: str, show=lambda text: print(text, end="", flush=True)) -> str:
        """Put a question, stream the answer to `show`, keep both in the conversation. Returns the answer."""
        if text.count(IMAGE) != self.waiting:
            text = f"{IMAGE}\n" * self.waiting + text.replace(IMAGE, "")
        self.waiting = 0
        self.turns += [{"from": "human", "value": text}, {"from": "gpt", "value": None}]
        template = self.model.config.template
        ids = torch.tensor(encode_prompt(self.turns, self.tokenizer, template))
        eos, shown = stop_id(self.tokenizer, template), ""

        def read(tokens: list[int]) -> tuple[str, bool]:
            """Their text up to where the answer ends, and whether it does."""
            said = self.tokenizer.decode([t for t in tokens if t != eos])
            ends = [at for s in self.stop if (at := said.find(s)) >= 0]
            return said[: min(ends, default=len(said))], bool(ends)

        def until(tokens: list[int]) -> bool:
            """Shows what is new; true where the answer ends."""
            nonlocal shown
            answer, ends = read(tokens)
            # Half a character, or what may become a stop, waits for the tokens that follow.
            half = answer.endswith("\ufffd") or any(
                answer.endswith(s[:n]) for s in self.stop for n in range(1, len(s))
            )
            if ends or not half:
                show(answer[len(shown) :])
                shown = answer
            return ends

        start = time.perf_counter()
        beams = self.options.get("num_beams", 1) > 1  # whose answer is known at the end only
        new = self.model.generate(
            [ids], self.items, eos_token_id=eos, until=None if beams else until, **self.options
        )
        seconds = time.perf_counter() - start
        answer, _ = read(new[0].tolist())
        show(answer[len(shown) :])
        show(f"\n[{new.size(1)} tokens, {new.size(1) / seconds:.1f} tokens/s]\n")
        self.turns[-1]["value"] = answer.strip()
        return answer.strip()

    def command(self, line: str) -> bool:
        """One line of the interactive chat; False ends it."""
        word, _, rest = line.partition(" ")
        if word == "/quit":
            return False
        if word == "/reset":
            self.turns, self.items, self.waiting = [], [], 0
        elif word in ("/image", "/video"):
            self.show(rest.strip(), word[1:])
        elif word.startswith("/"):
            print("commands: /image FILE, /video FILE, /reset, /quit")
        elif line:
            self.ask(line)
        return True


def main(argv: list[str]):
    parser = config.parser(__doc__)
    parser.add_argument(
        "--model", required=True, help="folder or Hugging Face id of a trained model"
    )
    parser.add_argument(
        "--image", action="append", default=[], help="a picture; may be given several times"
    )
    parser.add_argument(
        "--video", action="append", default=[], help="a video, or a folder of its frames; likewise"
    )
    parser.add_argument("--prompt", help="the question; without it a chat starts")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer (256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token, 1 draws as the "
                        "model has it, more is bolder (0)")  # fmt: skip
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="draw from the fewest tokens of this probability (1)",
    )
    parser.add_argument(
        "--top-k",
        type=int,
        default=0,
        help="draw from so many of the likeliest tokens (0: from all)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws (0)")
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        help="text that ends an answer; may be given several times",
    )
    parser.add_argument("--beams", type=int, default=1, help="beam search with so many beams (1)")
    parser.add_argument(
        "--weights",
        choices=("fp32", "bf16", *lora.KINDS),
        help="of the language model (fp32; a GPU: bf16)",
    )
    parser.add_argument(
        "--allow-pickle", action="store_true", help="also read pytorch_model.bin, tensors only"
    )
    a = parser.parse_args(argv)
    if a.beams > 1 and a.temperature:
        raise UserError("--beams", "beam search draws nothing", "leave out --temperature")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = a.weights or ("bf16" if device == "cuda" else "fp32")
    folder = resolve(a.model, allow_pickle=a.allow_pickle)
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    model = LLaVA.from_pretrained(folder, dtype, device, a.allow_pickle)
    if kind in lora.KINDS:
        lora.quantize(model.language_model, kind)
    options = {"max_new_tokens": a.max_new_tokens, "temperature": a.temperature, "top_p": a.top_p, "top_k": a.top_k,
               "num_beams": a.beams, "generator": torch.Generator().manual_seed(a.seed)}  # fmt: skip
    chat = Chat(model, load_tokenizer(folder), options, [s.replace("\\n", "\n") for s in a.stop])
    for kind, given in (("image", a.image), ("video", a.video)):
        for file in given:
            chat.show(file, kind)
    if a.prompt is not None:
        chat.ask(a.prompt)
        return
    if sys.stdin.isatty():
        print(
            "Ask about pictures. /image FILE or /video FILE shows one, /reset forgets all, /quit leaves."
        )
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
