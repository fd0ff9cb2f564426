"""A queue of jobs in front of one model: it refuses what is too much, and answers one by one.

    jobs = JobQueue(model, tokenizer, "demo", Limits())
    async with jobs.seat() as seat:  # Refused with status 429 if too many wait for too long
        job = jobs.job(turns, items, stop=[], temperature=0.0, top_p=1.0, top_k=0, seed=None)
        async for piece in jobs.answer(job, seat):
            print(piece, end="")

serve.py is what people run, and both its API and its page use this file. Requests come from
coroutines, of any event loop. Only the queue's own thread runs the model.

In this order: `Limits`, `Refused` and `Job`; then `JobQueue`; then `fetch`, which gets the bytes
of a picture that a request names by URL.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import io
import socket
import ssl
import threading
import time
import traceback
import urllib.request
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import torch
from PIL import Image

from config import UserError, printable
from inference.streaming import TextStream
from inputs.pictures import load_image
from inputs.templates import encode_prompt, stop_id
from packing import Item

# Pillow knows many more, some of which start other programs. A stranger must not choose those.
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")

FETCH_SECONDS = 20  # how long a picture may take to come from its server, in all

SEAT_SECONDS = 0.05  # how often a request that waits looks whether a seat is free

# Even the longest tokens of a vocabulary, runs of spaces, have hardly more characters than this. A
# text that is longer than so many times the context need not be tokenized to be refused.
CHARACTERS_PER_TOKEN = 64


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
    queue: int = limit(8, "requests that wait, prepared, while one is answered")
    wait: int = limit(120, "seconds that more requests than those wait for a place")


class Refused(Exception):
    """A request that is not answered: the HTTP status, and the body of OpenAI's error reply.

    code: OpenAI's word for the error. param: the field of the request that it is about.
    retry_after: seconds after which to try again, for a status that has such a header.
    """

    KINDS = {429: "rate_limit_error", 500: "server_error"}

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        kind = self.KINDS.get(status, "invalid_request_error")
        self.status = status
        self.retry_after = retry_after
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(eq=False)  # two jobs are never the same, whatever they ask
class Job:
    """One answer to make. The queue's thread fills `made` and `finish`."""

    ids: list[int]
    images: list[Item]
    prompt_tokens: int  # image positions included
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    stop: list[str]
    seed: int | None

    made: list[int] = field(default_factory=list)  # tokens of the answer
    finish: str = "length"  # OpenAI's finish_reason: "stop" if the answer came to an end

    # Takes the pieces of the text as they are made, and at the end None or the Refused that ended
    # it. `JobQueue.answer` sets it.
    hand_out: Callable[[str | None | Refused], object] | None = None
    cancelled: bool = False

    def usage(self) -> dict[str, int]:
        """Return the numbers of tokens, as OpenAI's replies have them."""
        new = len(self.made)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": new,
            "total_tokens": self.prompt_tokens + new,
        }


class Seat:
    """A place in the queue, with room for a request's pictures, until `leave` is called."""

    def __init__(self, free: threading.Semaphore):
        self.free = free
        self.taken = True

    def leave(self):
        """Give the place to the next. The second call does nothing."""
        if self.taken:
            self.taken = False
            self.free.release()


class JobQueue:
    """A model that answers jobs one by one, in a thread of its own.

    The thread does not wait for whoever reads an answer, so a slow reader delays nobody.
    """

    def __init__(self, model, tokenizer, name: str, limits: Limits):
        # In evaluation mode the model keeps its engine from request to request, and with it the
        # cache of the conversation so far and the captured step of a GPU.
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.name = name
        self.limits = limits
        self.eos = stop_id(tokenizer, model.config.template)

        # Beyond the longest context that a model was trained for, it answers nonsense.
        trained = model.config.text.get("max_position_embeddings") or limits.context
        self.context = min(limits.context, trained)

        self.free = threading.Semaphore(1 + limits.queue)  # one is answered, the others wait
        self.line: deque[object] = deque()  # a ticket for each request that waits for a seat

        self.waiting: deque[Job] = deque()  # jobs that have a seat and wait for the model
        self.changed = threading.Condition()  # guards `waiting`

        # A decoded picture takes hundreds of megabytes, so one at a time is decoded.
        self.decoding = threading.Lock()

        # A daemon, so that the process can end while the thread waits for jobs.
        threading.Thread(target=self._work, daemon=True).start()

    # -- before a job: is there room, and is the request within the limits? ------------------------

    @contextlib.asynccontextmanager
    async def seat(self) -> AsyncIterator[Seat]:
        """Hold a seat while a request is prepared and answered.

        Seats are given in the order of arrival. Raises Refused (429) if none gets free in time.
        """
        await self._wait_in_line()
        seat = Seat(self.free)
        try:
            yield seat
        finally:
            seat.leave()

    async def _wait_in_line(self):
        """Return when a seat is taken. Raises Refused when the wait is over."""
        ticket = object()
        self.line.append(ticket)
        end = time.monotonic() + self.limits.wait

        # Looking again and again is simpler than to be woken, and loses no time: while requests
        # wait here, the model has others before it. A request that is cancelled leaves the line.
        try:
            while self.line[0] is not ticket or not self.free.acquire(blocking=False):
                if time.monotonic() >= end:
                    waiting = f"{self.limits.queue} requests are waiting already; try again later"
                    raise Refused(429, waiting, "queue_full", retry_after=2)
                await asyncio.sleep(SEAT_SECONDS)
        finally:
            self.line.remove(ticket)

    def picture(self, data: bytes, count: int = 1) -> Item:
        """Return the item of a picture file's bytes. Raises Refused.

        count: how many pictures the conversation has.
        """
        try:
            # Opening reads the size and no pixels, so a huge picture costs nothing.
            with Image.open(io.BytesIO(data), formats=PICTURE_FORMATS) as head:
                width, height = head.size
        except Exception:
            # Pillow raises nearly anything, and its texts only name an object in memory.
            why = f"none of {', '.join(PICTURE_FORMATS)}"
            raise unreadable(why) from None

        if width * height > self.limits.pixels:
            most = f"at most {self.limits.pixels:,} are taken"
            what = f"the picture has {width} x {height} pixels, {most}"
            raise Refused(400, what, "image_too_large", "messages")

        try:
            with self.decoding:
                views = self.model.views.for_images(count)
                return views.picture(load_image(data))
        except ValueError as e:
            raise unreadable(str(e)) from None

    def job(
        self, turns: list[dict], images: list[Item], max_tokens: int | None = None, **sampling
    ) -> Job:
        """Return the job of answering a conversation.

        turns: in LLaVA's form, the last one is the question. images: its pictures in order.
        sampling: temperature, top_p, top_k, stop and seed of the Job. Raises Refused.
        """
        # The page comes here directly, so limits are checked here and not where HTTP is read.
        limits = self.limits
        if len(images) > limits.images:
            what = f"{len(images)} pictures, at most {limits.images} are taken"
            raise Refused(400, what, "too_many_images", "messages")
        if max_tokens is not None and max_tokens > limits.tokens:
            what = f"max_tokens is too large: at most {limits.tokens}"
            raise Refused(400, what, None, "max_tokens")

        characters = sum(len(turn["value"]) for turn in turns)
        if characters > CHARACTERS_PER_TOKEN * self.context:
            what = f"the conversation has {characters} characters; the context is {self.context}"
            raise Refused(400, f"{what} tokens", "context_length_exceeded", "messages")

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

    async def answer(self, job: Job, seat: Seat) -> AsyncIterator[str]:
        """Yield the answer in pieces, as they are made. Raises Refused (500) if the model fails.

        The seat is left when the model is done, even if the reader is slow. Whoever closes this
        generator early takes the job out of the queue, or stops the model at its next token.
        """
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[str | None | Refused] = asyncio.Queue()

        def arrive(piece: str | None | Refused):
            if not isinstance(piece, str):
                seat.leave()
            pieces.put_nowait(piece)

        # The model's thread calls this. A loop that is closed has no reader any more.
        def hand_out(piece: str | None | Refused):
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(arrive, piece)

        job.hand_out = hand_out
        with self.changed:
            self.waiting.append(job)
            self.changed.notify()

        try:
            while True:
                piece = await pieces.get()
                if piece is None:
                    return
                if isinstance(piece, Refused):
                    raise piece
                yield piece
        finally:
            job.cancelled = True
            with self.changed:
                if job in self.waiting:
                    self.waiting.remove(job)

    def _work(self):
        """Answer jobs for ever. This is what the queue's thread runs."""
        while True:
            with self.changed:
                while not self.waiting:
                    self.changed.wait()
                job = self.waiting.popleft()

            end = None
            try:
                self._generate(job)
            except BaseException:
                # Any error ends this job only: without the thread no later one would be answered.
                # A panic of a Rust library is no Exception.
                traceback.print_exc()
                end = Refused(500, "the model failed; the server's log says how")
            job.hand_out(end)

    def _generate(self, job: Job):
        """Run the model on a job and hand out its text as it comes."""
        text = TextStream(self._decode, job.stop)

        def hand_out(piece: str):
            if piece:
                job.hand_out(piece)

        def stream(step: list[int]):
            (token,) = step  # one prompt, so one token a step
            if job.cancelled or text.stopped:
                return
            if token == self.eos:
                job.finish = "stop"
                return

            job.made.append(token)
            hand_out(text.update(job.made))
            if text.stopped:
                job.finish = "stop"

        # Called after `stream` with each token. The answer ends at a stop string, or when nobody
        # listens any more, and the engine keeps what it has read for the next question.
        def until(tokens: list[int]) -> bool:
            return job.cancelled or text.stopped

        # Nobody else draws random numbers in this process, so the global generator will do. A job
        # without a seed gets a new one, or it would depend on the seed of the job before.
        if job.seed is None:
            torch.seed()
        else:
            torch.manual_seed(job.seed)

        self.model.generate(
            [torch.tensor(job.ids)],
            images=job.images,
            max_new_tokens=job.max_tokens,
            temperature=job.temperature,
            top_p=job.top_p,
            top_k=job.top_k,
            eos_token_id=self.eos,
            stream=stream,
            until=until,
        )

        # What was held back, because more tokens could have changed it.
        hand_out(text.finish())

    def _decode(self, tokens: list[int]) -> str:
        """Return the text of an answer, without the space that templates put before it."""
        return self.tokenizer.decode(tokens).lstrip()


def unreadable(why: str) -> Refused:
    """Return the refusal of a picture that cannot be read."""
    what = f"the picture cannot be read: {printable(why)}"
    return Refused(400, what, "invalid_image", "messages")


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
    except ValueError:  # binascii's is one, and so is that of characters that are not ASCII
        pass
    what = "the data URL is not data:image/...;base64,..."
    raise Refused(400, what, "invalid_image_url", "messages")


def _fetch_http(url: str, most: int) -> bytes:
    """Return the bytes that an http server sends. Raises Refused."""
    # urllib's own opener also knows ftp and file.
    opener = urllib.request.OpenerDirector()
    for handler in HANDLERS:
        opener.add_handler(handler())

    started = time.monotonic()
    try:
        with opener.open(url, timeout=FETCH_SECONDS) as reply:
            data = reply.read(most + 1)  # one more, to see whether there are more

        # A connection that `_limit_time` has ended looks like a reply that is short.
        if time.monotonic() - started >= FETCH_SECONDS:
            raise TimeoutError(f"it took over {FETCH_SECONDS} seconds")
    except (OSError, ValueError, http.client.HTTPException) as e:
        what = f"{url[:60]!r} cannot be fetched: {printable(e)}"
        raise Refused(400, what, "invalid_image_url", "messages") from None
    if len(data) > most:
        what = f"{url[:60]!r} has over {most} bytes"
        raise Refused(400, what, "image_too_large", "messages")
    return data


def _limit_time(connection: http.client.HTTPConnection):
    """End a connection after FETCH_SECONDS.

    A socket's own timeout is not enough: it begins anew with each byte that a slow server sends.
    """
    opened = connection.sock

    def end():
        with contextlib.suppress(OSError):  # it has ended before
            opened.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(FETCH_SECONDS, end)
    timer.daemon = True
    timer.start()


class _TimedConnection(http.client.HTTPConnection):
    """A connection to a server of pictures that ends in time."""

    def connect(self):
        super().connect()
        _limit_time(self)


class _TimedSecureConnection(http.client.HTTPSConnection):
    """The same with TLS."""

    def connect(self):
        super().connect()
        _limit_time(self)


class _TimedHTTP(urllib.request.HTTPHandler):
    """What urllib opens http URLs with."""

    def http_open(self, request):
        return self.do_open(_TimedConnection, request)


class _TimedHTTPS(urllib.request.HTTPSHandler):
    """What urllib opens https URLs with."""

    def https_open(self, request):
        return self.do_open(_TimedSecureConnection, request, context=ssl.create_default_context())


HANDLERS = (
    _TimedHTTP,
    _TimedHTTPS,
    urllib.request.ProxyHandler,
    urllib.request.HTTPRedirectHandler,
    urllib.request.HTTPDefaultErrorHandler,
    urllib.request.HTTPErrorProcessor,
    urllib.request.UnknownHandler,
)
