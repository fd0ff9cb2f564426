"""lmms-eval's way in: any benchmark that it has, on a model of this repository.

    pip install lmms-eval
    python -m evals.lmms_eval --model barellava --model_args pretrained=out/demo \\
        --tasks mme,ai2d --batch_size 16
    torchrun --nproc-per-node 8 -m evals.lmms_eval --model barellava \\
        --model_args pretrained=DIR --tasks mmstar

The arguments are lmms-eval's own; this file makes the model `barellava` known to it and starts it.
It implements, for tasks that show pictures or videos,

    generate_until  answers, which end at the task's stop strings
    loglikelihood   of an answer and its end; lmms-eval wants the mean negative log-likelihood per
                    token there, and takes the smallest

lmms-eval 0.7.3 turns every likelihood into text before scoring, whatever the model: its tasks of
the kind multiple_choice fail.
"""

from __future__ import annotations

import json
import os

import torch
from PIL import Image

import config
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

        if torch.cuda.is_available() and device != "cpu":
            # Triton launches its kernels on the current device, whatever that of their tensors.
            self.device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
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
        self.batch_size = int(batch_size)

    def items(self, args) -> list[Item]:
        """Return the pictures and videos of a request. Raise UserError for anything else."""
        if len(args) < 6 or not args[2]:
            return []
        doc_to_visual, number, task, split = args[2:]
        shown = doc_to_visual(self.task_dict[task][split][number])

        items = []
        for visual in shown or []:
            if isinstance(visual, Image.Image):
                items.append(self.llava.views.picture(visual.convert("RGB")))
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


def generate_options(asked: dict) -> dict:
    """Return the options of LLaVA.generate for those of a request."""
    temperature = 0.0
    if asked.get("do_sample", True):
        temperature = asked.get("temperature") or 0.0
    return {
        "max_new_tokens": asked.get("max_new_tokens") or 128,
        "temperature": temperature,
        "top_p": asked.get("top_p") or 1.0,
        "num_beams": asked.get("num_beams") or 1,
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
        raise UserError("lmms-eval", "it is not installed", "pip install lmms-eval")
    from lmms_eval.__main__ import cli_evaluate
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.models.registry_v2 import ModelManifest

    manifest = ModelManifest("barellava", simple_class_path="evals.lmms_eval.Barellava")
    MODEL_REGISTRY_V2.register_manifest(manifest, overwrite=True)
    cli_evaluate()


if __name__ == "__main__":
    config.cli(main, __doc__)
