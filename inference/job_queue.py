"""One model, many who ask: a queue of jobs with limits, answered one by one. `serve.py` is what people run.

B sequences, N images, H x W pixels.
"""

from __future__ import annotations

import base64
import binascii
import io
import queue
import threading
import traceback
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from PIL import Image

from config import UserError
from inputs.pictures import load_image
from inputs.templates import encode_prompt, stop_id
from model import LLaVA
from packing import Item

FORMATS = (
    "PNG",
    "JPEG",
    "WEBP",
    "GIF",
    "BMP",
)  # Pillow knows many more, some of which start other programs


def limit(default: int, why: str):
    return field(default=default, metadata={"why": why})


@dataclass(frozen=True)
class Limits:
    body: int = limit(20_000_000, "bytes of a request, or of an uploaded picture")
    pixels: int = limit(25_000_000, "pixels of a picture")
    images: int = limit(8, "pictures in a conversation")
    tokens: int = limit(1024, "tokens of an answer")
    context: int = limit(4096, "tokens of a conversation, pictures and answer included")
    queue: int = limit(8, "requests that wait while one is answered")


class Refused(Exception):
    """A request that cannot be answered: HTTP status, what is wrong, OpenAI's code and the field it is about."""

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None
    ):
        super().__init__(message)
        kind = {429: "rate_limit_error", 500: "server_error"}.get(status, "invalid_request_error")
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Over(Exception):
    """Raised inside generate to end it: a stop string was written, or nobody listens any more."""


@dataclass
class Job:
    """One answer to make; `pieces` brings its text as it is made, then None or the exception that ended it."""

    ids: list[int]
    images: list[Item]
    prompt_tokens: int
    max_tokens: int
    temperature: float
    top_p: float
    stop: list[str]
    seed: int | None
    made: list[int] = field(default_factory=list)
    finish: str = "length"
    pieces: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)
    cancelled: bool = False

    def usage(self) -> dict:
        new = len(self.made)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": new,
            "total_tokens": self.prompt_tokens + new,
        }


def held_back(text: str, stops: list[str]) -> int:
    """How many characters at the end of `text` may be the beginning of a stop string."""
    ends = (
        n
        for stop in stops
        for n in range(min(len(stop) - 1, len(text)), 0, -1)
        if text.endswith(stop[:n])
    )
    return max(ends, default=0)


class Engine:
    """A model that answers jobs one by one, in a thread of its own: a slow reader does not keep it waiting."""

    def __init__(self, model: LLaVA, tokenizer, name: str, limits: Limits):
        self.model, self.tokenizer, self.name, self.limits = model, tokenizer, name, limits
        self.eos = stop_id(tokenizer, model.config.template)
        self.device = model.language_model.lm_head.weight.device
        self.context = min(
            limits.context, model.config.text.get("max_position_embeddings") or limits.context
        )
        self.seats, self.jobs = threading.Semaphore(1 + limits.queue), queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    @contextmanager
    def seat(self):
        """Held from before a request is read until it is answered. Raises Refused (429) when none is free."""
        if not self.seats.acquire(blocking=False):
            raise Refused(
                429,
                f"{self.limits.queue} requests are waiting already; try again later",
                "queue_full",
            )
        try:
            yield
        finally:
            self.seats.release()

    def picture(self, data: bytes) -> Item:
        """A picture file's bytes -> what the encoder takes. Raises Refused."""
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as head:
                if head.width * head.height > self.limits.pixels:
                    size = f"{head.width} x {head.height} pixels, at most {self.limits.pixels:,} are taken"
                    raise Refused(400, f"the picture has {size}", "image_too_large", "messages")
            return self.model.views.picture(load_image(data))
        except (OSError, ValueError, Image.DecompressionBombError) as e:
            why = str(e) if isinstance(e, ValueError) else f"none of {', '.join(FORMATS)}"
            raise Refused(
                400, f"the picture cannot be read: {why}", "invalid_image", "messages"
            ) from None

    def job(
        self, turns: list[dict], images: list[Item], max_tokens: int | None = None, **sampling
    ) -> Job:
        """A conversation in LLaVA's form, its last turn the question, and its pictures in order. Raises Refused."""
        if len(images) > self.limits.images:
            what = f"{len(images)} pictures, at most {self.limits.images} are taken"
            raise Refused(400, what, "too_many_images", "messages")
        if max_tokens is not None and max_tokens > self.limits.tokens:
            raise Refused(
                400, f"max_tokens is too large: at most {self.limits.tokens}", None, "max_tokens"
            )
        try:
            ids = encode_prompt(turns, self.tokenizer, self.model.config.template)
        except UserError as e:
            raise Refused(400, str(e), None, "messages") from None
        length = len(ids) + sum(self.model.views.positions(image.shape) - 1 for image in images)
        if (room := self.context - length) < 1:
            what = f"the conversation has {length} tokens, pictures included; the context is {self.context}"
            raise Refused(400, what, "context_length_exceeded", "messages")
        new = min(max_tokens or self.limits.tokens, room)
        return Job(ids, images, length, new, **sampling)

    def answer(self, job: Job) -> Iterator[str]:
        """The answer in pieces, as they are made. Whoever closes this early stops the model at its next token."""
        self.jobs.put(job)
        try:
            while (piece := job.pieces.get()) is not None:
                if isinstance(piece, Exception):
                    raise Refused(500, "the model failed; the server's log says how") from piece
                yield piece
        finally:
            job.cancelled = True

    def _work(self):
        while True:
            job, end = self.jobs.get(), None
            try:
                if not job.cancelled:
                    self._generate(job)
            except Exception as e:
                traceback.print_exc()
                end = e
            job.pieces.put(end)

    def _generate(self, job: Job):
        text, shown = "", 0

        def stream(step: list[int]):
            nonlocal text, shown
            if job.cancelled:
                raise Over
            if step[0] == self.eos:
                job.finish = "stop"
                return
            job.made.append(step[0])
            text = self.tokenizer.decode(job.made).lstrip()
            if found := [at for at in map(text.find, job.stop) if at >= 0]:
                text, job.finish = text[: min(found)], "stop"
                raise Over
            if not text.endswith("\ufffd"):  # half a character: wait for its other bytes
                ready = len(text) - held_back(text, job.stop)
                if ready > shown:
                    job.pieces.put(text[shown:ready])
                    shown = ready

        # This thread alone draws random numbers; without a seed one request's must not decide the next one's.
        torch.manual_seed(job.seed) if job.seed is not None else torch.seed()
        options = {
            "temperature": job.temperature,
            "top_p": job.top_p,
            "eos_token_id": self.eos,
            "stream": stream,
        }
        try:
            self.model.generate(
                [torch.tensor(job.ids)], images=job.images, max_new_tokens=job.max_tokens, **options
            )
        except Over:
            pass
        if text[shown:]:
            job.pieces.put(text[shown:])


def fetch(url: str, allow_urls: bool, most: int) -> bytes:
    """The bytes behind a data URL, or an http one where that is allowed. Raises Refused."""
    head, comma, body = url.partition(",")
    if head[:5].lower() == "data:":
        try:
            if comma and head.lower().endswith(";base64"):
                return base64.b64decode(body, validate=True)
        except binascii.Error:
            pass
        raise Refused(
            400, "the data URL is not data:image/...;base64,...", "invalid_image_url", "messages"
        )
    if not allow_urls or not url.lower().startswith(("http://", "https://")):
        allowed = (
            "data and http URLs"
            if allow_urls
            else "data URLs (the server runs without --allow-urls)"
        )
        raise Refused(
            400, f"{url[:60]!r}: pictures are taken as {allowed}", "invalid_image_url", "messages"
        )
    try:
        with urllib.request.urlopen(url, timeout=20) as reply:
            data = reply.read(most + 1)
    except (OSError, ValueError) as e:
        raise Refused(
            400, f"{url[:60]!r} cannot be fetched: {e}", "invalid_image_url", "messages"
        ) from None
    if len(data) > most:
        raise Refused(400, f"{url[:60]!r} has over {most} bytes", "image_too_large", "messages")
    return data
