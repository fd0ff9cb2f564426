"""Serve a trained model: OpenAI's chat API, and a page to chat with pictures.

    pip install '.[serve]'                        # the server, uvicorn; '.[demo]' for the page, too
    python serve.py --model out/demo              # the API at http://127.0.0.1:8000/v1
    python serve.py --model out/demo --web        # and the page at http://127.0.0.1:8000

    client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}
    question = {"type": "text", "text": "What is this?"}
    messages = [{"role": "user", "content": [picture, question]}]
    client.chat.completions.create(model="demo", messages=messages)

/v1/chat/completions takes messages of text and picture parts (system messages too, where the chat
template has a place for them), stream, stream_options, max_tokens (or max_completion_tokens),
temperature and top_p (1, as OpenAI has it), top_k, stop and seed. Other fields are refused unless
they ask for nothing; a picture's `detail` has no meaning here. Pictures are data URLs of PNG, JPEG,
WebP, GIF or BMP; http URLs only with --allow-urls. /health says that the server is there.

Requests are answered one after another in the order of their arrival. If more than --max-queue
wait, the others wait to be read, for --max-wait seconds, and then get status 429. There is no key:
whoever reaches the port may ask, so only this machine can, unless --host says otherwise. Web pages
of other sites cannot: requests that name another host, or come from a page of another origin, are
refused. Behind a proxy, or with --host 0.0.0.0, give the names that the server is known by after
the address: --host 0.0.0.0 demo.example.org.

In this order: how requests are read (`read_request`), how they are answered over HTTP (`API`), the
page (`web_page`), and the command (`main`). inference/asgi.py has what every exchange over HTTP
needs, inference/connections.py the server, and inference/job_queue.py the queue behind all.
"""

import argparse
import asyncio
import json
import logging
import signal
import sys
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import fields
from pathlib import Path

import torch

import command_line
from checkpoints.fields import Fields
from checkpoints.files import parse_json, resolve
from config import UserError, is_unicode, printable
from inference.answer import place_images
from inference.asgi import MOST_HELD, Exchange, Gone, Held, Names, check_origin, in_brackets
from inference.job_queue import Job, JobQueue, Limits, Refused, Seat, fetch
from inputs.templates import IMAGE
from inputs.tokenizer import load_tokenizer
from kernels import default_dtype
from model import LLaVA
from packing import Item

# -- requests --------------------------------------------------------------------------------------

# The fields of a request that are obeyed.
SUPPORTED = (
    "model",
    "messages",
    "stream",
    "stream_options",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "top_k",
    "stop",
    "seed",
)

# Values of other fields that ask for nothing that is missing here.
HARMLESS = {
    "n": [1],
    "logprobs": [False],
    "top_logprobs": [0],
    "frequency_penalty": [0],
    "presence_penalty": [0],
    "logit_bias": [{}],
    "tools": [[]],
    "tool_choice": ["none", "auto"],
    "response_format": [{"type": "text"}],
    "modalities": [["text"]],
}

# Fields that change no answer, whatever they say.
IGNORED = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "parallel_tool_calls",
)

# OpenAI's roles, and what LLaVA's conversations call them.
ROLES = {"system": "system", "developer": "system", "user": "human", "assistant": "gpt"}

PATHS = "there are /v1/models, /v1/chat/completions and /health"

# JSON takes up to 24 times its bytes in memory, if it is made of nothing but small values. A
# request with this many commas, colons and brackets is no conversation.
MOST_VALUES = 200_000


def read_json(body: bytearray):
    """Return the JSON of a request's body. Raises Refused."""
    values = 0
    for mark in (b",", b":", b"[", b"{"):
        values += body.count(mark)
    if values > MOST_VALUES:
        raise Refused(400, f"the body has over {MOST_VALUES} values", "request_too_large")
    try:
        return parse_json(bytes(body))
    except ValueError as e:
        raise Refused(400, f"the body is not JSON: {printable(e)}") from None


def read_request(request, jobs: JobQueue, allow_urls: bool) -> Job:
    """Return the job that the body of a /v1/chat/completions request asks for. Raises Refused."""
    if not isinstance(request, dict):
        raise Refused(400, "the body is not a JSON object")
    for key, given in request.items():
        if not is_supported(key, given):
            name = printable(key, 60)
            what = f"{name}: {printable(repr(given), 60)} is not supported"
            raise Refused(400, what, "unsupported_parameter", name)
    if request.get("model") != jobs.name:
        asked = printable(repr(request.get("model")), 60)
        what = f"model {asked}: {jobs.name!r} is served"
        raise Refused(404, what, "model_not_found", "model")

    try:
        options = read_options(Fields(request, "request", fix="send another value"), jobs.limits)
    except UserError as e:
        # Its text begins with "request:FIELD: ".
        field = str(e).split(":")[1]
        raise Refused(400, str(e), "invalid_value", field) from None

    # The conversation comes last: only a request that is right so far makes us fetch pictures.
    def read_picture(url: str, count: int) -> Item:
        return jobs.picture(fetch(url, allow_urls, jobs.limits.body), count)

    # Each turn takes at least one token.
    messages = request.get("messages")
    if isinstance(messages, list) and len(messages) > jobs.context:
        what = f"{len(messages)} messages; the context is {jobs.context} tokens"
        raise Refused(400, what, "context_length_exceeded", "messages")
    turns, images = read_messages(messages, read_picture, jobs.limits.images)
    return jobs.job(turns, images, stop=read_stop(request), **options)


def is_supported(key: str, given) -> bool:
    """Return whether a field of a request is obeyed, or asks for nothing."""
    if key in SUPPORTED or key in IGNORED:
        return True
    return given is None or given in HARMLESS.get(key, [])


def read_options(request: Fields, limits: Limits) -> dict:
    """Return how an answer is to be made, as JobQueue.job has it. Raises UserError."""
    # OpenAI has renamed max_tokens, and clients send either name.
    length_key = "max_tokens"
    if "max_completion_tokens" in request:
        length_key = "max_completion_tokens"

    # Read for whoever sends the reply.
    request.flag("stream", default=False)
    request.table("stream_options", optional=True).flag("include_usage", default=False)

    return {
        "max_tokens": request.integer(length_key, 1, limits.tokens, default=limits.tokens),
        "temperature": request.number("temperature", 0, 2, default=1.0),
        # 0 is allowed, and means the likeliest token alone.
        "top_p": max(request.number("top_p", 0, 1, default=1.0), 1e-6),
        # 0 and -1 mean all tokens, as other servers have it.
        "top_k": max(request.integer("top_k", -1, 2**31, default=0), 0),
        "seed": request.integer("seed", -(2**63), 2**63 - 1, default=None),
    }


def read_stop(request: dict) -> list[str]:
    """Return the stop strings of a request, which gives one, or a list of up to four."""
    stop = request.get("stop") or []
    if isinstance(stop, str):
        stop = [stop]

    good = isinstance(stop, list) and len(stop) <= 4
    if not good or not all(is_text(text) and text != "" for text in stop):
        raise Refused(400, "stop: a string, or up to four", "invalid_value", "stop")
    return stop


def is_text(value) -> bool:
    """Return whether a value is a string that can be written out."""
    return isinstance(value, str) and is_unicode(value)


def read_messages(
    messages, read_picture: Callable[[str, int], Item], most: int
) -> tuple[list[dict], list[Item]]:
    """Return LLaVA's turns and the pictures in their order, from OpenAI's messages.

    read_picture: from a URL, and how many pictures there are, to an item. It is called when all
    messages have been found right and there are at most `most` pictures. Raises Refused.
    """
    if not isinstance(messages, list):
        messages = []

    # Every message becomes a turn.
    turns = []
    urls = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or role not in ROLES:
            what = f"{where}: its role must be one of {', '.join(ROLES)}"
            raise Refused(400, what, "invalid_value", where)

        text, shown = read_content(message, where)
        turns.append({"from": ROLES[role], "value": text})
        urls.extend(shown)

    if not turns:
        raise Refused(400, "messages must be a list with a question", "invalid_value", "messages")
    if len(urls) > most:
        what = f"{len(urls)} pictures, at most {most} are taken"
        raise Refused(400, what, "too_many_images", "messages")
    return turns, [read_picture(url, len(urls)) for url in urls]


def read_content(message: dict, where: str) -> tuple[str, list[str]]:
    """Return a message's text, with <image> where a picture stands, and the pictures' URLs.

    Its content is a text, or a list of text and image_url parts. Raises Refused.
    """
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    elif not isinstance(content, list):
        content = []

    # A message without content is as wrong as one whose part is nothing.
    words = []
    urls = []
    for part in content or [None]:
        text = text_of(part)
        url = picture_url_of(part)
        if text is not None:
            words.append(text)
        elif url is not None:
            if message["role"] != "user":
                what = f"{where}: only the user shows pictures"
                raise Refused(400, what, "invalid_value", where)
            urls.append(url)
            words.append(IMAGE)
        else:
            what = f"{where}: its content must be text (without {IMAGE}) and image_url parts"
            raise Refused(400, what, "invalid_value", where)
    return "\n".join(words), urls


def text_of(part) -> str | None:
    """Return the text of a part of a message; None unless it is a text part as it should be.

    A text with a placeholder is wrong: it would stand for a picture that nobody has sent.
    """
    if not isinstance(part, dict) or part.get("type") != "text":
        return None
    text = part.get("text")
    if not is_text(text) or IMAGE in text:
        return None
    return text


def picture_url_of(part) -> str | None:
    """Return the URL of a part of a message; None unless it is a picture part as it should be."""
    if not isinstance(part, dict) or part.get("type") != "image_url":
        return None
    picture = part.get("image_url")
    if not isinstance(picture, dict) or not isinstance(picture.get("url"), str):
        return None
    return picture["url"]


# -- the API ---------------------------------------------------------------------------------------


def api(jobs: JobQueue, host: str, port: int, allow_urls: bool = False, names=(), page=None):
    """Return a server that has its port but does not serve yet; port 0 takes a free one.

    names: others that the server is known by, beside `host`. page: what `web_page` has returned.
    Raises OSError if the port is taken, and UserError without the extra.
    """
    try:
        from inference.connections import Server
    except ImportError:
        fix = "pip install '.[serve]'"
        raise UserError("serve.py", "uvicorn is not installed", fix) from None

    application = API(jobs, allow_urls, Names(host, names), page)
    lifespan = "off"
    if page is not None:
        lifespan = "on"  # gradio has to be started
    return Server(application, host, port, lifespan)


class API:
    """The ASGI application: OpenAI's API, and the page for all other paths, if there is one."""

    def __init__(self, jobs: JobQueue, allow_urls: bool, names: Names, page=None):
        self.jobs = jobs
        self.allow_urls = allow_urls
        self.names = names
        self.page = page
        self.created = int(time.time())

        # A request of the greatest size always fits.
        self.held = Held(max(MOST_HELD, 2 * jobs.limits.body))

    async def __call__(self, scope: dict, receive: Callable, send: Callable):
        """Answer one request. Every one gets a reply, unless its client has left."""
        if scope["type"] == "lifespan":
            await self.page(scope, receive, send)
            return

        exchange = Exchange(scope, receive, send, self.held)
        try:
            await self.answer(exchange)
        except Gone:
            await self.refuse(exchange, Refused(400, "the connection was closed too early"))
        except Refused as e:
            await self.refuse(exchange, e)
        except asyncio.CancelledError:
            # There is no time to wait for the rest of a body.
            exchange.body_ended = True
            await self.refuse(exchange, Refused(503, "the server is being stopped"))
        except BaseException:
            # A panic of a Rust library is no Exception. gradio raises when a client has left.
            if not exchange.left:
                traceback.print_exc()
            await self.refuse(exchange, Refused(500, "a mistake of the server; its log says which"))
        finally:
            exchange.release()

    async def refuse(self, exchange: Exchange, refused: Refused):
        """Send an error reply, unless a reply has begun or nobody is there to hear it."""
        if exchange.started:
            return
        try:
            await exchange.refuse(refused)
        except Gone:
            pass

    async def answer(self, exchange: Exchange):
        """Send the reply to a request. Raises Refused and Gone."""
        check_origin(exchange, self.names)

        name = self.jobs.name
        model = {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "barellava",
        }
        readable = {
            "/v1/models": {"object": "list", "data": [model]},
            f"/v1/models/{name}": model,
            "/health": {"status": "ok", "model": name},
        }

        path = exchange.scope["path"]
        if path == "/v1/chat/completions":
            if await self.has_method(exchange, ("POST",)):
                await self.chat(exchange)
        elif path in readable:
            if await self.has_method(exchange, ("GET", "HEAD")):
                await exchange.reply(200, readable[path])
        elif self.page is not None and not path.startswith("/v1/"):
            await self.show_page(exchange)
        else:
            raise Refused(404, f"{printable(path, 60)}: {PATHS}", "not_found")

    async def has_method(self, exchange: Exchange, methods: tuple[str, ...]) -> bool:
        """Say whether a request has one of a path's methods; if not, reply which there are."""
        method = exchange.scope["method"]
        if method in methods:
            return True

        allowed = {"allow": ", ".join((*methods, "OPTIONS"))}
        if method == "OPTIONS":
            await exchange.reply(200, {}, allowed)
        else:
            refused = Refused(405, f"the method must be {' or '.join(methods)}", "not_found")
            await exchange.refuse(refused, allowed)
        return False

    async def show_page(self, exchange: Exchange):
        """Let gradio answer. Raises Refused for a body that it would take too much memory for."""
        # gradio reads a whole body. It streams uploads to files, up to its own limit for each.
        limits = self.jobs.limits
        most = limits.body
        if exchange.scope["path"].endswith("/upload"):
            most = limits.images * limits.body + 2**20
        if exchange.header("transfer-encoding"):
            raise Refused(411, "a Content-Length is needed")
        length = exchange.header("content-length") or "0"
        if int(length) > most:
            what = f"the request has {length} bytes, at most {most} are taken"
            raise Refused(413, what, "request_too_large")

        exchange.started = True
        await self.page(exchange.scope, exchange.receive, exchange.send)

    async def chat(self, exchange: Exchange):
        """Answer /v1/chat/completions. Raises Refused and Gone.

        A request must say that it is JSON: a web page elsewhere cannot send that without being
        allowed.
        """
        # The whole body comes first: a client that sends slowly has no seat.
        await exchange.read_body(self.jobs.limits.body)
        kind = exchange.header("content-type").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refused(415, "Content-Type must be application/json")
        await exchange.while_there(self.in_turn(exchange))

    async def in_turn(self, exchange: Exchange):
        """Wait for a seat, read the request, and send what the model answers. Raises Refused."""
        async with self.jobs.seat() as seat:
            # Pictures and long texts take time, and others want to be heard meanwhile.
            request, job = await asyncio.to_thread(self.read, exchange.body)
            exchange.release()

            # Closing the answer early, because the client is gone, stops the model.
            async with aclosing(self.jobs.answer(job, seat)) as pieces:
                if request.get("stream"):
                    await self.stream(exchange, request, job, pieces)
                else:
                    await self.complete(exchange, job, pieces)

    def read(self, body: bytearray) -> tuple[dict, Job]:
        """Return a request and its job. Raises Refused."""
        request = read_json(body)
        return request, read_request(request, self.jobs, self.allow_urls)

    async def complete(self, exchange: Exchange, job: Job, pieces: AsyncIterator[str]):
        """Send the whole answer at once."""
        text = ""
        async for piece in pieces:
            text += piece
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": job.finish}
        completion = self.envelope("chat.completion")
        completion |= {"choices": [choice], "usage": job.usage()}
        await exchange.reply(200, completion)

    async def stream(self, exchange: Exchange, request: dict, job: Job, pieces: AsyncIterator[str]):
        """Send server-sent events: the role, pieces of text, the reason of the end, and [DONE].

        The usage comes before [DONE] if stream_options.include_usage asks for it.
        """
        headers = {"content-type": "text/event-stream", "cache-control": "no-cache"}
        await exchange.start(200, headers)
        head = self.envelope("chat.completion.chunk")

        async def send(data: dict):
            await exchange.write(b"data: " + json.dumps(data).encode() + b"\n\n")

        async def send_delta(delta: dict, finish: str | None = None):
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
            await send(head | {"choices": [choice]})

        try:
            await send_delta({"role": "assistant", "content": ""})
            async for piece in pieces:
                await send_delta({"content": piece})
            await send_delta({}, job.finish)
            options = request.get("stream_options") or {}
            if options.get("include_usage"):
                await send(head | {"choices": [], "usage": job.usage()})
        except Refused as e:
            # Too late for another status: 200 has been sent.
            await send(e.body)
        await exchange.write(b"data: [DONE]\n\n", last=True)

    def envelope(self, kind: str) -> dict:
        """Return the fields that every reply of a kind begins with."""
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": self.jobs.name,
        }


# -- the page --------------------------------------------------------------------------------------


def web_page(jobs: JobQueue):
    """Return the page, an ASGI application for `api`. Raises UserError without the extra.

    Answers are greedy. No font or script comes from elsewhere. The conversation stays here, where
    no browser changes it.
    """
    try:
        import fastapi
        import gradio
    except ImportError:
        raise UserError("--web", "gradio is not installed", "pip install '.[demo]'") from None

    async def ask(message: dict, system: str | None, shown: list, said: tuple):
        """Take what is in the boxes, the chat and the state; yield what they hold as it grows.

        message: a text, and the names of files. system: the text of a system message, or none.
        shown: the messages in the chat. said: the turns of the conversation, and the bytes of its
        picture files.
        """
        try:
            async with (
                jobs.seat() as seat,
                aclosing(answer(message, system or "", shown, said, seat)) as states,
            ):
                async for state in states:
                    yield state
        except Refused as e:
            raise gradio.Error(str(e), title="Not answered", print_exception=False) from None

    async def answer(message: dict, system: str, shown: list, said: tuple, seat: Seat):
        """Do what `ask` says. Raises Refused."""
        text = message["text"].strip()
        files = message["files"]
        if not text or IMAGE in text + system or not is_text(text + system):
            raise Refused(400, f"write a question, without {IMAGE} in it")

        # New lists, since those of `said` stay as they are if this question gets no answer.
        turns, images = said
        question = place_images(text, len(files))
        turns = turns + [{"from": "human", "value": question}]

        def prepare() -> Job:
            if len(images) + len(files) > jobs.limits.images:
                most = f"at most {jobs.limits.images} pictures are taken"
                raise Refused(400, most, "too_many_images")
            for file in files:
                images.append(Path(file).read_bytes())

            # What a picture becomes may depend on how many there are.
            items = [jobs.picture(data, len(images)) for data in images]

            # The system message may change between two questions.
            asked = turns
            if system.strip():
                asked = [{"from": "system", "value": system.strip()}, *turns]
            greedy = {"temperature": 0.0, "top_p": 1.0, "top_k": 0}
            return jobs.job(asked, items, stop=[], seed=None, **greedy)

        images = list(images)
        job = await asyncio.to_thread(prepare)

        shown = list(shown)
        for file in files:
            shown.append({"role": "user", "content": {"path": file}})
        shown.append({"role": "user", "content": text})
        shown.append({"role": "assistant", "content": ""})

        # From now on the box is empty (None), and the last message grows.
        made = ""
        async with aclosing(jobs.answer(job, seat)) as pieces:
            async for piece in pieces:
                made += piece
                shown = [*shown[:-1], {"role": "assistant", "content": made}]
                yield None, shown, said

        # Only a whole answer becomes part of the conversation.
        turns = turns + [{"from": "gpt", "value": made.strip()}]
        yield None, shown, (turns, images)

    # Uploaded files are deleted when they are an hour old.
    with gradio.Blocks(
        title=jobs.name, analytics_enabled=False, delete_cache=(3600, 3600)
    ) as blocks:
        gradio.Markdown(f"### {jobs.name}")
        chat = gradio.Chatbot(show_label=False, height=480, render_markdown=False, buttons=[])
        box = gradio.MultimodalTextbox(
            show_label=False,
            file_types=["image"],
            sources=["upload"],
            file_count="multiple",
            placeholder="Show a picture, ask about it",
        )
        with gradio.Accordion("System message", open=False):
            system = gradio.Textbox(show_label=False, max_length=10_000)
        said = gradio.State(([], []), time_to_live=3600)

        # As many questions at once as the queue has seats. Clearing the chat stops its answer.
        seats = 1 + jobs.limits.queue
        asking = box.submit(
            ask,
            inputs=[box, system, chat, said],
            outputs=[box, chat, said],
            concurrency_limit=seats,
        )
        chat.clear(lambda: ([], []), None, said, cancels=asking)

    # Fonts of the reader's own system: gradio's would come from elsewhere.
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    blocks.queue(max_size=seats)
    page = gradio.mount_gradio_app(
        fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        blocks,
        path="/",
        theme=theme,
        footer_links=[],
        max_file_size=jobs.limits.body,
        show_error=False,
        run_history=False,
        ssr_mode=False,
    )

    # gradio checks that a file which a request names was uploaded, and is no other one of this
    # machine, only after `launch`. A page that is mounted has not been launched.
    blocks.has_launched = True
    blocks.is_running = True
    return page


# -- the command -----------------------------------------------------------------------------------


def whole(low: int, high: int) -> Callable[[str], int]:
    """Return a reader of whole numbers from low to high, for an option."""

    def read(text: str) -> int:
        number = int(text) if text.lstrip("-").isdecimal() and len(text) < 20 else low - 1
        if not low <= number <= high:
            wrong = f"{printable(text, 30)!r} is not a whole number from {low} to {high}"
            raise argparse.ArgumentTypeError(wrong)
        return number

    return read


def arguments(argv: list[str]):
    """Return the command line's options, and the limits that they set."""
    parser = command_line.parser(__doc__)
    option = parser.add_argument
    option("--model", required=True, help="folder or Hugging Face id of a trained model")
    option("--web", action="store_true", help="the page, too")
    option(
        "--host",
        nargs="+",
        default=["127.0.0.1"],
        metavar=("ADDRESS", "NAME"),
        help="address to listen at (127.0.0.1: this machine alone), and other names for it",
    )
    option("--port", type=whole(0, 65535), default=8000, help="(8000; 0: a free one)")
    option(
        "--allow-urls", action="store_true", help="fetch pictures from http URLs that requests name"
    )
    option(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the weights (float32; a GPU: bfloat16)",
    )
    # An option --max-... for each limit.
    for limit in fields(Limits):
        least = 0 if limit.name in ("queue", "wait") else 1
        words = f"{limit.metadata['why']} ({limit.default})"
        option(f"--max-{limit.name}", type=whole(least, 2**40), default=limit.default, help=words)

    args = parser.parse_args(argv)
    given = {limit.name: getattr(args, f"max_{limit.name}") for limit in fields(Limits)}
    return args, Limits(**given)


def main(argv: list[str]):
    args, limits = arguments(argv)
    host, *names = args.host
    if host == "":
        raise UserError("--host", "no address", "0.0.0.0 listens everywhere")

    # A folder is served under its own name, a model of the hub under its id.
    name = args.model
    if Path(args.model).is_dir():
        name = Path(args.model).resolve().name

    # The same choice as in generate.py and evaluate.py.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = default_dtype(device)
    if args.dtype:
        dtype = getattr(torch, args.dtype)

    folder = resolve(args.model)
    model = LLaVA.from_pretrained(folder, dtype, device)
    jobs = JobQueue(model, load_tokenizer(folder), name, limits)

    page = None
    if args.web:
        page = web_page(jobs)
    try:
        server = api(jobs, host, args.port, args.allow_urls, names, page)
    except OSError as e:
        address = f"http://{host}:{args.port}"
        raise UserError(address, str(e), "give another --port or --host") from None

    # Of the server's port: with --port 0 it has just been chosen.
    address = f"http://{in_brackets(host)}:{server.server_port}"
    print(f"{name}: {address}/v1", flush=True)
    if args.web:
        print(f"{name}: {address}", flush=True)

    # A line for each reply, as web servers have it.
    log = logging.getLogger("uvicorn.access")
    log.addHandler(logging.StreamHandler())
    log.setLevel(logging.INFO)

    # When the server has ended, it raises the signal again that made it end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    command_line.cli(main, __doc__)
