"""Serve a trained model: OpenAI's chat API, or a page to chat with pictures.

    python serve.py --model out/demo              # the API at http://127.0.0.1:8000/v1
    python serve.py --model out/demo --web        # the page at http://127.0.0.1:8000 (extra `demo`)

    client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}
    client.chat.completions.create(model="demo", messages=[{"role": "user", "content": [picture, question]}])

/v1/chat/completions takes messages of text and picture parts, stream, stream_options, max_tokens (or
max_completion_tokens), temperature and top_p (1, as OpenAI has it), stop and seed. Other fields are refused unless they
ask for nothing; a picture's `detail` has no meaning here. Pictures are data URLs of PNG, JPEG, WebP, GIF or BMP; http
URLs only with --allow-urls. Requests are answered one after another in the order of their arrival, as many as
--max-queue wait, more get status 429. There is no key: whoever reaches the port may ask, so it is 127.0.0.1's alone
unless --host says otherwise.
"""

import json
import time
import urllib.parse
import uuid
from contextlib import closing
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

import config
from checkpoints.files import resolve
from config import UserError
from inference.job_queue import Engine, Job, Limits, Refused, fetch
from inputs.templates import IMAGE
from inputs.tokenizer import load_tokenizer
from model import LLaVA
from packing import Item

NEUTRAL = {
    "n": (1,), "logprobs": (False,), "top_logprobs": (0,), "frequency_penalty": (0,), "presence_penalty": (0,),
    "logit_bias": ({},), "tools": ([],), "tool_choice": ("none", "auto"), "response_format": ({"type": "text"},),
    "modalities": (["text"],), "user": None, "metadata": None, "store": None,
}  # fmt: skip  # what asks for nothing we lack; None: any value
KNOWN = {"model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature", "top_p",
         "stop", "seed"}  # fmt: skip


def number(request: dict, key: str, kind, low: float, high: float, default=None):
    """A number of the request within its bounds, or Refused."""
    given = request.get(key)
    if given is None:
        return default
    if isinstance(given, bool) or not isinstance(given, kind) or not low <= given <= high:
        raise Refused(
            400, f"{key}: {given!r} is not a number from {low} to {high}", "invalid_value", key
        )
    return given


def read_messages(messages, picture, most: int) -> tuple[list[dict], list[Item]]:
    """OpenAI's messages -> LLaVA's turns and the pictures in their order; picture: a URL to its item."""
    roles = {"system": "system", "developer": "system", "user": "human", "assistant": "gpt"}
    turns, urls = [], []
    for i, message in enumerate(messages if isinstance(messages, list) else []):
        where = f"messages[{i}]"
        if not isinstance(message, dict) or message.get("role") not in roles:
            raise Refused(
                400, f"{where}: its role must be one of {', '.join(roles)}", "invalid_value", where
            )
        content, words = message.get("content"), []
        for part in (
            [{"type": "text", "text": content}] if isinstance(content, str) else content or [None]
        ):
            kind = part.get("type") if isinstance(part, dict) else None
            inside = part.get(kind) if kind in ("text", "image_url") else None
            if kind == "text" and isinstance(inside, str) and IMAGE not in inside:
                words.append(inside)
            elif (
                kind == "image_url"
                and isinstance(inside, dict)
                and isinstance(inside.get("url"), str)
            ):
                if message["role"] != "user":
                    raise Refused(
                        400, f"{where}: only the user shows pictures", "invalid_value", where
                    )
                urls.append(inside["url"])
                words.append(IMAGE)
            else:
                what = f"{where}: its content must be text (without {IMAGE}) and image_url parts"
                raise Refused(400, what, "invalid_value", where)
        turns.append({"from": roles[message["role"]], "value": "\n".join(words)})
    if not turns:
        raise Refused(400, "messages must be a list with a question", "invalid_value", "messages")
    if len(urls) > most:
        raise Refused(
            400, f"{len(urls)} pictures, at most {most} are taken", "too_many_images", "messages"
        )
    return turns, [picture(url) for url in urls]


def read_request(request, engine: Engine, allow_urls: bool) -> Job:
    """A /v1/chat/completions body -> the job it asks for. Raises Refused."""
    if not isinstance(request, dict):
        raise Refused(400, "the body is not a JSON object")
    for key, given in request.items():
        neutral = () if key in KNOWN else NEUTRAL.get(key, ())
        if key not in KNOWN and given is not None and neutral is not None and given not in neutral:
            raise Refused(400, f"{key}: {given!r} is not supported", "unsupported_parameter", key)
    if request.get("model") != engine.name:
        raise Refused(
            404,
            f"model {request.get('model')!r}: {engine.name!r} is served",
            "model_not_found",
            "model",
        )
    stop = request.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if (
        not isinstance(stop, list)
        or len(stop) > 4
        or not all(isinstance(s, str) and s for s in stop)
    ):
        raise Refused(400, "stop: a string, or up to four", "invalid_value", "stop")
    limits, new = (
        engine.limits,
        "max_completion_tokens" if request.get("max_completion_tokens") else "max_tokens",
    )
    options = {
        "max_tokens": number(request, new, int, 1, limits.tokens, limits.tokens),
        "temperature": number(request, "temperature", (int, float), 0, 2, 1.0),
        "top_p": max(
            number(request, "top_p", (int, float), 0, 1, 1.0), 1e-6
        ),  # 0: the likeliest token alone
        "seed": number(request, "seed", int, -(2**63), 2**63 - 1),
    }

    def picture(url: str) -> Item:
        return engine.picture(fetch(url, allow_urls, limits.body))

    return engine.job(
        *read_messages(request.get("messages"), picture, limits.images), stop=stop, **options
    )


class Handler(BaseHTTPRequestHandler):
    """One connection; `server` has engine, allow_urls and started."""

    protocol_version, timeout = "HTTP/1.1", 60  # seconds that a silent client is waited for
    unread = 0  # bytes of the body that are still to come

    def reply(self, status: int, body: dict):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def refuse(self, refused: Refused):
        for _ in range(
            100
        ):  # a client that is still sending would not read the reply, up to a limit
            self.unread -= len(self.rfile.read(min(self.unread, 1 << 20)))
        self.close_connection = self.close_connection or self.unread > 0
        self.reply(refused.status, refused.body)

    def do_GET(self):
        name = self.server.engine.name
        model = {
            "id": name,
            "object": "model",
            "created": self.server.started,
            "owned_by": "barellava",
        }
        found = {"/v1/models": {"object": "list", "data": [model]}, f"/v1/models/{name}": model}
        try:
            self.reply(200, found[urllib.parse.unquote(self.path)])
        except KeyError:
            self.refuse(
                Refused(
                    404, f"{self.path}: there are /v1/models and /v1/chat/completions", "not_found"
                )
            )

    def do_POST(self):
        try:
            with self.server.engine.seat():
                request = self.read_body()
                job = read_request(request, self.server.engine, self.server.allow_urls)
                with closing(self.server.engine.answer(job)) as pieces:
                    (self.stream if request.get("stream") else self.complete)(request, job, pieces)
        except Refused as e:
            self.refuse(e)
        except OSError:  # the client is gone
            self.close_connection = True

    def read_body(self):
        """The JSON of a request, which must say that it is JSON: then no web page elsewhere can send it unasked."""
        length, most = self.headers.get("Content-Length", ""), self.server.engine.limits.body
        self.unread = int(length) if length.isdecimal() else 0
        if self.path != "/v1/chat/completions":
            raise Refused(
                404, f"{self.path}: there are /v1/models and /v1/chat/completions", "not_found"
            )
        if not length.isdecimal():
            self.close_connection = True  # where this request ends is not known
            raise Refused(411, "a Content-Length is needed")
        if self.unread > most:
            raise Refused(
                413,
                f"the request has {length} bytes, at most {most} are taken",
                "request_too_large",
            )
        body, self.unread = self.rfile.read(self.unread), 0
        if self.headers.get_content_type() != "application/json":
            raise Refused(415, "Content-Type must be application/json")
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as e:
            raise Refused(400, f"the body is not JSON: {e}") from None

    def complete(self, request: dict, job: Job, pieces):
        message = {"role": "assistant", "content": "".join(pieces), "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": job.finish}
        self.reply(
            200, self.envelope("chat.completion") | {"choices": [choice], "usage": job.usage()}
        )

    def stream(self, request: dict, job: Job, pieces):
        """Server-sent events: the role, pieces of text, why it ended, the usage where asked for, [DONE]."""
        self.close_connection = True  # its end is the end of the answer
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-cache")
        self.send_header("Connection", "close")
        self.end_headers()
        head = self.envelope("chat.completion.chunk")

        def send(data: dict):
            self.wfile.write(b"data: " + json.dumps(data).encode() + b"\n\n")

        def chunk(delta: dict, finish: str | None = None):
            send(
                head
                | {
                    "choices": [
                        {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
                    ]
                }
            )

        try:
            chunk({"role": "assistant", "content": ""})
            for piece in pieces:
                chunk({"content": piece})
            chunk({}, job.finish)
            if (request.get("stream_options") or {}).get("include_usage"):
                send(head | {"choices": [], "usage": job.usage()})
        except Refused as e:  # too late for a status
            send(e.body)
        self.wfile.write(b"data: [DONE]\n\n")

    def envelope(self, kind: str) -> dict:
        made = {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time())}
        return made | {"model": self.server.engine.name}


def api(engine: Engine, host: str, port: int, allow_urls: bool = False) -> ThreadingHTTPServer:
    """A server that is bound but does not serve yet; port 0 takes a free one. Raises OSError."""
    server = ThreadingHTTPServer((host, port), Handler)
    server.engine, server.allow_urls, server.started = engine, allow_urls, int(time.time())
    return server


# ------------------------------------------------------------------------------------------------ the page


def page(engine: Engine, host: str, port: int, **options):
    """Serve the page. Answers are greedy; no font or script comes from elsewhere; the conversation stays here, where no
    browser changes it. options: of gradio's launch. Raises OSError where the port is taken."""
    try:
        import gradio
    except ImportError:
        raise UserError("--web", "gradio is not installed", "pip install '.[demo]'") from None

    def ask(message: dict, shown: list, said: tuple):
        """The box, the chat and (turns, pictures) -> the same three, as the answer grows."""
        text, files = message["text"].strip(), message["files"]
        try:
            if not text or IMAGE in text:
                raise Refused(400, f"write a question, without {IMAGE} in it")
            with engine.seat():
                images = [*said[1], *(engine.picture(Path(f).read_bytes()) for f in files)]
                turns = [*said[0], {"from": "human", "value": f"{IMAGE}\n" * len(files) + text}]
                job, answer = (
                    engine.job(turns, images, stop=[], temperature=0.0, top_p=1.0, seed=None),
                    "",
                )
                shown = [*shown, *({"role": "user", "content": {"path": f}} for f in files)]
                shown += [{"role": "user", "content": text}, {"role": "assistant", "content": ""}]
                with closing(engine.answer(job)) as pieces:
                    for piece in pieces:
                        answer += piece
                        shown = [*shown[:-1], {"role": "assistant", "content": answer}]
                        yield None, shown, said
                yield None, shown, ([*turns, {"from": "gpt", "value": answer.strip()}], images)
        except Refused as e:
            raise gradio.Error(str(e), title="Not answered", print_exception=False) from None

    with gradio.Blocks(
        title=engine.name, analytics_enabled=False, delete_cache=(3600, 3600)
    ) as blocks:
        gradio.Markdown(f"### {engine.name}")
        chat = gradio.Chatbot(show_label=False, height=480, render_markdown=False, buttons=[])
        hint = "Show a picture, ask about it"
        box = gradio.MultimodalTextbox(
            show_label=False,
            file_types=["image"],
            sources=["upload"],
            file_count="multiple",
            placeholder=hint,
        )
        said = gradio.State(([], []), time_to_live=3600)
        asking = box.submit(
            ask, [box, chat, said], [box, chat, said], concurrency_limit=1 + engine.limits.queue
        )
        chat.clear(lambda: ([], []), None, said, cancels=asking)
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    options = {
        "quiet": True,
        "theme": theme,
        "footer_links": [],
        "max_file_size": engine.limits.body,
    } | options
    return blocks.queue(max_size=1 + engine.limits.queue).launch(
        server_name=host, server_port=port, **options
    )


def main(argv: list[str]):
    parser = config.parser(__doc__)
    parser.add_argument(
        "--model", required=True, help="folder or Hugging Face id of a trained model"
    )
    parser.add_argument("--web", action="store_true", help="the page in place of the API")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (127.0.0.1: this machine alone)"
    )
    parser.add_argument("--port", type=int, default=8000, help="(8000)")
    parser.add_argument(
        "--allow-urls", action="store_true", help="fetch pictures from http URLs that requests name"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the weights (float32)",
    )
    for f in fields(Limits):
        parser.add_argument(
            f"--max-{f.name}",
            type=int,
            default=f.default,
            help=f"{f.metadata['why']} ({f.default})",
        )
    a = parser.parse_args(argv)
    limits = Limits(**{f.name: getattr(a, f"max_{f.name}") for f in fields(Limits)})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = resolve(a.model)
    name = Path(a.model).resolve().name if Path(a.model).is_dir() else a.model
    engine = Engine(
        LLaVA.from_pretrained(folder, getattr(torch, a.dtype), device),
        load_tokenizer(folder),
        name,
        limits,
    )
    address = f"http://{a.host}:{a.port}"
    try:
        if a.web:
            print(f"{name}: {address}", flush=True)
            page(engine, a.host, a.port)
        else:
            with api(engine, a.host, a.port, a.allow_urls) as server:
                print(f"{name}: http://{a.host}:{server.server_port}/v1", flush=True)
                server.serve_forever()
    except OSError as e:
        raise UserError(address, str(e), "give another --port or --host") from None
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    config.cli(main, __doc__)
