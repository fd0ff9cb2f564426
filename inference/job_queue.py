"""A queue of jobs in front of one model: it refuses what is too much, and answers one by one.

    jobs = JobQueue(model, tokenizer, "demo", Limits())
    with jobs.seat():  # Refused with status 429 if too many wait
        job = jobs.job(turns, items, stop=[], temperature=0.0, top_p=1.0, seed=None)
        for piece in jobs.answer(job):
            print(piece, end="")

serve.py is what people run, and both its HTTP handler and its page use this file. Requests come
from many threads. Only the queue's own thread runs the model.

In this order: `Limits`, `Refused` and `Job`; then `JobQueue`; then `fetch`, which gets the bytes
of a picture that a request names by URL.
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
from inference.streaming import TextStream
from inputs.pictures import load_image
from inputs.templates import encode_prompt, stop_id
from packing import Item

# Pillow knows many more, some of which start other programs. A stranger must not choose those.
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")

FETCH_SECONDS = 20  # how long a server of pictures may be silent


def limit(default: int, why: str):
    """Return a field of Limits with the words that `serve.py --help` has for it."""
    return field(default=default, metadata={"why": why})


@dataclass(frozen=True)
class Limits:
    """What a request may cost at most. serve.py has an option --max-... for each."""

    body: int = limit(20_000_000, "bytes of a request, or of an uploaded picture")
    pixels: int = limit(25_000_000, "pixels of a picture")
    images: int = limit(8, "pictures in a conversation")
    tokens: int = limit(1024, "tokens of an answer")
    context: int = limit(4096, "tokens of a conversation, pictures and answer included")
    queue: int = limit(8, "requests that wait while one is answered")


class Refused(Exception):
    """A request that is not answered: the HTTP status, and the body of OpenAI's error reply.

    code: OpenAI's word for the error. param: the field of the request that it is about.
    """

    KINDS = {429: "rate_limit_error", 500: "server_error"}

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None
    ):
        super().__init__(message)
        kind = self.KINDS.get(status, "invalid_request_error")
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Ended(Exception):
    """Raised inside LLaVA.generate to end it: at a stop string, or when nobody listens any more."""


@dataclass
class Job:
    """One answer to make. The queue's thread fills the fields below `seed`."""

    ids: list[int]
    images: list[Item]
    prompt_tokens: int  # image positions included
    max_tokens: int
    temperature: float
    top_p: float
    stop: list[str]
    seed: int | None

    made: list[int] = field(default_factory=list)  # tokens of the answer
    finish: str = "length"  # OpenAI's finish_reason: "stop" if the answer came to an end

    # The text as it is made, and at the end None, or the exception that ended it.
    pieces: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)
    cancelled: bool = False

    def usage(self) -> dict[str, int]:
        """Return the numbers of tokens, as OpenAI's replies have them."""
        new = len(self.made)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": new,
            "total_tokens": self.prompt_tokens + new,
        }


class JobQueue:
    """A model that answers jobs one by one, in a thread of its own.

    The thread does not wait for whoever reads an answer, so a slow reader delays nobody.
    """

    def __init__(self, model, tokenizer, name: str, limits: Limits):
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.limits = limits
        self.eos = stop_id(tokenizer, model.config.template)

        # Beyond the longest context that a model was trained for, it answers nonsense.
        trained = model.config.text.get("max_position_embeddings") or limits.context
        self.context = min(limits.context, trained)

        self.seats = threading.Semaphore(1 + limits.queue)  # one is answered, the others wait
        self.jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()

        # A daemon, so that the process can end while the thread waits for jobs.
        threading.Thread(target=self._work, daemon=True).start()

    # -- before a job: is there room, and is the request within the limits? ------------------------

    @contextmanager
    def seat(self) -> Iterator[None]:
        """Hold a seat from before a request is read until it is answered.

        Raises Refused (429) if none is free.
        """
        # Refused at once and not made to wait: whoever waits here holds a connection and a thread.
        if not self.seats.acquire(blocking=False):
            waiting = f"{self.limits.queue} requests are waiting already; try again later"
            raise Refused(429, waiting, "queue_full")
        try:
            yield
        finally:
            self.seats.release()

    def picture(self, data: bytes) -> Item:
        """Return the item of a picture file's bytes. Raises Refused."""
        try:
            # Opening reads the size and no pixels, so a huge picture costs nothing.
            with Image.open(io.BytesIO(data), formats=PICTURE_FORMATS) as head:
                width, height = head.size
            if width * height > self.limits.pixels:
                most = f"at most {self.limits.pixels:,} are taken"
                what = f"the picture has {width} x {height} pixels, {most}"
                raise Refused(400, what, "image_too_large", "messages")

            return self.model.views.picture(load_image(data))
        except (OSError, ValueError, Image.DecompressionBombError) as e:
            # Ours are ValueErrors and say what is wrong. Pillow's only name an object in memory.
            why = f"none of {', '.join(PICTURE_FORMATS)}"
            if isinstance(e, ValueError):
                why = str(e)
            what = f"the picture cannot be read: {why}"
            raise Refused(400, what, "invalid_image", "messages") from None

    def job(
        self, turns: list[dict], images: list[Item], max_tokens: int | None = None, **sampling
    ) -> Job:
        """Return the job of answering a conversation.

        turns: in LLaVA's form, the last one is the question. images: its pictures in order.
        sampling: temperature, top_p, stop and seed of the Job. Raises Refused.
        """
        # The page comes here directly, so limits are checked here and not where HTTP is read.
        limits = self.limits
        if len(images) > limits.images:
            what = f"{len(images)} pictures, at most {limits.images} are taken"
            raise Refused(400, what, "too_many_images", "messages")
        if max_tokens is not None and max_tokens > limits.tokens:
            what = f"max_tokens is too large: at most {limits.tokens}"
            raise Refused(400, what, None, "max_tokens")

        try:
            ids = encode_prompt(turns, self.tokenizer, self.model.config.template)
        except UserError as e:
            raise Refused(400, str(e), None, "messages") from None

        # A picture is one id in the prompt, and many positions in the context.
        prompt_tokens = len(ids)
        for image in images:
            prompt_tokens += self.model.views.positions(image.shape) - 1

        room = self.context - prompt_tokens
        if room < 1:
            what = f"the conversation has {prompt_tokens} tokens, pictures included"
            what += f"; the context is {self.context}"
            raise Refused(400, what, "context_length_exceeded", "messages")

        wanted = max_tokens or limits.tokens
        return Job(ids, images, prompt_tokens, max_tokens=min(wanted, room), **sampling)

    # -- the answer --------------------------------------------------------------------------------

    def answer(self, job: Job) -> Iterator[str]:
        """Yield the answer in pieces, as they are made. Raises Refused (500) if the model fails.

        Whoever closes this generator early stops the model at its next token.
        """
        self.jobs.put(job)
        try:
            while True:
                piece = job.pieces.get()
                if piece is None:
                    return
                if isinstance(piece, Exception):
                    raise Refused(500, "the model failed; the server's log says how") from piece
                yield piece
        finally:
            job.cancelled = True

    def _work(self):
        """Answer jobs for ever. This is what the queue's thread runs."""
        while True:
            job = self.jobs.get()
            end = None
            try:
                if not job.cancelled:
                    self._generate(job)
            except Exception as e:
                # Any error ends this job only: without the thread no later one would be answered.
                traceback.print_exc()
                end = e
            job.pieces.put(end)

    def _generate(self, job: Job):
        """Run the model on a job and hand out its text as it comes."""
        text = TextStream(self._decode, job.stop)

        def hand_out(piece: str):
            if piece:
                job.pieces.put(piece)

        def stream(step: list[int]):
            (token,) = step  # one prompt, so one token a step
            if job.cancelled:
                raise Ended
            if token == self.eos:
                job.finish = "stop"
                return

            job.made.append(token)
            hand_out(text.update(job.made))
            if text.stopped:
                job.finish = "stop"
                raise Ended

        # Nobody else draws random numbers in this process, so the global generator will do. A job
        # without a seed gets a new one, or it would depend on the seed of the job before.
        if job.seed is None:
            torch.seed()
        else:
            torch.manual_seed(job.seed)

        try:
            self.model.generate(
                [torch.tensor(job.ids)],
                images=job.images,
                max_new_tokens=job.max_tokens,
                temperature=job.temperature,
                top_p=job.top_p,
                eos_token_id=self.eos,
                stream=stream,
            )
        except Ended:
            pass

        # What was held back, because more tokens could have changed it.
        hand_out(text.finish())

    def _decode(self, tokens: list[int]) -> str:
        """Return the text of an answer, without the space that templates put before it."""
        return self.tokenizer.decode(tokens).lstrip()


# -- pictures that a request names -----------------------------------------------------------------


def fetch(url: str, allow_urls: bool, most: int) -> bytes:
    """Return the bytes behind a data URL, or behind an http one if that is allowed.

    most: how many bytes are taken. Raises Refused.
    """
    scheme = url[:8].lower()  # a data URL is long, and only its beginning is looked at
    if scheme.startswith("data:"):
        return _decode_data_url(url)
    if scheme.startswith(("http://", "https://")) and allow_urls:
        return _fetch_http(url, most)

    allowed = "data URLs (the server runs without --allow-urls)"
    if allow_urls:
        allowed = "data and http URLs"
    # Errors show the beginning of a URL, since a data URL holds a whole picture.
    what = f"{url[:60]!r}: pictures are taken as {allowed}"
    raise Refused(400, what, "invalid_image_url", "messages")


def _decode_data_url(url: str) -> bytes:
    """Return the bytes that a data URL holds in base64. Raises Refused."""
    head, comma, body = url.partition(",")
    try:
        if comma and head.lower().endswith(";base64"):
            return base64.b64decode(body, validate=True)
    except binascii.Error:
        pass
    what = "the data URL is not data:image/...;base64,..."
    raise Refused(400, what, "invalid_image_url", "messages")


def _fetch_http(url: str, most: int) -> bytes:
    """Return the bytes that an http server sends. Raises Refused."""
    try:
        with urllib.request.urlopen(url, timeout=FETCH_SECONDS) as reply:
            data = reply.read(most + 1)  # one more, to see whether there are more
    except (OSError, ValueError) as e:
        what = f"{url[:60]!r} cannot be fetched: {e}"
        raise Refused(400, what, "invalid_image_url", "messages") from None
    if len(data) > most:
        what = f"{url[:60]!r} has over {most} bytes"
        raise Refused(400, what, "image_too_large", "messages")
    return data
