"""Send wrong requests to serve.py: JSON, headers, bytes, pictures, and clients that break off.

    python -m tests.tools.fuzz.server --count 500 --seed 0

Each case is the bytes of one connection, in pieces. A violation: no reply, unless the client has
broken off; a status of 500 and more; a traceback in the server's log; much memory; and a good
request after it that is not answered.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import io
import json
import random
import re
import socket
import struct
import tempfile
import time
import urllib.request
from functools import cache, partial
from pathlib import Path

from PIL import Image

from tests.tools import fuzz, served
from tests.tools.fuzz import Case, Violation

PATIENCE = 1.0  # seconds of silence after which the client closes its side
MOST_MEMORY = 3000  # MiB that the server may have

CLOSE = "Connection: close"
HEADERS = ("Host: localhost", "Content-Type: application/json", CLOSE)
ODD_HEADERS = (
    "Host: evil.example",
    "Host: localhost:99999999",
    "Host: [::1",
    "Host: \xff",
    "Origin: http://evil.example",
    "Origin: null",
    "Origin: \xe9://[",
    "Content-Length: " + "9" * 5000,
    "Content-Length: 00000000000000000000000000000005",
    "Content-Length: -1",
    "Content-Length: 1e3",
    "Content-Length: \u00b2",
    "Content-Type: text/plain",
    "Content-Type: application/json; charset=\xff",
    "Content-Type: ;;;",
    "Transfer-Encoding: chunked",
    "Transfer-Encoding: gzip, chunked",
    "Transfer-Encoding: identity",
    "Expect: 100-continue",
    "Connection: upgrade",
    "Upgrade: websocket",
    "X: " + "x" * 70_000,
    ": empty",
    "no colon",
    " folded",
)
PATHS = ("/", "/v1/models", "/v1/models/tiny", "/health", "/v1/chat/completions", "//", "/%00%ff")
PATHS += ("*", "http://evil.example/", "/v1/models/" + "x" * 5000, "/../../etc/passwd", "/\u00e9")
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "CONNECT", "TRACE", "get", "G\u00c9T")
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA")

TARGET: served.Target | None = None  # the server that is asked; None: `target` starts one


@cache
def target() -> served.Target:
    """Return the server that all cases talk to."""
    if TARGET is not None:
        return TARGET
    stack = contextlib.ExitStack()
    atexit.register(stack.close)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    model = served.write(folder / "tiny")
    return stack.enter_context(served.serving(model, folder / "log"))


# -- what is sent ----------------------------------------------------------------------------------


def good_request(rng: random.Random) -> dict:
    """Return a request that is right, with a picture or two, or none."""
    content = [{"type": "text", "text": "How many?"}]
    for _ in range(rng.randrange(3)):
        content.insert(0, picture(make_picture(rng, "PNG")))
    messages = [{"role": "user", "content": content}]
    if rng.random() < 0.3:
        messages.insert(0, {"role": "system", "content": "Be brief."})
    return {
        "model": "tiny",
        "messages": messages,
        "max_tokens": 2,
        "temperature": rng.choice((0, 0.7)),
        "top_p": 0.9,
        "top_k": 5,
        "seed": 1,
        "stop": ["x"],
        "stream": rng.random() < 0.5,
        "stream_options": {"include_usage": True},
        "n": 1,
    }


def make_picture(rng: random.Random, form: str) -> bytes:
    """Return the bytes of a picture file."""
    size = rng.choice(((60, 40), (1, 1), (100, 100), (101, 100), (1, 500), (1, 9999), (500, 3)))
    file = io.BytesIO()
    mode = "RGB"
    if form == "GIF":
        mode = "P"
    Image.new(mode, size).save(file, form)
    return file.getvalue()


def picture(data: bytes, kind: str = "image/png") -> dict:
    """Return the part of a message that shows a picture."""
    url = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def request_bytes(body: bytes, headers=HEADERS, line: str = "POST /v1/chat/completions") -> bytes:
    """Return a request with the right length."""
    lines = [f"{line} HTTP/1.1", *headers, f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace") + body


def encode(request) -> bytes:
    """Return a request's JSON; half surrogate pairs become escapes."""
    return json.dumps(request).encode()


def spoil_fields(rng: random.Random) -> tuple[bytes, str]:
    """Change values of the JSON."""
    request = good_request(rng)
    said = []
    for _ in range(rng.choice((1, 1, 2))):
        request, what = fuzz.mutate(request, rng)
        said.append(what)
    return request_bytes(encode(request)), ", ".join(said)


def spoil_json(rng: random.Random) -> tuple[bytes, str]:
    """Change the bytes of the JSON."""
    if rng.random() < 0.3:
        body, what = fuzz.odd_json(rng)
    else:
        body, what = fuzz.mutate_bytes(encode(good_request(rng)), rng)
    return request_bytes(body), what


def spoil_headers(rng: random.Random) -> tuple[bytes, str]:
    """Add, remove and double headers."""
    headers = list(HEADERS)
    odd = rng.choice(ODD_HEADERS)
    way = rng.choice(("add", "replace", "remove", "double"))
    if way == "add":
        headers.insert(rng.randrange(len(headers) + 1), odd)
    elif way == "replace":
        headers[rng.randrange(len(headers))] = odd
    elif way == "remove":
        headers.pop(rng.randrange(len(headers)))
    else:
        headers.append(rng.choice(headers))
    return request_bytes(encode(good_request(rng)), headers), f"{way} {odd[:40]}"


def spoil_bytes(rng: random.Random) -> tuple[bytes, str]:
    """Change the bytes of the whole request."""
    return fuzz.mutate_bytes(request_bytes(encode(good_request(rng))), rng)


def spoil_chunks(rng: random.Random) -> tuple[bytes, str]:
    """Send a body in chunks, and change their bytes."""
    body = encode(good_request(rng))
    chunks = b""
    while body:
        size = rng.choice((1, 7, 100, 5000))
        piece, body = body[:size], body[size:]
        chunks += b"%x\r\n%s\r\n" % (len(piece), piece)
    chunks += b"0\r\n\r\n"
    what = "whole"
    if rng.random() < 0.8:
        chunks, what = fuzz.mutate_bytes(chunks, rng)
    head = "\r\n".join(
        ["POST /v1/chat/completions HTTP/1.1", *HEADERS, "Transfer-Encoding: chunked", "", ""]
    )
    return head.encode() + chunks, what


def spoil_picture(rng: random.Random) -> tuple[bytes, str]:
    """Show an odd or damaged picture, or name one by an odd URL."""
    form = rng.choice(FORMATS)
    data = make_picture(rng, form)
    what = "whole"
    if rng.random() < 0.7:
        data, what = fuzz.mutate_bytes(data, rng)
    part = picture(data, rng.choice(("image/png", "text/plain", "")))
    if rng.random() < 0.3:
        url, what = fuzz.mutate_bytes(part["image_url"]["url"].encode(), rng)
        part["image_url"]["url"] = url.decode("latin-1")
    request = good_request(rng)
    request["messages"][-1]["content"].insert(0, part)
    return request_bytes(encode(request)), f"{form} {what}"


def spoil_line(rng: random.Random) -> tuple[bytes, str]:
    """Ask for odd paths by odd methods."""
    line = f"{rng.choice(METHODS)} {rng.choice(PATHS)}"
    body = b""
    if rng.random() < 0.5:
        body = encode(good_request(rng))
    return request_bytes(body, line=line), line[:60]


def spoil_pipeline(rng: random.Random) -> tuple[bytes, str]:
    """Send several requests at once, one of them wrong."""
    parts = [request_bytes(encode(good_request(rng)), HEADERS[:2]) for _ in range(2)]
    wrong, what = rng.choice((spoil_fields, spoil_bytes, spoil_line))(rng)
    parts.insert(rng.randrange(3), wrong)
    return b"".join(parts), what


SPOILERS = (
    spoil_fields,
    spoil_fields,
    spoil_json,
    spoil_headers,
    spoil_bytes,
    spoil_chunks,
    spoil_picture,
    spoil_line,
    spoil_pipeline,
)


# -- what must hold --------------------------------------------------------------------------------


def send(data: bytes, pieces: int, breaks_off: bool) -> bytes:
    """Send bytes in so many pieces, and return what comes back.

    breaks_off: reset the connection when all has been sent. Otherwise close the own side when
    nothing comes for a while, and read until the server closes.
    """
    host, port = target().url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as client:
        step = max(1, -(-len(data) // pieces))
        received = b""
        with contextlib.suppress(ConnectionError):
            for start in range(0, len(data), step):
                client.sendall(data[start : start + step])
                if pieces > 1:
                    time.sleep(0.02)
        if breaks_off:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return b""

        closed = False
        while True:
            try:
                piece = client.recv(65536)
            except TimeoutError:
                if closed:
                    raise Violation("the connection stays open, and nothing comes") from None
                client.shutdown(socket.SHUT_WR)
                client.settimeout(10)
                closed = True
                continue
            except ConnectionResetError:
                # It has said that the connection ends, and was sent more. The reply was there.
                if not received:
                    raise
                return received
            if not piece:
                return received
            received += piece


def ask(data: bytes, pieces: int, breaks_off: bool):
    """Send bytes to the server. Raises Violation."""
    server = target()
    log_before = server.log.stat().st_size
    try:
        received = send(data, pieces, breaks_off)
    except ConnectionError as e:
        raise Violation(f"no reply: {e}") from None

    statuses = [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+) ", received)]
    if not statuses and not breaks_off and data.strip():
        raise Violation("no reply")
    if any(status >= 500 for status in statuses) or b"server_error" in received:
        raise Violation(f"{statuses}: {received[-500:]!r}")

    # The server lives, answers, says nothing of a fault, and keeps its memory.
    good = request_bytes(encode({"model": "tiny", "max_tokens": 1, "messages": HELLO}))
    reply = send(good, 1, False)
    if not reply.startswith(b"HTTP/1.1 200 "):
        raise Violation(f"a good request after it: {reply[:500]!r}")
    log = server.log.read_bytes()[log_before:]
    if b"Traceback" in log:
        raise Violation(log.decode(errors="replace"))
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    if int(status.split("VmRSS:")[1].split()[0]) > MOST_MEMORY * 1024:
        raise Violation("the server has taken too much memory")


HELLO = [{"role": "user", "content": "Hello"}]


def case(rng: random.Random, folder: Path) -> Case:
    """Return the case of a random generator."""
    target()  # started here, since each case runs in a process of its own
    spoil = rng.choice(SPOILERS)
    data, what = spoil(rng)
    pieces = rng.choice((1, 1, 1, 5))
    breaks_off = rng.random() < 0.1
    kind = spoil.__name__.removeprefix("spoil_")
    if breaks_off:
        kind += ", broken off"
    return Case(kind, what, partial(ask, data, pieces, breaks_off))


if __name__ == "__main__":
    # The server is up before the first case.
    with urllib.request.urlopen(f"{target().url}/health"):
        fuzz.main(case, __doc__)
