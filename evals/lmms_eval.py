"""lmms-eval's way in: any benchmark that it has, on a model of this repository.

    pip install lmms-eval
    python -m evals.lmms_eval --model barellava --model_args pretrained=out/demo --tasks mme,ai2d --batch_size 16
    torchrun --nproc-per-node 8 -m evals.lmms_eval --model barellava --model_args pretrained=DIR --tasks mmstar

The arguments are lmms-eval's own; this file makes the model `barellava` known to it and starts it. It implements
generate_until (answers end at the task's stop strings) and loglikelihood (of the answer and its end; lmms-eval
wants the mean negative log-likelihood per token there, and takes the smallest), for tasks that show pictures. (Its
version 0.7.3 turns every likelihood into text before scoring, whatever the model: multiple_choice tasks fail in it.)
"""

import json
import os

import torch
from PIL import Image

import config
from checkpoints.files import resolve
from config import UserError
from evaluate import generate
from inputs.sample import load_item
from inputs.templates import IMAGE, encode
from inputs.tokenizer import load_tokenizer
from model import LLaVA
from packing import IGNORE

try:
    from lmms_eval.api.model import lmms
except ModuleNotFoundError:
    lmms = object


class Barellava(lmms):
    """What lmms-eval asks: a request's args are (context, options or target, doc_to_visual, doc id, task, split)."""

    is_simple = True

    def __init__(self, pretrained, batch_size=1, device=None, dtype=None, max_batch_size=None):
        """pretrained: a folder or Hugging Face id; dtype: a name of torch's, by default bfloat16 on a GPU."""
        super().__init__()
        cuda = torch.cuda.is_available() and device != "cpu"
        self.device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
        self._rank, self._world_size = (
            int(os.environ.get("RANK", 0)),
            int(os.environ.get("WORLD_SIZE", 1)),
        )
        folder = resolve(pretrained)
        dtype = getattr(torch, dtype or ("bfloat16" if cuda else "float32"))
        self.llava = LLaVA.from_pretrained(folder, dtype=dtype, device=self.device).eval()
        self.tokenizer, self.batch_size = load_tokenizer(folder), int(batch_size)

    def items(self, args):
        """The pictures and videos of a request, as items."""
        _, _, to_visual, number, task, split = args if len(args) == 6 else (*args, *[None] * 4)
        seen = to_visual(self.task_dict[task][split][number]) if to_visual else []
        made, views = [], self.llava.views
        for visual in seen or []:
            if isinstance(visual, Image.Image):
                made.append(views.picture(visual.convert("RGB")))
            elif isinstance(visual, str):
                try:
                    made.append(load_item(visual, "video", views))
                except ValueError as e:
                    raise UserError(
                        f"lmms-eval:{task}", f"{visual}: {e}", "fetch it again"
                    ) from None
            else:
                what = f"it shows a {type(visual).__name__}"
                raise UserError(f"lmms-eval:{task}", what, "take a task of pictures or videos")
        return made

    def generate_until(self, requests):
        """The answers, in the order of the requests; those of the same options are answered together, by length."""
        groups, answers = {}, {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        for key, members in groups.items():
            asked = json.loads(key)
            stops = asked.get("until") or []
            greedy = not asked.get("do_sample", True)
            options = {
                "max_new_tokens": asked.get("max_new_tokens") or 128,
                "temperature": 0.0 if greedy else asked.get("temperature") or 0.0,
                "top_p": asked.get("top_p") or 1.0,
                "num_beams": asked.get("num_beams") or 1,
            }
            members.sort(key=lambda i: len(requests[i].args[0]))
            for at in range(0, len(members), self.batch_size):
                part = members[at : at + self.batch_size]
                questions = [requests[i].args[0] for i in part]
                pictures = [self.items(requests[i].args) for i in part]
                for i, text in zip(
                    part,
                    generate(self.llava, self.tokenizer, questions, pictures, **options),
                    strict=True,
                ):
                    for stop in [stops] if isinstance(stops, str) else stops:
                        text = text.split(stop)[0] if stop else text
                    answers[i] = text.strip()
        return [answers[i] for i in range(len(requests))]

    @torch.inference_mode()
    def loglikelihood(self, requests):
        """[(mean negative log-likelihood per token of the target, whether it is the greedy answer)]."""
        results = []
        for request in requests:
            text, target, *_ = request.args
            if callable(target):
                _, _, _, number, task, split = request.args
                target = target(self.task_dict[task][split][number])
            seen = self.items(request.args)
            if text.count(IMAGE) != len(seen):
                text = f"{IMAGE}\n" * len(seen) + text.replace(IMAGE, "")
            turns = [{"from": "human", "value": text}, {"from": "gpt", "value": str(target)}]
            ids, labels = (
                torch.tensor([row])
                for row in encode(turns, self.tokenizer, self.llava.config.template)
            )
            out = self.llava(ids.to(self.device), seen, labels=labels.to(self.device))
            tail = labels[0, int((labels[0] != IGNORE).nonzero()[0]) :]
            said = out.logits[0, -len(tail) - 1 : -1].argmax(-1).cpu()
            results.append((out.loss.item(), bool(((said == tail) | (tail == IGNORE)).all())))
        return results

    def generate_until_multi_round(self, requests):
        raise NotImplementedError("tasks of several rounds")


def main(argv):
    """Registers the model and hands over to lmms-eval, which reads the command line itself."""
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
