"""Serve a trained model: OpenAI's chat API, or a page to chat with pictures.

    python serve.py --model out/demo              # the API at http://127.0.0.1:8000/v1
    python serve.py --model out/demo --web        # the page at http://127.0.0.1:8000 (extra `demo`)

    client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}
    question = {"type": "text", "text": "What is this?"}
    messages = [{"role": "user", "content": [picture, question]}]
    client.chat.completions.create(model="demo", messages=messages)

/v1/chat/completions takes messages of text and picture parts, stream, stream_options, max_tokens
(or max_completion_tokens), temperature and top_p (1, as OpenAI has it), stop and seed. Other fields
are refused unless they ask for nothing; a picture's `detail` has no meaning here. Pictures are data
URLs of PNG, JPEG, WebP, GIF or BMP; http URLs only with --allow-urls.

Requests are answered one after another in the order of their arrival. As many as --max-queue wait,
more get status 429. There is no key: whoever reaches the port may ask, so only this machine can,
unless --host says otherwise.

In this order: how requests are read (`read_request`), how they are answered over HTTP (`Handler`),
the page (`web_page`), and the command (`main`). The queue behind all is inference/job_queue.py.
"""

import json
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

import config
from checkpoints.files import resolve
from config import UserError
from inference.answer import place_images
from inference.job_queue import Job, JobQueue, Limits, Refused, fetch
from inputs.templates import IMAGE
from inputs.tokenizer import load_tokenizer
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
IGNORED = ("user", "metadata", "store")

# OpenAI's roles, and what LLaVA's conversations call them.
ROLES = {"system": "system", "developer": "system", "user": "human", "assistant": "gpt"}

PATHS = "there are /v1/models and /v1/chat/completions"


def read_request(request, jobs: JobQueue, allow_urls: bool) -> Job:
    """Return the job that the body of a /v1/chat/completions request asks for. Raises Refused."""
    if not isinstance(request, dict):
        raise Refused(400, "the body is not a JSON object")
    for key, given in request.items():
        if not is_supported(key, given):
            raise Refused(400, f"{key}: {given!r} is not supported", "unsupported_parameter", key)
    if request.get("model") != jobs.name:
        what = f"model {request.get('model')!r}: {jobs.name!r} is served"
        raise Refused(404, what, "model_not_found", "model")

    # How the answer is to be made. OpenAI has renamed max_tokens, and clients send either name.
    limits = jobs.limits
    stop = read_stop(request)
    length_key = "max_tokens"
    if request.get("max_completion_tokens"):
        length_key = "max_completion_tokens"
    max_tokens = read_number(request, length_key, int, 1, limits.tokens, limits.tokens)
    temperature = read_number(request, "temperature", (int, float), 0, 2, 1.0)
    top_p = read_number(request, "top_p", (int, float), 0, 1, 1.0)
    seed = read_number(request, "seed", int, -(2**63), 2**63 - 1)

    # The conversation comes last: only a request that is right so far makes us fetch pictures.
    def read_picture(url: str) -> Item:
        return jobs.picture(fetch(url, allow_urls, limits.body))

    turns, images = read_messages(request.get("messages"), read_picture, limits.images)
    return jobs.job(
        turns,
        images,
        max_tokens,
        stop=stop,
        temperature=temperature,
        top_p=max(top_p, 1e-6),  # 0 is allowed, and means the likeliest token alone
        seed=seed,
    )


def is_supported(key: str, given) -> bool:
    """Return whether a field of a request is obeyed, or asks for nothing."""
    if key in SUPPORTED or key in IGNORED:
        return True
    return given is None or given in HARMLESS.get(key, [])


def read_number(request: dict, key: str, kind, low: float, high: float, default=None):
    """Return a number of the request; Refused unless it is of a kind and from low to high."""
    given = request.get(key)
    if given is None:
        return default

    # To Python, True is an integer.
    is_number = isinstance(given, kind) and not isinstance(given, bool)
    if not is_number or not low <= given <= high:
        what = f"{key}: {given!r} is not a number from {low} to {high}"
        raise Refused(400, what, "invalid_value", key)
    return given


def read_stop(request: dict) -> list[str]:
    """Return the stop strings of a request, which gives one, or a list of up to four."""
    stop = request.get("stop") or []
    if isinstance(stop, str):
        stop = [stop]

    good = isinstance(stop, list) and len(stop) <= 4
    if not good or not all(is_text(text) for text in stop):
        raise Refused(400, "stop: a string, or up to four", "invalid_value", "stop")
    return stop


def is_text(value) -> bool:
    """Return whether a value is a string that is not empty."""
    return isinstance(value, str) and value != ""


def read_messages(
    messages, read_picture: Callable[[str], Item], most: int
) -> tuple[list[dict], list[Item]]:
    """Return LLaVA's turns and the pictures in their order, from OpenAI's messages.

    read_picture: from a URL to an item. It is called when all messages have been found right and
    there are at most `most` pictures. Raises Refused.
    """
    if not isinstance(messages, list):
        messages = []

    # Every message becomes a turn.
    turns = []
    urls = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            what = f"{where}: its role must be one of {', '.join(ROLES)}"
            raise Refused(400, what, "invalid_value", where)

        text, shown = read_content(message, where)
        turns.append({"from": ROLES[message["role"]], "value": text})
        urls.extend(shown)

    if not turns:
        raise Refused(400, "messages must be a list with a question", "invalid_value", "messages")
    if len(urls) > most:
        what = f"{len(urls)} pictures, at most {most} are taken"
        raise Refused(400, what, "too_many_images", "messages")
    return turns, [read_picture(url) for url in urls]


def read_content(message: dict, where: str) -> tuple[str, list[str]]:
    """Return a message's text, with <image> where a picture stands, and the pictures' URLs.

    Its content is a text, or a list of text and image_url parts. Raises Refused.
    """
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]

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
    if not isinstance(text, str) or IMAGE in text:
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


class Server(ThreadingHTTPServer):
    """A server at an address, with a thread and a Handler for each connection."""

    def __init__(self, address: tuple[str, int], jobs: JobQueue, allow_urls: bool):
        super().__init__(address, Handler)
        self.jobs = jobs
        self.allow_urls = allow_urls
        self.started = int(time.time())


def api(jobs: JobQueue, host: str, port: int, allow_urls: bool = False) -> Server:
    """Return a server that has its port but does not serve yet; port 0 takes a free one.

    Raises OSError if the port is taken.
    """
    return Server((host, port), jobs, allow_urls)


class Handler(BaseHTTPRequestHandler):
    """One connection of a client, with one request after another."""

    # What BaseHTTPRequestHandler reads: the protocol keeps connections open between requests.
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds that a silent client is waited for
    server: Server

    unread = 0  # bytes of the request's body that are still to come

    def do_GET(self):
        """Answer /v1/models and /v1/models/NAME."""
        name = self.server.jobs.name
        model = {
            "id": name,
            "object": "model",
            "created": self.server.started,
            "owned_by": "barellava",
        }
        path = urllib.parse.unquote(self.path)
        if path == "/v1/models":
            self.reply(200, {"object": "list", "data": [model]})
        elif path == f"/v1/models/{name}":
            self.reply(200, model)
        else:
            self.refuse(Refused(404, f"{self.path}: {PATHS}", "not_found"))

    def do_POST(self):
        """Answer /v1/chat/completions."""
        jobs = self.server.jobs
        try:
            with jobs.seat():
                request = self.read_body()
                job = read_request(request, jobs, self.server.allow_urls)
                # Closing the answer early, because the client is gone, stops the model.
                with closing(jobs.answer(job)) as pieces:
                    if request.get("stream"):
                        self.stream(request, job, pieces)
                    else:
                        self.complete(job, pieces)
        except Refused as e:
            self.refuse(e)
        except OSError:  # the client is gone
            self.close_connection = True

    def read_body(self):
        """Return the JSON of a request. Raises Refused.

        It must say that it is JSON: a web page elsewhere cannot send that without being allowed.
        """
        length = self.headers.get("Content-Length", "")
        most = self.server.jobs.limits.body
        self.unread = 0
        if length.isdecimal():
            self.unread = int(length)

        # Refuse what needs no look at the body before reading it.
        if self.path != "/v1/chat/completions":
            raise Refused(404, f"{self.path}: {PATHS}", "not_found")
        if not length.isdecimal():
            # Where this request ends and the next one begins is not known.
            self.close_connection = True
            raise Refused(411, "a Content-Length is needed")
        if self.unread > most:
            what = f"the request has {length} bytes, at most {most} are taken"
            raise Refused(413, what, "request_too_large")

        body = self.rfile.read(self.unread)
        self.unread = 0
        if self.headers.get_content_type() != "application/json":
            raise Refused(415, "Content-Type must be application/json")
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as e:
            raise Refused(400, f"the body is not JSON: {e}") from None

    def reply(self, status: int, body: dict):
        """Send a whole JSON reply."""
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def refuse(self, refused: Refused):
        """Send an error reply.

        A client reads no reply while it is still sending, so the rest of its request is read first:
        up to 100 MiB. If there is even more, the connection is closed.
        """
        for _ in range(100):
            # A piece of 1 MiB, or of 0 bytes when nothing is left.
            self.unread -= len(self.rfile.read(min(self.unread, 1 << 20)))
        if self.unread > 0:
            self.close_connection = True
        self.reply(refused.status, refused.body)

    def complete(self, job: Job, pieces: Iterator[str]):
        """Send the whole answer at once."""
        message = {"role": "assistant", "content": "".join(pieces), "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": job.finish}
        completion = self.envelope("chat.completion")
        completion |= {"choices": [choice], "usage": job.usage()}
        self.reply(200, completion)

    def stream(self, request: dict, job: Job, pieces: Iterator[str]):
        """Send server-sent events: the role, pieces of text, the reason of the end, and [DONE].

        The usage comes before [DONE] if stream_options.include_usage asks for it.
        """
        # The length is not known when it begins, so the end of the connection is the answer's end.
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-cache")
        self.send_header("Connection", "close")
        self.end_headers()
        head = self.envelope("chat.completion.chunk")

        def send(data: dict):
            self.wfile.write(b"data: " + json.dumps(data).encode() + b"\n\n")

        def send_delta(delta: dict, finish: str | None = None):
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
            send(head | {"choices": [choice]})

        try:
            send_delta({"role": "assistant", "content": ""})
            for piece in pieces:
                send_delta({"content": piece})
            send_delta({}, job.finish)
            options = request.get("stream_options") or {}
            if options.get("include_usage"):
                send(head | {"choices": [], "usage": job.usage()})
        except Refused as e:
            # Too late for another status: 200 has been sent.
            send(e.body)
        self.wfile.write(b"data: [DONE]\n\n")

    def envelope(self, kind: str) -> dict:
        """Return the fields that every reply of a kind begins with."""
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": self.server.jobs.name,
        }


# -- the page --------------------------------------------------------------------------------------


def web_page(jobs: JobQueue, host: str, port: int, **options):
    """Serve the page until it is stopped. options: of gradio's launch.

    Answers are greedy. No font or script comes from elsewhere. The conversation stays here, where
    no browser changes it. Raises OSError if the port is taken.
    """
    try:
        import gradio
    except ImportError:
        raise UserError("--web", "gradio is not installed", "pip install '.[demo]'") from None

    def ask(message: dict, shown: list, said: tuple):
        """Take what the box, the chat and the state hold; yield what they hold as the answer grows.

        message: a text, and the names of files. shown: the messages in the chat. said: the turns
        and the pictures of the conversation so far.
        """
        try:
            yield from answer(message["text"].strip(), message["files"], shown, said)
        except Refused as e:
            raise gradio.Error(str(e), title="Not answered", print_exception=False) from None

    def answer(text: str, files: list[str], shown: list, said: tuple):
        """Do what `ask` says. Raises Refused."""
        if not text or IMAGE in text:
            raise Refused(400, f"write a question, without {IMAGE} in it")
        with jobs.seat():
            # New lists, since those of `said` stay as they are if this question gets no answer.
            turns, images = said
            images = images + [jobs.picture(Path(file).read_bytes()) for file in files]
            question = place_images(text, len(files))
            turns = turns + [{"from": "human", "value": question}]
            job = jobs.job(turns, images, stop=[], temperature=0.0, top_p=1.0, seed=None)

            shown = list(shown)
            for file in files:
                shown.append({"role": "user", "content": {"path": file}})
            shown.append({"role": "user", "content": text})
            shown.append({"role": "assistant", "content": ""})

            # From now on the box is empty (None), and the last message grows.
            made = ""
            with closing(jobs.answer(job)) as pieces:
                for piece in pieces:
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
        said = gradio.State(([], []), time_to_live=3600)

        # As many questions at once as the queue has seats. Clearing the chat stops its answer.
        parts = [box, chat, said]
        seats = 1 + jobs.limits.queue
        asking = box.submit(ask, inputs=parts, outputs=parts, concurrency_limit=seats)
        chat.clear(lambda: ([], []), None, said, cancels=asking)

    # Fonts of the reader's own system: gradio's would come from elsewhere.
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    defaults = {
        "quiet": True,
        "theme": theme,
        "footer_links": [],
        "max_file_size": jobs.limits.body,
    }
    queued = blocks.queue(max_size=seats)
    return queued.launch(server_name=host, server_port=port, **(defaults | options))


# -- the command -----------------------------------------------------------------------------------


def arguments(argv: list[str]):
    """Return the command line's options, and the limits that they set."""
    parser = config.parser(__doc__)
    option = parser.add_argument
    option("--model", required=True, help="folder or Hugging Face id of a trained model")
    option("--web", action="store_true", help="the page in place of the API")
    option(
        "--host", default="127.0.0.1", help="address to listen at (127.0.0.1: this machine alone)"
    )
    option("--port", type=int, default=8000, help="(8000)")
    option(
        "--allow-urls", action="store_true", help="fetch pictures from http URLs that requests name"
    )
    option(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the weights (float32)",
    )
    # An option --max-... for each limit.
    for limit in fields(Limits):
        words = f"{limit.metadata['why']} ({limit.default})"
        option(f"--max-{limit.name}", type=int, default=limit.default, help=words)

    args = parser.parse_args(argv)
    given = {limit.name: getattr(args, f"max_{limit.name}") for limit in fields(Limits)}
    return args, Limits(**given)


def main(argv: list[str]):
    args, limits = arguments(argv)

    # A folder is served under its own name, a model of the hub under its id.
    name = args.model
    if Path(args.model).is_dir():
        name = Path(args.model).resolve().name

    folder = resolve(args.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = LLaVA.from_pretrained(folder, getattr(torch, args.dtype), device)
    jobs = JobQueue(model, load_tokenizer(folder), name, limits)

    address = f"http://{args.host}:{args.port}"
    try:
        if args.web:
            print(f"{name}: {address}", flush=True)
            web_page(jobs, args.host, args.port)
        else:
            with api(jobs, args.host, args.port, args.allow_urls) as server:
                # Of the server's port: with --port 0 it has just been chosen.
                print(f"{name}: http://{args.host}:{server.server_port}/v1", flush=True)
                server.serve_forever()
    except OSError as e:
        raise UserError(address, str(e), "give another --port or --host") from None
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    config.cli(main, __doc__)
