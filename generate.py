"""Ask a trained model about pictures and videos.

    python generate.py --model out/demo --image photo.png --prompt "What colour is the circle?"
    python generate.py --model DIR --video clip.mp4 --prompt "What happens?"
    python generate.py --model out/demo     # a chat: /image FILE, /video FILE, /reset, /quit
    python generate.py --model out/demo --weights nf4 --temperature 0.7 --top-p 0.9 --stop "\\n"

The pictures, then the videos, go into the prompt in the order in which they are given, in front of
the text unless it says <image> itself. The answer is printed as it is made, then its speed. A later
question of a chat starts from what has been read of the earlier ones. Folders and Hugging Face ids
both work as --model. With a temperature, equal seeds give equal answers. --weights int8 and nf4
quantize the language model as it is loaded, as bitsandbytes does, and compute in bfloat16.

`Chat` is the conversation, and useful without the command. `main` is the command.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

import torch

import command_line
import lora
from checkpoints.files import resolve
from command_line import within
from config import UserError
from inference.answer import before_stop, place_images
from inference.streaming import TextStream
from inputs.sample import load_item, user_error
from inputs.templates import encode_prompt, stop_id
from inputs.tokenizer import load_tokenizer
from kernels import default_dtype
from model import LLaVA
from packing import Item


def print_piece(text: str):
    """Print a piece of an answer at once."""
    print(text, end="", flush=True)


class Chat:
    """A model, its tokenizer, and a conversation that grows: turns, and the pictures in them.

    options are LLaVA.generate's. An answer also ends where it says one of the texts in `stop`,
    which is left out of it. system: what stands before the conversation; "" is what the template
    has.
    """

    def __init__(
        self, model: LLaVA, tokenizer, options: dict, stop: Sequence[str] = (), system: str = ""
    ):
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.options = options
        self.stop = stop
        self.system = system
        self.reset()

    def reset(self):
        """Forget the conversation."""
        self.turns: list[dict] = []
        if self.system:
            self.turns.append({"from": "system", "value": self.system})
        self.items: list[Item] = []
        self.shown: list[tuple[str, str]] = []  # the file and the kind of each item
        self.views = self.model.views  # how pictures are seen while there are so many
        self.waiting = 0  # items that no question has been asked about yet

    def show(self, file: str, kind: str = "image"):
        """Show a file of a kind, "image" or "video"; the next question is about it.

        Raises UserError if it cannot be read.
        """
        shown = [*self.shown, (file, kind)]
        pictures = sum(kind_of == "image" for _, kind_of in shown)
        views = self.model.views.for_images(pictures)

        # Earlier pictures stay as they are, unless one more changes how each is seen.
        items = list(self.items)
        if views != self.views:
            items = []
        try:
            for name, kind_of in shown[len(items) :]:
                items.append(load_item(name, kind_of, views))
        except UserError:
            raise
        except ValueError as e:
            # What is wrong with a damaged file, without what to do about it.
            raise user_error(name, e, f"give another {kind_of} file") from None
        self.items = items
        self.shown = shown
        self.views = views
        self.waiting += 1

    def ask(self, text: str, show: Callable[[str], None] = print_piece) -> str:
        """Ask a question; return the answer, and keep both in the conversation.

        show: called with the next piece of the answer, which may be empty, for each token, and at
        last with a line on its speed.

        Raises UserError for a question that cannot be asked; the conversation is as before.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError("the question", "not UTF-8", "write it in UTF-8") from None

        # The pictures shown since the last question belong to this one.
        question = {"from": "human", "value": place_images(text, self.waiting)}
        answer_to_come = {"from": "gpt", "value": None}

        # The prompt is the whole conversation. The model's prefix cache still holds the beginning.
        template = self.model.config.template
        turns = [*self.turns, question, answer_to_come]
        ids = torch.tensor(encode_prompt(turns, self.tokenizer, template))
        self.turns = turns
        self.waiting = 0
        eos = stop_id(self.tokenizer, template)
        stream = TextStream(self.tokenizer.decode, self.stop)

        def show_and_check(tokens: list[int]) -> bool:
            """Show what is new of the answer; return whether a stop string ends it."""
            show(stream.update(tokens))
            return stream.stopped

        # Beam search knows its answer only at the end, so there is nothing to show before.
        until = show_and_check
        if self.options.get("num_beams", 1) > 1:
            until = None

        start = time.perf_counter()
        made = self.model.generate([ids], self.items, eos_token_id=eos, until=until, **self.options)
        seconds = time.perf_counter() - start

        # The last token, and with beam search the whole answer, has not been shown yet.
        show_and_check(before_stop(made[0].tolist(), eos))
        show(stream.finish())
        count = made.size(1)
        show(f"\n[{count} tokens, {count / max(seconds, 1e-9):.1f} tokens/s]\n")

        answer = stream.text.strip()
        self.turns[-1]["value"] = answer
        return answer

    def command(self, line: str) -> bool:
        """Obey one line of the interactive chat; return False if it ends the chat."""
        word, _, rest = line.partition(" ")
        if word == "/quit":
            return False
        if word == "/reset":
            self.reset()
        elif word == "/image":
            self.show(rest.strip(), "image")
        elif word == "/video":
            self.show(rest.strip(), "video")
        elif word.startswith("/"):
            print("commands: /image FILE, /video FILE, /reset, /quit")
        elif line:
            self.ask(line)
        return True


def arguments(argv: list[str]):
    """Return the command line's options, read and checked."""
    parser = command_line.parser(__doc__)
    option = parser.add_argument
    option("--model", required=True, help="folder or Hugging Face id of a trained model")
    option("--image", action="append", default=[], help="a picture; may be given several times")
    option(
        "--video",
        action="append",
        default=[],
        help="a video, or a folder of its frames; likewise",
    )
    option("--prompt", help="the question; without it a chat starts")
    option("--system", default="", help="what stands before the conversation (the template's)")
    option("--max-new-tokens", type=within(int, 1, 10**6), default=256, help="longest answer (256)")
    option(
        "--temperature",
        type=within(float, 0, 100),
        default=0.0,
        help="0 takes the likeliest token, 1 draws as the model has it, more is bolder (0)",
    )
    option(
        "--top-p",
        type=within(float, 0, 1),
        default=1.0,
        help="draw from the fewest tokens of this probability (1)",
    )
    option(
        "--top-k",
        type=within(int, 0, 10**9),
        default=0,
        help="draw from so many of the likeliest tokens (0: from all)",
    )
    option("--seed", type=within(int, 0, 2**63 - 1), default=0, help="of the draws (0)")
    option(
        "--stop",
        action="append",
        default=[],
        help="text that ends an answer; may be given several times",
    )
    option(
        "--beams",
        type=within(int, 1, 1000),
        default=1,
        help="beam search with so many beams (1)",
    )
    option(
        "--weights",
        choices=("fp32", "bf16", *lora.KINDS),
        help="of the language model (fp32; a GPU that has it: bf16)",
    )
    option("--allow-pickle", action="store_true", help="also read pytorch_model.bin, tensors only")
    args = parser.parse_args(argv)
    if args.beams > 1 and args.temperature:
        raise UserError("--beams", "beam search draws nothing", "leave out --temperature")
    return args


def load_chat(args) -> Chat:
    """Return a chat with the model that the options name, quantized if they say so."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda")

    # Quantized weights compute in bfloat16, but not on a GPU that has none.
    weights = args.weights
    if weights == "fp32":
        dtype = torch.float32
    elif weights == "bf16":
        dtype = torch.bfloat16
    elif weights in lora.KINDS and device.type == "cpu":
        dtype = torch.bfloat16
    else:
        dtype = default_dtype(device)

    if weights == "nf4" and device.type == "cpu":
        what = "--weights nf4 saves memory, but on a CPU it is many times slower than fp32"
        print(f"warning: {what}", file=sys.stderr)

    folder = resolve(args.model, allow_pickle=args.allow_pickle)
    model = LLaVA.from_pretrained(folder, dtype, device, args.allow_pickle)
    if weights in lora.KINDS:
        lora.quantize(model.language_model, weights)

    options = {
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k,
        "num_beams": args.beams,
        "generator": torch.Generator().manual_seed(args.seed),
    }

    # A shell passes \\n on as two characters.
    stop = [text.replace("\\n", "\n") for text in args.stop]
    return Chat(model, load_tokenizer(folder), options, stop, args.system)


def converse(chat: Chat):
    """Read lines and obey them until /quit or the end of the input."""
    if sys.stdin.isatty():
        print(
            "Ask about pictures. /image FILE or /video FILE shows one, "
            "/reset forgets all, /quit leaves."
        )
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            return
        except UnicodeDecodeError:
            print("error: the line: not UTF-8; fix: write it in UTF-8")
            continue
        try:
            if not chat.command(line.strip()):
                return
        except UserError as e:
            # The chat goes on after a mistake.
            print(f"error: {e}")


def main(argv: list[str]):
    args = arguments(argv)
    chat = load_chat(args)

    # The pictures come first, then the videos, whatever their order in the command line.
    for file in args.image:
        chat.show(file, "image")
    for file in args.video:
        chat.show(file, "video")

    if args.prompt is None:
        converse(chat)
    else:
        chat.ask(args.prompt)


if __name__ == "__main__":
    command_line.cli(main, __doc__)
