"""lmms-eval's way in: any benchmark that it has, on a model of this repository.

    pip install lmms-eval "filelock<4"    # 0.7.3 does not run with filelock 4
    python -m evals.lmms_eval --model barellava --model_args pretrained=out/demo \\
        --tasks mme,ai2d --batch_size 16
    torchrun --nproc-per-node 8 -m evals.lmms_eval --model barellava \\
        --model_args pretrained=DIR --tasks mmstar

The arguments are lmms-eval's own; this file makes the model `barellava` known to it and starts it.
It implements, for tasks that show pictures or videos,

    generate_until  answers, which end at the task's stop strings
    loglikelihood   of an answer and its end; lmms-eval wants the mean negative log-likelihood per
                    token there, and takes the smallest

A run that fails ends with an exit code that is not 0: lmms-eval itself prints the error and exits
as if all were well.

lmms-eval 0.7.3 turns every likelihood into text before scoring, whatever the model: its tasks of
the kind multiple_choice fail.
"""

from __future__ import annotations

import json
import os
import re

import torch
from PIL import Image

import command_line
from checkpoints.fields import Fields
from checkpoints.files import resolve
from config import UserError
from inference.answer import answer, place_images
from inputs.sample import load_item
from inputs.templates import encode
from inputs.tokenizer import load_tokenizer
from kernels import default_dtype
from model import LLaVA
from packing import IGNORE, Item

try:
    from lmms_eval.api.model import lmms
except ModuleNotFoundError:
    lmms = object


class Barellava(lmms):
    """The model that lmms-eval asks.

    A request's args are (question, options or target, doc_to_visual, doc id, task, split).
    `doc_to_visual` returns what a doc shows, and `self.task_dict`, which lmms-eval fills, has the
    docs of each task and split. A request without pictures may end after the second.
    """

    is_simple = True

    def __init__(self, pretrained, batch_size=1, device=None, dtype=None, max_batch_size=None):
        """pretrained: a folder or Hugging Face id.

        dtype: a name of torch's, by default bfloat16 on a GPU that has it, and else float32.
        """
        super().__init__()
        self._rank = int(os.environ.get("RANK", 0))
        self._world_size = int(os.environ.get("WORLD_SIZE", 1))

        given = {"batch_size": batch_size, "dtype": dtype, "device": device}
        options = Fields(given, "--model_args", fix="correct it")
        self.batch_size = batch_size_of(options)
        dtype = options.text("dtype", ("float32", "bfloat16", "float16"), default=None)
        device = options.text("device", default=None)

        if torch.cuda.is_available() and device != "cpu":
            # Triton launches its kernels on the current device, whatever that of their tensors.
            self.device = cuda_device(device)
            torch.cuda.set_device(self.device)
        else:
            self.device = torch.device("cpu")

        # From here on it is the model that evaluate.py measures.
        if dtype is None:
            dtype = default_dtype(self.device)
        else:
            dtype = getattr(torch, dtype)
        folder = resolve(pretrained)
        llava = LLaVA.from_pretrained(folder, dtype=dtype, device=self.device)
        self.llava = llava.eval()
        self.tokenizer = load_tokenizer(folder)

    def items(self, args) -> list[Item]:
        """Return the pictures and videos of a request. Raise UserError for anything else."""
        if len(args) < 6 or not args[2]:
            return []
        doc_to_visual, number, task, split = args[2:]
        shown = doc_to_visual(self.task_dict[task][split][number])

        pictures = sum(isinstance(visual, Image.Image) for visual in shown or [])
        views = self.llava.views.for_images(pictures)
        items = []
        for visual in shown or []:
            if isinstance(visual, Image.Image):
                items.append(views.picture(visual.convert("RGB")))
            elif isinstance(visual, str):
                items.append(self.video(visual, task))
            else:
                what = f"it shows a {type(visual).__name__}"
                raise UserError(f"lmms-eval:{task}", what, "take a task of pictures or videos")
        return items

    def video(self, file: str, task: str) -> Item:
        """Return a video as the model sees it."""
        try:
            return load_item(file, "video", self.llava.views)
        except ValueError as error:
            raise UserError(f"lmms-eval:{task}", f"{file}: {error}", "fetch it again") from None

    def generate_until(self, requests) -> list[str]:
        """Return the answers, in the order of the requests."""
        # Requests with the same options are answered together.
        groups = {}
        for i, request in enumerate(requests):
            options = json.dumps(request.args[1], sort_keys=True)
            groups.setdefault(options, []).append(i)

        answers = {}
        for text, members in groups.items():
            asked = json.loads(text)
            stops = asked.get("until") or []
            if isinstance(stops, str):
                stops = [stops]
            options = generate_options(asked)

            # Batches of questions of about the same length.
            members.sort(key=lambda i: len(requests[i].args[0]))
            for begin in range(0, len(members), self.batch_size):
                batch = members[begin : begin + self.batch_size]
                questions = [requests[i].args[0] for i in batch]
                items = [self.items(requests[i].args) for i in batch]
                texts = answer(self.llava, self.tokenizer, questions, items, **options)
                for i, said in zip(batch, texts, strict=True):
                    answers[i] = cut_at_stops(said, stops)
        return [answers[i] for i in range(len(requests))]

    @torch.inference_mode()
    def loglikelihood(self, requests) -> list[tuple[float, bool]]:
        """Return for each request how likely its target is.

        That is the mean negative log-likelihood per token of the target, and whether the target is
        what greedy decoding says.
        """
        results = []
        for request in requests:
            question, target = request.args[:2]
            if callable(target):
                number, task, split = request.args[3:]
                target = target(self.task_dict[task][split][number])

            # The pair as a training row: the labels mark the answer and its end.
            items = self.items(request.args)
            turns = [
                {"from": "human", "value": place_images(question, len(items))},
                {"from": "gpt", "value": str(target)},
            ]
            ids, labels = encode(turns, self.tokenizer, self.llava.config.template)
            ids = torch.tensor([ids])  # (1, T)
            labels = torch.tensor([labels])
            out = self.llava(ids.to(self.device), items, labels=labels.to(self.device))

            # The logits are of the expanded row; counted from its end, it is the same as `labels`.
            first = int((labels[0] != IGNORE).nonzero()[0])
            wanted = labels[0, first:]
            greedy = out.logits[0, -len(wanted) - 1 : -1].argmax(-1).cpu()
            same = (greedy == wanted) | (wanted == IGNORE)
            results.append((out.loss.item(), bool(same.all())))
        return results

    def generate_until_multi_round(self, requests):
        raise NotImplementedError("tasks of several rounds")


def batch_size_of(options: Fields) -> int:
    """Return the batch size, which lmms-eval gives as a text or as a number. Raise UserError."""
    value = options.values["batch_size"]
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        value = int(value)
    checked = Fields({"batch_size": value}, options.where, fix=options.fix)
    return checked.integer("batch_size", 1, 10**5)


def cuda_device(name: str | None) -> torch.device:
    """Return the GPU of a name such as cuda:1; for cuda, or without a name, that of this rank.

    Raise UserError for any other name.
    """
    if name is None or name == "cuda":
        return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    if not re.fullmatch(r"cuda:\d{1,3}", name):
        raise UserError("--device", f"{name!r} is none", "cuda, cuda:1 or cpu")

    # Every rank is given the same name, and has a GPU of its own.
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    return torch.device(name)


def generate_options(asked: dict) -> dict:
    """Return the options of LLaVA.generate for those of a request. Raise UserError."""
    # A task's file may leave an option out, or say null or 0 for the usual one.
    given = {key: value or None for key, value in asked.items()}
    options = Fields(given, "lmms-eval", "generation_kwargs", "correct the task's file")
    temperature = 0.0
    if asked.get("do_sample", True):
        temperature = options.number("temperature", 0, 100, default=0.0)
    return {
        "max_new_tokens": options.integer("max_new_tokens", 1, 10**6, default=128),
        "temperature": temperature,
        "top_p": options.number("top_p", 0, 1, default=1.0),
        "num_beams": options.integer("num_beams", 1, 1000, default=1),
    }


def cut_at_stops(text: str, stops: list[str]) -> str:
    """Return the text before the first stop string, without space around it."""
    # A task may also name the empty string, which stops nothing.
    for stop in stops:
        if stop:
            text = text.split(stop)[0]
    return text.strip()


def main(argv):
    """Make the model known to lmms-eval and start it; it reads the command line itself."""
    if lmms is object:
        fix = 'pip install lmms-eval "filelock<4"'
        raise UserError("lmms-eval", "it is not installed", fix)
    import lmms_eval.__main__ as tool
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.models.registry_v2 import ModelManifest

    manifest = ModelManifest("barellava", simple_class_path="evals.lmms_eval.Barellava")
    MODEL_REGISTRY_V2.register_manifest(manifest, overwrite=True)

    # The tool evaluates with this function, prints the error of one that fails, and exits with 0.
    evaluate = tool.cli_evaluate_single
    failures = []

    def remember_failure(*arguments, **options):
        try:
            return evaluate(*arguments, **options)
        except Exception as error:
            failures.append(error)
            raise

    tool.cli_evaluate_single = remember_failure
    try:
        tool.cli_evaluate()
    finally:
        tool.cli_evaluate_single = evaluate

    if not failures:
        return
    error = failures[0]
    if isinstance(error, UserError):
        raise error
    what = f"it failed: {type(error).__name__}: {error}"
    raise UserError("lmms-eval", what, "see what it says above")


if __name__ == "__main__":
    command_line.cli(main, __doc__)
