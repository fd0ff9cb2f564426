"""The llama.cpp server that the PyPI package xllamacpp embeds, in a process of its own.

with serving(text, mmproj) as llama:
    llama.answer([user("What is it?", picture)])
    llama.token_ids("a text")
    llama.first([user("What is it?", picture)], most=5)

A server holds one model and ends with the `with`, so that one test process can try many.
`differences` asks it what our own model is asked.
"""

import base64
import contextlib
import importlib.util
import io
import json
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image

from inference.answer import place_images
from inputs.templates import encode_prompt, stop_id
from tests.tools.environment import ROOT

WAIT = 60  # seconds that a request may take

installed = importlib.util.find_spec("xllamacpp") is not None
needs_llama_cpp = pytest.mark.skipif(not installed, reason="needs llama.cpp: make test-gguf")


@dataclass(frozen=True)
class Token:
    """A token that the model may write next."""

    id: int
    logprob: float


@dataclass(frozen=True)
class LlamaCpp:
    """A server that runs."""

    url: str
    log: Path  # what llama.cpp prints

    def post(self, path: str, body: dict) -> dict:
        """Return what the server answers. Raises urllib.error.HTTPError for a refusal."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=WAIT) as response:
            return json.load(response)

    def chat(self, messages: list[dict], tokens: int, **more) -> dict:
        """Return the whole response of a greedy answer."""
        body = {"messages": messages, "max_tokens": tokens, "temperature": 0, **more}
        return self.post("/v1/chat/completions", {**body, "cache_prompt": False})

    def answer(self, messages: list[dict], tokens: int = 16) -> str:
        """Return the greedy answer of at most so many tokens."""
        return self.chat(messages, tokens)["choices"][0]["message"]["content"]

    def answer_ids(self, messages: list[dict], tokens: int) -> list[int]:
        """Return the ids of a greedy answer of at most so many tokens, without the stop token."""
        response = self.chat(messages, tokens, verbose=True, return_tokens=True)
        return response["__verbose"]["tokens"]

    def first(self, messages: list[dict], most: int) -> list[Token]:
        """Return the most probable first tokens of an answer, best first.

        The best one must be whole characters: llama.cpp says nothing of others.
        """
        response = self.chat(messages, 1, logprobs=True, top_logprobs=most)
        (step,) = response["choices"][0]["logprobs"]["content"]
        return [Token(one["id"], one["logprob"]) for one in step["top_logprobs"]]

    def prompt_tokens(self, messages: list[dict]) -> int:
        """Return how many tokens a prompt has, those of its pictures included."""
        return self.chat(messages, 1)["usage"]["prompt_tokens"]

    def token_ids(self, text: str, special: bool = False) -> list[int]:
        """Return the ids of a text; special: with what the model puts before every prompt."""
        return self.post("/tokenize", {"content": text, "add_special": special})["tokens"]

    def prompt(self, messages: list[dict]) -> str:
        """Return what the chat template makes of messages without pictures."""
        return self.post("/apply-template", {"messages": messages})["prompt"]


def user(text: str, *pictures: Image.Image) -> dict:
    """Return a user's message; its pictures come first."""
    content = []
    for picture in pictures:
        # PNG, since another decoder of JPEG makes other pixels.
        file = io.BytesIO()
        picture.convert("RGB").save(file, "PNG")
        encoded = base64.b64encode(file.getvalue()).decode()
        content.append(
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}
        )
    return {"role": "user", "content": [*content, {"type": "text", "text": text}]}


def assistant(text: str) -> dict:
    """Return an answer that was given before."""
    return {"role": "assistant", "content": text}


@contextlib.contextmanager
def serving(
    text: Path,
    mmproj: Path | None = None,
    context: int = 4096,
    exact: bool = True,
    adapter: Path | None = None,
) -> Iterator[LlamaCpp]:
    """Run a server with a text model, and an mmproj if it is to see, until the end of the `with`.

    exact: keys and values are cached in float32. llama.cpp's own default is float16. adapter: a
    LoRA of the text model. Raises RuntimeError, with the end of the log, where llama.cpp does not
    load the files.
    """
    settings = {"text": str(text), "mmproj": str(mmproj or ""), "context": context, "exact": exact}
    settings["adapter"] = str(adapter or "")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.tools.llama_cpp_server", json.dumps(settings)],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        try:
            url = ""
            for line in process.stdout:
                if line.startswith("http://"):
                    url = line.strip()
                    break
            if not url:
                process.wait()
                raise RuntimeError(f"llama.cpp does not load {text}: {log.read_text()[-2000:]}")
            yield LlamaCpp(url, log)
        finally:
            process.stdin.close()  # the server ends when nobody can write to it
            try:
                process.wait(WAIT)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()


@torch.no_grad()
def differences(
    llama: LlamaCpp, model, tokenizer, asked: list[tuple[list[str], list]], tokens: int = 6
) -> list[float]:
    """Return for each conversation how far our greedy answer and llama.cpp's are from each other.

    asked: each the texts of question, answer, question ..., and the pictures of the first question.
    Equal answers are 0 apart. Otherwise it is how much less probable, as a difference of our
    logarithms, the first token is that llama.cpp has instead of ours.
    """
    template = model.config.template
    stop = stop_id(tokenizer, template)
    found = []
    for texts, pictures in asked:
        messages = [user(texts[0], *pictures)]
        for answer, question in zip(texts[1::2], texts[2::2], strict=True):
            messages += [assistant(answer), user(question)]
        theirs = llama.answer_ids(messages, tokens)
        if len(theirs) < tokens and theirs[-1:] != [stop]:
            theirs.append(stop)

        # Our logits where their answer stands: those before their first token, and so on.
        turns = [{"from": "human", "value": place_images(texts[0], len(pictures))}]
        for answer, question in zip(texts[1::2], texts[2::2], strict=True):
            turns += [{"from": "gpt", "value": answer}, {"from": "human", "value": question}]
        ids = encode_prompt(turns, tokenizer, template)
        items = [model.views.picture(picture) for picture in pictures]
        logits = model(torch.tensor([ids + theirs]), items).logits[0]
        logprobs = logits[-len(theirs) - 1 : -1].log_softmax(-1)

        behind = logprobs.amax(-1) - logprobs[range(len(theirs)), theirs]
        found.append(next((apart for apart in behind.tolist() if apart > 0), 0.0))
    return found
