"""serve.py as its users meet it: over HTTP, with OpenAI's client, and as a page in a browser."""

import asyncio
import base64
import http.client
import io
import json
import shutil
import socket
import struct
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from PIL import Image

import command_line
import serve
from inference import connections, job_queue
from inference.answer import answer as answer_of
from inference.asgi import Held, Names
from inference.engine import Engine
from inference.job_queue import JobQueue, Limits
from inputs.templates import encode_prompt
from inputs.tokenizer import load_tokenizer
from model import LLaVA
from tests.tools import fuzz, served
from tests.tools.environment import ROOT, run
from tests.tools.fuzz import server as server_fuzz
from tests.tools.served import LIMITS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return served.write(tmp_path_factory.mktemp("serve") / "tiny")


@pytest.fixture(scope="module")
def jobs(folder):
    return JobQueue(LLaVA.from_pretrained(folder), load_tokenizer(folder), "tiny", LIMITS)


def listen(jobs, allow_urls=False, page=None):
    server = serve.api(jobs, "127.0.0.1", 0, allow_urls, page=page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}"


@pytest.fixture(scope="module")
def url(jobs):
    server, url = listen(jobs)
    yield url
    server.stop()


def png(colour=(200, 30, 30), size=(60, 40), form="PNG"):
    Image.new("RGB", size, colour).save(file := io.BytesIO(), form)
    return file.getvalue()


def at(url):
    return {"type": "image_url", "image_url": {"url": url}}


def shown(data):
    return at(f"data:image/png;base64,{base64.b64encode(data).decode()}")


def question(text="How many?", *pictures, **more):
    content = [*pictures, {"type": "text", "text": text}] if pictures else text
    return {
        "model": "tiny",
        "temperature": 0,
        "max_tokens": 12,
        "messages": [{"role": "user", "content": content}],
    } | more


def post(url, body, path="/v1/chat/completions", **headers):
    """(status, JSON or, for a stream, the list of its events)."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(
        url + path, data, {"Content-Type": "application/json"} | headers
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            text = reply.read().decode()
            if reply.headers["Content-Type"] == "text/event-stream":
                return reply.status, [
                    line.removeprefix("data: ") for line in text.split("\n\n") if line
                ]
            return reply.status, json.loads(text)
    except urllib.error.HTTPError as e:
        return e.code, json.loads(e.read())["error"]


def job(jobs, text):
    turns = [{"from": "human", "value": text}]
    return jobs.job(turns, [], stop=[], temperature=0.0, top_p=1.0, top_k=0, seed=None)


def said(jobs, job) -> str:
    """The whole answer to a job."""

    async def listen():
        async with jobs.seat() as seat:
            return "".join([piece async for piece in jobs.answer(job, seat)])

    # In a thread of its own: playwright has a loop in this one.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, listen()).result()


def until(true, seconds=20):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def answer(url, body):
    status, reply = post(url, body)
    assert status == 200, reply
    return reply["choices"][0]["message"]["content"]


def expected(jobs, text, *pictures, new=12):
    pixels = [jobs.picture(p) for p in pictures]
    return answer_of(jobs.model, jobs.tokenizer, [text], [pixels], max_new_tokens=new)[0]


def test_answers_are_those_of_generate(jobs, url):
    red, blue = png(), png((30, 30, 200))
    for pictures in ((), (red,), (blue,), (red, blue)):
        got = answer(url, question("How many?", *map(shown, pictures)))
        assert got.strip() == expected(jobs, "How many?", *pictures) != ""
    assert expected(jobs, "How many?", red) != expected(jobs, "How many?", blue)


def test_a_conversation_is_the_prompt_of_all_its_turns(jobs, url):
    talk = [
        {"role": "system", "content": "Be brief."},
        *question("What?", shown(png()))["messages"],
    ]
    talk += [{"role": "assistant", "content": "red"}, {"role": "user", "content": "Sure?"}]
    seen = []
    turns, pictures = serve.read_messages(talk, lambda url, count: seen.append(url), 2)
    assert [t["from"] for t in turns] == ["system", "human", "gpt", "human"] and len(
        pictures
    ) == len(seen) == 1
    assert turns[1]["value"] == "<image>\nWhat?" and turns[3]["value"] == "Sure?"
    assert answer(url, question() | {"messages": talk}) != answer(
        url, question() | {"messages": talk[3:]}
    )


def test_a_stream_is_the_answer_in_pieces(url):
    body = question("How many?", shown(png()), stream=True, stream_options={"include_usage": True})
    status, events = post(url, body)
    assert status == 200 and events[-1] == "[DONE]"
    *chunks, last = map(json.loads, events[:-1])
    deltas = [c["choices"][0]["delta"] for c in chunks]
    assert deltas[0]["role"] == "assistant" and deltas[-1] == {} and len(deltas) > 4
    whole = post(url, question("How many?", shown(png())))[1]
    assert (
        "".join(d.get("content", "") for d in deltas) == whole["choices"][0]["message"]["content"]
    )
    assert (
        chunks[-1]["choices"][0]["finish_reason"]
        == whole["choices"][0]["finish_reason"]
        == "length"
    )
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert all("usage" not in c and c["id"] == last["id"] for c in chunks)


def test_usage_counts_every_position(jobs, url):
    usage = post(url, question("How many?", shown(png()), shown(png()), max_tokens=5))[1]["usage"]
    plain = post(url, question("How many?", max_tokens=5))[1]["usage"]
    ids = encode_prompt(
        [{"from": "human", "value": "<image>\n<image>\nHow many?"}], jobs.tokenizer, "plain"
    )
    each = jobs.model.encode_images(torch.zeros(1, 3, 48, 48)).size(1)
    assert usage["prompt_tokens"] == len(ids) - 2 + 2 * each > plain["prompt_tokens"] + 2 * each
    assert usage["completion_tokens"] == 5 and usage["total_tokens"] == usage["prompt_tokens"] + 5


def test_stop_strings_end_the_answer_and_are_never_shown(url):
    whole = answer(url, question())
    stop = whole[4:6]
    status, reply = post(url, question(stop=["never to be seen", stop]))
    choice = reply["choices"][0]
    assert (
        choice["message"]["content"] == whole[: whole.index(stop)]
        and choice["finish_reason"] == "stop"
    )
    events = post(url, question(stop=stop, stream=True))[1]
    text = "".join(json.loads(e)["choices"][0]["delta"].get("content", "") for e in events[:-1])
    assert text == whole[: whole.index(stop)]
    assert (
        answer(url, question(stop=whole[-1] + "never")) == whole
    )  # a beginning that was held back comes out


@pytest.mark.parametrize(
    "text, stop, said",
    [
        ("I say stop, now", "stop", "I say "),
        ("I say sto", "stop", "I say sto"),
        ("a to b", "b", "a to "),
        ("stool stop", "stop", "stool "),
    ],
)
def test_a_stop_string_that_comes_in_pieces_is_never_shown(
    jobs, url, monkeypatch, text, stop, said
):
    ids = [i for letter in text for i in jobs.tokenizer.encode(letter)[0]]
    assert len(ids) == len(text)
    monkeypatch.setattr(
        jobs.model, "generate", lambda prompt, stream, **options: [stream([i]) for i in ids]
    )
    deltas = [
        json.loads(e)["choices"][0]["delta"]
        for e in post(url, question(stop=stop, stream=True))[1][:-1]
    ]
    assert "".join(d.get("content", "") for d in deltas) == said == answer(url, question(stop=stop))


def test_sampling_is_decided_by_the_seed(url):
    ask = lambda **more: answer(url, question(max_tokens=20, **({"temperature": 2} | more)))  # noqa: E731
    assert ask(seed=1) == ask(seed=1) != ask(seed=2)
    assert ask(seed=1, top_p=0) == ask(temperature=0) != ask(seed=1)
    ask(seed=1)
    first = ask()
    ask(seed=1)
    assert ask() != first  # no seed: not what an earlier one left behind


def test_max_tokens_ends_it_by_length(url):
    for field in ("max_tokens", "max_completion_tokens"):
        reply = post(url, question(max_tokens=None) | {field: 3})[1]
        assert (
            reply["usage"]["completion_tokens"] == 3
            and reply["choices"][0]["finish_reason"] == "length"
        )
    assert post(url, question(max_tokens=None))[1]["usage"]["completion_tokens"] <= LIMITS.tokens


def test_an_end_token_ends_it(jobs, url, monkeypatch):
    made = jobs.model.generate([torch.tensor(job(jobs, "How many?").ids)], max_new_tokens=12)[
        0
    ].tolist()
    monkeypatch.setattr(jobs, "eos", made[5])
    reply = post(url, question())[1]
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["usage"]["completion_tokens"] == made.index(made[5])


def test_models(url):
    listed = json.load(urllib.request.urlopen(f"{url}/v1/models"))
    one = json.load(urllib.request.urlopen(f"{url}/v1/models/tiny"))
    assert listed["data"] == [one] and one["id"] == "tiny" and one["object"] == "model"
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{url}/v1/models/other")


def said_by(role, content):
    """A request with one message."""
    return question() | {"messages": [{"role": role, "content": content}]}


BIG = png(size=(101, 100))
BAD = [
    (question() | {"messages": []}, 400, "messages must be a list"),
    (question() | {"messages": "hello"}, 400, "messages must be a list"),
    (said_by("tool", "x"), 400, "its role must be one of"),
    (said_by("user", [{"type": "audio"}]), 400, "its content must be text"),
    (said_by("user", None), 400, "its content must be text"),
    (said_by("assistant", "x"), 400, "wrong last turn"),
    (said_by("assistant", [shown(png())]), 400, "only the user shows"),
    (question("What is <image>?"), 400, "without <image>"),
    (question(model="gpt-4"), 404, "'tiny' is served"),
    (question(n=2), 400, "n: 2 is not supported"),
    (question(tools=[{"type": "function"}]), 400, "tools: "),
    (question(colour="red"), 400, "colour: 'red' is not supported"),
    (question(temperature=3), 400, "temperature: 3 is not a number from 0 to 2"),
    (question(temperature=float("nan")), 400, "temperature: nan is not"),
    (question(top_p="1"), 400, "top_p: '1' is not"),
    (question(seed=1.5), 400, "seed: 1.5 is not"),
    (question(max_tokens=0), 400, "max_tokens: 0 is not a whole number from 1 to 40"),
    (question(max_tokens=41), 400, "max_tokens: 41 is not a whole number from 1 to 40"),
    (question(stop=["a"] * 5), 400, "stop: a string, or up to four"),
    (question(stop=""), 200, ""),
    (question(n=1, user="me", tools=[], frequency_penalty=0.0), 200, ""),
    (question("x" * 2000), 400, "the context is 200"),
    (question("What?", *[shown(png())] * 3), 400, "3 pictures, at most 2"),
    (question("What?", shown(b"not a picture")), 400, "the picture cannot be read: none of PNG"),
    (question("What?", shown(png(form="TIFF"))), 400, "the picture cannot be read: none of PNG"),
    (question("What?", shown(png()[:60])), 400, "the picture cannot be read: truncated"),
    (question("What?", shown(BIG)), 400, "101 x 100 pixels, at most 10,000"),
    (question("What?", at("data:image/png;base64,&&")), 400, "the data URL is"),
    (question("What?", at("file:///etc/passwd")), 400, "pictures are taken as"),
    (question("What?", at("/etc/passwd")), 400, "pictures are taken as"),
    (question("What?", at("http://127.0.0.1/x.png")), 400, "without --allow-urls"),
    (said_by(["user"], "x"), 400, "its role must be one of"),
    (said_by({"role": "user"}, "x"), 400, "its role must be one of"),
    (said_by(None, "x"), 400, "its role must be one of"),
    (said_by("user", 5), 400, "its content must be text"),
    (said_by("user", {"type": "text", "text": "x"}), 400, "its content must be text"),
    (said_by("user", [[]]), 400, "its content must be text"),
    (said_by("user", [{"type": ["text"], "text": "x"}]), 400, "its content must be text"),
    (said_by("user", [{"type": "text", "text": ["x"]}]), 400, "its content must be text"),
    (said_by("user", [{"type": "image_url", "image_url": "x"}]), 400, "its content must be text"),
    (question("half a pair: \ud83d"), 400, "its content must be text"),
    (question(stop="\ud83d"), 400, "stop: a string, or up to four"),
    (question(stop=[5]), 400, "stop: a string, or up to four"),
    (question("What?", at("data:image/png;base64,é")), 400, "the data URL is"),
    (question("What?", at("data:image/png;base64,\ud83d")), 400, "the data URL is"),
    (question("What?", at("data:" + "\ud83d" * 9)), 400, "the data URL is"),
    (question("What?", at("\ud83d")), 400, "pictures are taken as"),
    (question(model=["tiny"]), 404, "'tiny' is served"),
    (question(model="\ud83d" * 5000), 404, "'tiny' is served"),
    (question(stream="yes"), 400, "stream: 'yes' is not true or false"),
    (question(stream_options=5), 400, "stream_options: 5 is not an object"),
    (question(stream_options={"include_usage": 1}), 400, "include_usage: 1 is not true or false"),
    (question(temperature=True), 400, "temperature: True is not a number"),
    (question(temperature=10**400), 400, "is not a number from 0 to 2"),
    (question(max_tokens=None, max_completion_tokens=0), 400, "max_completion_tokens: 0 is not"),
    (question(seed=2**63), 400, "seed: 9223372036854775808 is not"),
    (question(top_k=-2), 400, "top_k: -2 is not"),
    (question(top_k="5"), 400, "top_k: '5' is not"),
    (question(best_of=3), 400, "best_of: 3 is not supported"),
    (question(logprobs=True), 400, "logprobs: True is not supported"),
    (question(min_p=0.5), 400, "min_p: 0.5 is not supported"),
    (question(parallel_tool_calls=False, service_tier="auto"), 200, ""),
    (question() | {"messages": question()["messages"] * 300}, 400, "the context is 200"),
    (b'{"a": ' + b"9" * 5000 + b"}", 400, "the body is not JSON"),
    (b'{"a": "\xff"}', 400, "the body is not JSON"),
    (b"\x00", 400, "the body is not JSON"),
    (b"", 400, "the body is not JSON"),
    (b"5", 400, "not a JSON object"),
    (b"{not json", 400, "the body is not JSON"),
    (b"[" * 50_000, 400, "the body is not JSON"),
    (b"[]", 400, "not a JSON object"),
    (question("x" * 200_000), 413, "at most 100000 are taken"),
]  # fmt: skip


@pytest.mark.parametrize("body, status, what", BAD, ids=range(len(BAD)))
def test_a_wrong_request_is_told_what_is_wrong(url, body, status, what):
    got, reply = post(url, body)
    assert got == status, reply
    if status != 200:
        assert (
            what in reply["message"]
            and reply["type"] == "invalid_request_error"
            and "param" in reply
        )


def test_only_json_from_a_known_length_is_read(url):
    assert post(url, question(), **{"Content-Type": "text/plain"})[0] == 415
    assert post(url, question(), path="/v1/other")[0] == 404


def test_urls_are_fetched_only_where_allowed(jobs):
    files = {"/red.png": png(), "/large.png": b"x" * 100_001}

    class Files(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path in files else 404)
            self.end_headers()
            self.wfile.write(files.get(self.path, b""))

        def log_message(self, *args):
            pass

    host = HTTPServer(("127.0.0.1", 0), Files)
    threading.Thread(target=host.serve_forever, daemon=True).start()
    server, url = listen(jobs, allow_urls=True)
    there = f"http://127.0.0.1:{host.server_port}/"
    assert answer(url, question("How many?", at(f"{there}red.png"))).strip() == expected(
        jobs, "How many?", png()
    )
    assert (
        "has over 100000 bytes"
        in post(url, question("How many?", at(f"{there}large.png")))[1]["message"]
    )
    assert (
        "cannot be fetched"
        in post(url, question("How many?", at(f"{there}none.png")))[1]["message"]
    )
    assert (
        "pictures are taken as"
        in post(url, question("How many?", at("file:///etc/passwd")))[1]["message"]
    )
    server.stop()
    host.shutdown()


class Slow:
    """In the place of a model's generate: waits for a signal, then answers as the model."""

    def __init__(self, model, monkeypatch):
        self.go, self.started, self.order, real = (
            threading.Event(),
            threading.Semaphore(0),
            [],
            model.generate,
        )

        def generate(ids, **options):
            self.order.append(len(ids[0]))
            self.started.release()
            assert self.go.wait(30)
            return real(ids, **options)

        monkeypatch.setattr(model, "generate", generate)


def test_a_full_queue_refuses_and_the_others_are_answered_in_order(jobs, url, monkeypatch):
    slow, got = Slow(jobs.model, monkeypatch), []
    texts = ["x" * n for n in (3, 90, 30)]
    threads = [
        threading.Thread(target=lambda t=t: got.append(post(url, question(t))[0])) for t in texts
    ]
    for i, thread in enumerate(threads):
        thread.start()
        if i == 0:
            assert slow.started.acquire(timeout=30)
        until(lambda i=i: len(jobs.waiting) == i)
    status, reply = post(url, question())
    assert (
        status == 429
        and reply["type"] == "rate_limit_error"
        and "2 requests are waiting" in reply["message"]
    )
    slow.go.set()
    for thread in threads:
        thread.join(30)
    assert got == [200] * 3 and post(url, question())[0] == 200
    lengths = [len(jobs.tokenizer.encode(t)[0]) for t in texts]
    assert [n - slow.order[0] for n in slow.order[:3]] == [n - lengths[0] for n in lengths]


def test_a_reader_that_leaves_stops_the_model(jobs, monkeypatch):
    left, real, read = job(jobs, "Hello"), jobs.model.generate, threading.Event()
    monkeypatch.setattr(jobs, "eos", None)  # no answer ends before the limit

    def generate(ids, stream, **options):
        # Slowly until the reader has left: its first piece may be of several tokens, since bytes
        # that are no character yet are kept back.
        real(ids, stream=lambda step: (stream(step), read.wait(0.5)), **options)

    monkeypatch.setattr(jobs.model, "generate", generate)

    async def read_one():
        async with jobs.seat() as seat:
            pieces = jobs.answer(left, seat)
            await anext(pieces)
            await pieces.aclose()

    asyncio.run(read_one())
    read.set()
    after = job(jobs, "Hello")
    assert said(jobs, after) and len(after.made) == LIMITS.tokens
    assert len(left.made) < LIMITS.tokens / 2


def test_a_failure_of_the_model_is_a_500_and_the_next_is_answered(jobs, url, monkeypatch, capfd):
    def broken(*args, **options):
        raise RuntimeError("secret path /a/b")

    with monkeypatch.context() as m:
        m.setattr(jobs.model, "generate", broken)
        status, reply = post(url, question())
        assert (
            status == 500 and reply["type"] == "server_error" and "secret" not in reply["message"]
        )
        events = post(url, question(stream=True))[1]
        assert json.loads(events[-2])["error"]["type"] == "server_error" and events[-1] == "[DONE]"
    assert "secret path" in capfd.readouterr().err
    assert post(url, question())[0] == 200


def test_openais_client(jobs, url):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    assert [m.id for m in client.models.list()] == ["tiny"] and client.models.retrieve(
        "tiny"
    ).id == "tiny"
    ask = question("How many?", shown(png()))
    whole = client.chat.completions.create(**ask)
    text = whole.choices[0].message.content
    assert (
        text.strip() == expected(jobs, "How many?", png()) and whole.usage.completion_tokens == 12
    )
    stream = client.chat.completions.create(
        **ask, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == text
    assert chunks[-1].usage == whole.usage
    with pytest.raises(openai.BadRequestError, match="none of PNG"):
        client.chat.completions.create(**question("How many?", shown(b"nothing")))
    with pytest.raises(openai.NotFoundError, match="is served"):
        client.chat.completions.create(**question(model="gpt-4"))
    with pytest.raises(openai.APIStatusError, match="at most 100000 are taken") as e:
        client.chat.completions.create(**question("x" * 200_000))
    assert e.value.status_code == 413


# -- clients that are slow, many, gone or foreign --------------------------------------------------


def raw(url, data, wait=20, half_close=False) -> bytes:
    """What a server sends to a client that writes these bytes, until it closes."""
    with socket.create_connection(address_of(url), timeout=wait) as client:
        client.sendall(data)
        if half_close:
            client.shutdown(socket.SHUT_WR)
        received = b""
        while piece := client.recv(65536):
            received += piece
        return received


def address_of(url):
    host, port = url.removeprefix("http://").split(":")
    return host, int(port)


def head(
    length, *more, path="/v1/chat/completions", method="POST", version="1.1", host="localhost"
):
    lines = [f"{method} {path} HTTP/{version}", f"Host: {host}", f"Content-Length: {length}"]
    lines += ["Content-Type: application/json", *more]
    return "\r\n".join([*lines, "", ""]).encode()


def asked(body, *more, **request) -> bytes:
    """A whole request as bytes."""
    data = json.dumps(body).encode()
    return head(len(data), *more, **request) + data


def statuses(received: bytes) -> list[int]:
    return [int(part.split(b" ")[0]) for part in received.split(b"HTTP/1.1 ")[1:]]


CLOSE = "Connection: close"


def test_fifty_slow_bodies_keep_no_good_client_out(url):
    slow = [socket.create_connection(address_of(url)) for _ in range(50)]
    try:
        for client in slow:
            client.sendall(head(1000) + b"{")
        assert [post(url, question())[0] for _ in range(3)] == [200] * 3
        for client in slow:
            client.sendall(b" ")
        assert post(url, question(stream=True))[0] == 200
    finally:
        for client in slow:
            client.close()


def test_many_clients_that_keep_their_connections_are_all_answered(folder):
    """200 requests from 40 threads wait for their turn, and none of them is refused."""
    limits = Limits(**{**vars(LIMITS), "wait": 60})
    jobs = JobQueue(LLaVA.from_pretrained(folder), load_tokenizer(folder), "tiny", limits)
    server, url = listen(jobs)
    body = json.dumps(question("How many?", shown(png()), max_tokens=4))

    def ask_five(_):
        connection = http.client.HTTPConnection(*address_of(url), timeout=60)
        got = []
        for _ in range(5):
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/chat/completions", body, headers)
            reply = connection.getresponse()
            got.append((reply.status, reply.read()))
        connection.close()
        return got

    with ThreadPoolExecutor(40) as threads:
        replies = sum(threads.map(ask_five, range(40)), [])
    server.stop()
    assert [status for status, _ in replies] == [200] * 200
    texts = {json.loads(data)["choices"][0]["message"]["content"] for _, data in replies}
    assert len(texts) == 1


def test_a_connection_lives_on_after_a_429(jobs, url, monkeypatch):
    slow = Slow(jobs.model, monkeypatch)
    texts = ["x" * n for n in (3, 90, 30)]
    threads = [threading.Thread(target=post, args=(url, question(t))) for t in texts]
    for i, thread in enumerate(threads):
        thread.start()
        if i == 0:
            # Only then the other two are those that wait.
            assert slow.started.acquire(timeout=30)
    until(lambda: len(jobs.waiting) == 2)

    body = json.dumps(question())
    connection = http.client.HTTPConnection(*address_of(url), timeout=30)
    seen = []
    for _ in range(3):
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", body, headers)
        reply = connection.getresponse()
        seen.append(reply.status)
        assert reply.status == 200 or int(reply.headers["Retry-After"]) > 0
        reply.read()
        slow.go.set()
        for thread in threads:
            thread.join(30)
    connection.close()
    assert seen == [429, 200, 200]


def test_clients_that_leave_free_their_places(jobs, url, monkeypatch):
    slow = Slow(jobs.model, monkeypatch)
    clients = []
    for _ in range(3 + 4):  # one is answered, two have seats, the others wait to be read
        client = socket.create_connection(address_of(url))
        client.sendall(asked(question()))
        clients.append(client)
    until(lambda: len(jobs.waiting) == 2 and len(jobs.line) == 4)
    for client in clients:
        client.close()
    until(lambda: not jobs.waiting and not jobs.line)
    slow.go.set()
    assert post(url, question())[0] == 200
    assert len(slow.order) == 2  # the model has seen none of those that waited


def test_a_slow_reader_has_no_seat_when_the_model_is_done(jobs):
    slow = job(jobs, "Hello")

    async def read_slowly():
        async with jobs.seat() as seat:
            pieces = jobs.answer(slow, seat)
            first = await anext(pieces)
            while seat.taken:
                await asyncio.sleep(0.01)
            assert jobs.free._value == 1 + LIMITS.queue
            return first + "".join([piece async for piece in pieces])

    assert asyncio.run(read_slowly()) == said(jobs, job(jobs, "Hello"))
    assert jobs.free._value == 1 + LIMITS.queue


@pytest.fixture
def short(jobs, monkeypatch):
    """A server that gives a request half a second to arrive."""
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 0.5)
    server, url = listen(jobs)
    yield url
    server.stop()


@pytest.mark.parametrize(
    "begin, status",
    [(b"", []), (b"GET /health HTTP/1.1\r\nHost: local", []), (head(1000), [408])],
    ids=("nothing", "head", "body"),
)
def test_a_byte_now_and_then_does_not_make_more_time(short, begin, status):
    with socket.create_connection(address_of(short), timeout=20) as client:
        client.sendall(begin)
        received = b""
        stop = threading.Event()

        def drip():
            while begin and not stop.wait(0.1):
                try:
                    client.sendall(b"x")
                except OSError:
                    return

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            while piece := client.recv(65536):
                received += piece
        except ConnectionResetError:  # what was dripped meets a closed connection
            pass
        stop.set()
        thread.join()
    assert statuses(received) == status


def test_the_body_that_has_come_for_longest_gives_way_to_others(jobs):
    server, url = listen(jobs)
    server.config.app.held = Held(60_000)
    with socket.create_connection(address_of(url), timeout=20) as slow:
        slow.sendall(head(50_000) + b" " * 49_000)
        until(lambda: server.config.app.held.bytes == 49_000)
        status, reply = post(url, json.dumps(question()).encode() + b" " * 20_000)
        assert status == 200
        # Its memory is free at once, and its reply comes when it has been sent.
        until(lambda: server.config.app.held.bytes == 0)
        slow.sendall(b" " * 1000)
        assert statuses(slow.recv(65536)) == [429]
    server.stop()


@pytest.mark.parametrize(
    "host, bound, others, answered",
    [
        ("localhost", "127.0.0.1", (), True),
        ("LOCALHOST:8000", "127.0.0.1", (), True),
        ("127.0.0.1:8000", "127.0.0.1", (), True),
        ("[::1]:8000", "::1", (), True),
        ("[::1]", "127.0.0.1", (), True),
        ("box.lan:8000", "box.lan", (), True),
        ("demo.example.org", "0.0.0.0", ("demo.example.org",), True),
        ("192.168.1.7:8000", "0.0.0.0", (), True),
        ("10.0.0.5", "10.0.0.5", (), True),
        ("", "127.0.0.1", (), False),
        ("evil.example", "127.0.0.1", (), False),
        ("evil.example", "0.0.0.0", (), False),
        ("localhost.evil.example", "127.0.0.1", (), False),
        ("evil.example:80@localhost", "127.0.0.1", (), False),
        ("localhost/evil.example", "127.0.0.1", (), False),
        ("127.0.0.1.evil.example", "0.0.0.0", (), False),
        ("192.168.1.7", "127.0.0.1", (), False),
        ("localhost:port", "127.0.0.1", (), False),
        ("[::1", "127.0.0.1", (), False),
    ],
)
def test_which_hosts_are_answered(host, bound, others, answered):
    assert Names(bound, others).answers_to(host, "127.0.0.1") is answered


FOREIGN = [
    {"Host": "evil.example"},
    {"Host": "evil.example:8000"},
    {"Host": "localhost.evil.example"},
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://localhost:1"},
    {"Origin": "https://127.0.0.1"},
    {"Host": "evil.example", "Origin": "http://evil.example"},
]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_foreign_hosts_and_pages_are_refused(url, headers):
    status, reply = post(url, question(), **headers)
    assert status == 403 and reply["code"] in ("unknown_host", "foreign_origin")
    assert post(url, {}, path="/v1/other", **headers)[0] == 403
    for path in ("/v1/models", "/health", "/"):
        request = urllib.request.Request(url + path, headers=headers)
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(request)


def test_own_hosts_and_pages_are_answered(url):
    port = url.split(":")[2]
    for host in ("localhost", "127.0.0.1", "[::1]", f"localhost:{port}"):
        for origin in ({}, {"Origin": f"http://{host}"}, {"Origin": f"https://{host}"}):
            assert post(url, question(max_tokens=1), Host=host, **origin)[0] == 200
    # Behind a proxy that sends its own name, the browser's name must have been given.
    names = Names("127.0.0.1", ["demo.example.org"])
    assert names.is_own_origin("https://demo.example.org", "127.0.0.1:8000")
    assert not names.is_own_origin("http://localhost:3000", "127.0.0.1:8000")
    assert not Names("10.0.0.5").is_own_origin("http://10.0.0.5:3000", "10.0.0.5:8000")


def test_ipv6(jobs):
    try:
        server = serve.api(jobs, "::1", 0)
    except OSError:
        pytest.skip("no IPv6 here")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    reply = urllib.request.urlopen(f"http://[::1]:{server.server_port}/health")
    assert json.load(reply) == {"status": "ok", "model": "tiny"}
    server.stop()


CHUNKED = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
CHUNKED += b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunks(data, size=50):
    pieces = [data[i : i + size] for i in range(0, len(data), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)


GOOD = json.dumps(question(max_tokens=2)).encode()
ONE = asked(question(max_tokens=2), CLOSE)
GET = head(0, CLOSE, path="/v1/models", method="GET")
RAW = {
    "a length of 5,000 digits": (head("9" * 5000), [400]),
    "a length of 30 digits": (head("9" * 30), [400]),
    "a length that is huge": (head("9" * 15, CLOSE), [413]),
    "a length that is no number": (head("x"), [400]),
    "a negative length": (head("-5"), [400]),
    "two lengths": (head(5, "Content-Length: 6"), [400]),
    "no host": (b"GET /v1/models HTTP/1.1\r\n\r\n", [400]),
    "two hosts": (head(0, "Host: evil.example"), [400]),
    "no request line": (b"\x16\x03\x01\x02\x00\r\n\r\n", [400]),
    "a bad version": (b"GET / HTTP/x.1\r\nHost: localhost\r\n\r\n", [400]),
    "a header without a colon": (b"GET / HTTP/1.1\r\nHost: localhost\r\nxyz\r\n\r\n", [400]),
    "a megabyte of headers": (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 2**20, [400]),
    "HEAD": (head(0, CLOSE, path="/v1/models", method="HEAD"), [200]),
    "OPTIONS": (head(0, CLOSE, path="/v1/models", method="OPTIONS"), [200]),
    "PUT": (asked(question(), CLOSE, method="PUT"), [405]),
    "DELETE": (head(0, CLOSE, path="/v1/models", method="DELETE"), [405]),
    "an odd method": (head(0, CLOSE, method="FOO"), [405]),
    "two in one": (asked(question(max_tokens=2)) + GET, [200, 200]),
    "three in one": (asked({}) + asked(question(max_tokens=2)) + ONE, [404, 200, 200]),
    "an unread body, and another": (asked(question(), path="/v1/other") + GET, [404, 200]),
    "a body with GET": (head(3, path="/health", method="GET") + b"abc" + GET, [200, 200]),
    "HTTP/1.0": (asked(question(max_tokens=2), version="1.0"), [200]),
    "chunks": (CHUNKED + chunks(GOOD) + b"0\r\n\r\n", [200]),
    "too many chunks": (CHUNKED + chunks(b" " * 200_000, 9999) + b"0\r\n\r\n", [413]),
    "a bad chunk": (CHUNKED + chunks(GOOD) + b"zz\r\n", [400]),
    "an upgrade": (head(0, CLOSE, "Upgrade: websocket", method="GET", path="/health"), [200]),
    "a path with bytes": (head(0, CLOSE, method="GET", path="/v1/%ff%00%0d%0a"), [404]),
    "a whole URL": (head(0, CLOSE, method="GET", path="http://evil.example/health"), [404]),
}


@pytest.mark.parametrize("what", RAW)
def test_odd_http_gets_a_reply(url, capfd, what):
    data, expected = RAW[what]
    gives_up = what == "a length that is huge"  # else it would have to send all that
    assert statuses(raw(url, data, half_close=gives_up)) == expected
    assert capfd.readouterr().err == ""
    assert post(url, question(max_tokens=1))[0] == 200


@pytest.mark.parametrize(
    "data, expected",
    [
        (head(0, path="/v1/models", method="GET"), [200]),
        (asked(question() | {"messages": []}), [400]),
        (head(1000) + GOOD[:50], [400]),
        (CHUNKED + chunks(GOOD[:50]), [400]),
        (b"GET /health HT", [400]),
        (b"", []),
    ],
    ids=range(6),
)
def test_a_client_that_closes_its_own_side_still_gets_a_reply(url, capfd, data, expected):
    assert statuses(raw(url, data, half_close=True)) == expected
    assert capfd.readouterr().err == ""


def test_head_has_no_body_and_options_says_what_there_is(url):
    received = raw(url, RAW["HEAD"][0])
    assert received.endswith(b"\r\n\r\n") and b"content-length: " in received
    assert b"allow: GET, HEAD, OPTIONS" in raw(url, RAW["OPTIONS"][0])
    assert b"allow: POST, OPTIONS" in raw(url, RAW["PUT"][0])


def test_health(url):
    reply = urllib.request.urlopen(f"{url}/health")
    assert json.load(reply) == {"status": "ok", "model": "tiny"}


def test_top_k_is_the_one_of_sampling(url):
    def ask(**more):
        return answer(url, question(max_tokens=20, seed=1, **({"temperature": 2} | more)))

    assert ask(top_k=1) == ask(temperature=0) != ask(top_k=50)
    assert ask(top_k=0) == ask(top_k=-1) == ask(top_k=None) == ask()


def test_requests_share_an_engine_and_what_it_has_read(jobs, url, monkeypatch):
    made, real = [], Engine.__init__
    monkeypatch.setattr(
        Engine, "__init__", lambda *args, **more: (made.append(1), real(*args, **more))[1]
    )
    assert not jobs.model.training
    answer(url, question())
    del made[:]
    long = "How many circles are there? " * 4
    whole = answer(url, question(long))
    assert answer(url, question(long)) == answer(url, question(long)) == whole

    # One that ends early, at a stop string, is no reason for a new one either.
    answer(url, question(long, stop=whole[2:4]))
    assert answer(url, question(long)) == whole and not made


@pytest.mark.parametrize(
    "gpu, options, device, dtype",
    [
        (False, (), "cpu", torch.float32),
        (True, (), "cuda", torch.bfloat16),
        (True, ("--dtype", "float32"), "cuda", torch.float32),
        (False, ("--dtype", "bfloat16"), "cpu", torch.bfloat16),
    ],
)
def test_a_gpu_computes_in_bfloat16(folder, monkeypatch, gpu, options, device, dtype):
    asked = []

    def load(*arguments):
        asked.append(arguments[1:])
        raise InterruptedError

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(LLaVA, "from_pretrained", load)
    with pytest.raises(InterruptedError):
        serve.main(["--model", str(folder), *options])
    assert asked == [(dtype, torch.device(device))]


def test_a_slow_server_of_pictures_is_waited_for_in_all_and_not_for_each_byte(jobs, monkeypatch):
    monkeypatch.setattr(job_queue, "FETCH_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as there:

        def drip():
            client, _ = there.accept()
            client.sendall(b"HTTP/1.1 200 OK\r\nX: ")
            try:
                for _ in range(300):
                    client.sendall(b"x")
                    time.sleep(0.1)
            except OSError:
                pass
            client.close()

        thread = threading.Thread(target=drip)
        thread.start()
        with pytest.raises(job_queue.Refused, match="cannot be fetched"):
            job_queue.fetch(f"http://127.0.0.1:{there.getsockname()[1]}/x.png", True, 1000)
        thread.join(10)  # the connection has been closed
        assert not thread.is_alive()


def test_a_redirect_leads_to_no_other_kind_of_url(tmp_path):
    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(302)
            self.send_header("Location", self.path[1:])
            self.end_headers()

        def log_message(self, *args):
            pass

    (tmp_path / "secret.png").write_bytes(png())
    host = HTTPServer(("127.0.0.1", 0), Elsewhere)
    threading.Thread(target=host.serve_forever, daemon=True).start()
    for there in (f"file://{tmp_path}/secret.png", "ftp://127.0.0.1:1/x.png", "data:,x"):
        with pytest.raises(job_queue.Refused, match="cannot be fetched"):
            job_queue.fetch(f"http://127.0.0.1:{host.server_port}/{there}", True, 10_000)
    host.shutdown()


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def command(folder):
    """`python serve.py` as a process."""
    with served.serving(folder, folder / "log") as target:
        yield target


def test_the_command(folder, command):
    url = command.url
    assert url.startswith("http://127.0.0.1:") and post(url, question())[0] == 200
    port = url.split(":")[2]
    taken = run("serve.py", "--model", folder, "--port", port, ok=False).stderr.strip()
    assert taken.startswith(f"error: {url}: ") and "; fix: give another --port" in taken


def test_memory_is_steady(command):
    url = command.url

    def memory():
        status = Path(f"/proc/{command.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) // 1024  # MiB

    def ask(n):
        picture = shown(png((n % 256, 30, 200), size=(100, 100)))
        assert post(url, question("How many?", picture, max_tokens=3))[0] == 200
        raw(url, head(1000, CLOSE) + GOOD[:50], half_close=True)

    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc here")
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(ask, range(20)))
        before = memory()
        list(threads.map(ask, range(60)))
    assert memory() - before < 40


@pytest.fixture
def fuzzed(command, monkeypatch):
    """Let the fuzzer talk to the server of this file."""
    monkeypatch.setattr(server_fuzz, "TARGET", command)
    server_fuzz.target.cache_clear()
    yield
    server_fuzz.target.cache_clear()


def test_wrong_requests_of_all_kinds_are_answered(fuzzed):
    assert fuzz.fuzz(server_fuzz.case, 20).violations == []


@pytest.mark.full
def test_six_hundred_wrong_requests_are_answered(fuzzed):
    result = fuzz.fuzz(server_fuzz.case, 600)
    print(fuzz.table(result))
    assert result.violations == []


def test_a_signal_ends_the_command_in_the_middle_of_an_answer(command):
    url = command.url
    with socket.create_connection(address_of(url), timeout=30) as client:
        client.sendall(asked(question(max_tokens=40, stream=True)))
        assert b"200 OK" in client.recv(65536)
        with socket.create_connection(address_of(url)) as idle:
            idle.sendall(head(100) + b"{")
            command.process.terminate()
            assert command.process.wait(30) == 0
    err = command.log.read_text()
    assert "Traceback" not in err and "error" not in err.lower()
    assert '"POST /v1/chat/completions HTTP/1.1" 200' in err


@pytest.mark.parametrize(
    "option, told",
    [
        (("--port", "99999"), "--port: '99999' is not a whole number from 0 to 65535"),
        (("--port", "x"), "--port: 'x' is not a whole number"),
        (("--max-queue", "-1"), "--max-queue: '-1' is not a whole number from 0"),
        (("--max-tokens", "0"), "--max-tokens: '0' is not a whole number from 1"),
        (("--host", ""), "--host: no address"),
        (("--host", "no.such.host.invalid"), "give another --port or --host"),
    ],
)
def test_a_wrong_option_is_one_line(folder, monkeypatch, option, told):
    monkeypatch.setattr(sys, "argv", ["serve.py", "--model", str(folder), *option])
    with pytest.raises(SystemExit) as ended:
        command_line.cli(serve.main, serve.__doc__)
    err = str(ended.value)
    assert told in err and err.startswith("error: ") and "\n" not in err


def test_without_uvicorn_the_api_says_what_to_install(jobs, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "inference.connections")
    with pytest.raises(
        ValueError, match=r"uvicorn is not installed; fix: pip install '.\[serve\]'"
    ):
        serve.api(jobs, "127.0.0.1", 0)


def test_openais_client_from_forty_threads(folder):
    """200 requests with the client's own retries: no failure."""
    openai = pytest.importorskip("openai")
    limits = Limits(**{**vars(LIMITS), "wait": 60})
    jobs = JobQueue(LLaVA.from_pretrained(folder), load_tokenizer(folder), "tiny", limits)
    server, url = listen(jobs)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    ask = question("How many?", shown(png()), max_tokens=4)
    with ThreadPoolExecutor(40) as threads:
        replies = list(threads.map(lambda _: client.chat.completions.create(**ask), range(200)))
    server.stop()
    assert len({reply.choices[0].message.content for reply in replies}) == 1


@pytest.fixture(scope="module")
def page(jobs):
    pytest.importorskip("gradio", reason="pip install '.[demo]'")
    server, url = listen(jobs, page=serve.web_page(jobs))
    yield url
    server.stop()


def test_the_page_takes_no_path_of_the_server(jobs, page, folder, monkeypatch):
    Image.new("RGB", (60, 40)).save(folder / "secret.png")
    seen, real = [], jobs.picture

    def picture(data, count):
        seen.append((data, count))
        return real(data, count)

    monkeypatch.setattr(jobs, "picture", picture)

    def send(path):
        data = [
            {"text": "What?", "files": [{"path": str(path), "meta": {"_type": "gradio.FileData"}}]},
            "",
            [],
            None,
        ]
        body = {"data": data, "fn_index": 0, "session_hash": f"test{len(str(path))}"}
        assert "event_id" in post(page, body, "/gradio_api/queue/join")[1]
        with urllib.request.urlopen(
            f"{page}/gradio_api/queue/data?session_hash={body['session_hash']}"
        ) as events:
            return next(json.loads(e[6:])["success"] for e in events if b"process_completed" in e)

    for path in (folder / "secret.png", ROOT / "report.png", "report.png", "../../report.png"):
        assert send(path) is False and not seen
        with pytest.raises(urllib.error.HTTPError, match="403|404"):
            urllib.request.urlopen(f"{page}/gradio_api/file={path}")
    boundary = (
        b"--x\r\nContent-Disposition: form-data; name=files; filename=a.png\r\n\r\n"
        + png()
        + b"\r\n--x--\r\n"
    )
    given = post(
        page, boundary, "/gradio_api/upload", **{"Content-Type": "multipart/form-data; boundary=x"}
    )[1]
    assert send(given[0]) is True and seen == [
        (png(), 1)
    ]  # the same request with what was uploaded


def test_a_client_that_leaves_the_page_leaves_no_traceback(page, capfd):
    kind = "Content-Type: multipart/form-data; boundary=x"
    with socket.create_connection(address_of(page)) as client:
        first = head(5000, path="/gradio_api/upload").replace(
            b"Content-Type: application/json", kind.encode()
        )
        client.sendall(
            first + b"--x\r\nContent-Disposition: form-data; name=files; filename=a.png\r\n\r\n"
        )
        time.sleep(0.2)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert post(page, question())[0] == 200
    assert "Traceback" not in capfd.readouterr().err


def test_page_and_api_are_one_server(page):
    assert b"gradio" in urllib.request.urlopen(page).read()
    assert post(page, question())[0] == 200
    assert json.load(urllib.request.urlopen(f"{page}/health"))["status"] == "ok"


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_the_page_refuses_foreign_hosts_and_pages(page, headers):
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    boundary = b"--x\r\nContent-Disposition: form-data; name=files; filename=a.png\r\n\r\n"
    boundary += png() + b"\r\n--x--\r\n"
    status, reply = post(page, boundary, "/gradio_api/upload", **form, **headers)
    assert status == 403 and reply["code"] in ("unknown_host", "foreign_origin")
    request = urllib.request.Request(page, headers=headers)
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(request)
    own = {"Origin": page}
    assert len(post(page, boundary, "/gradio_api/upload", **form, **own)[1]) == 1


def test_the_page_takes_no_endless_body(page):
    assert statuses(raw(page, asked("x" * 200_000, CLOSE, path="/gradio_api/queue/join"))) == [413]
    chunked = CHUNKED.replace(b"/v1/chat/completions", b"/gradio_api/queue/join")
    assert statuses(raw(page, chunked + chunks(b"x" * 1000) + b"0\r\n\r\n")) == [411]


def test_the_page_in_a_browser(jobs, page, tmp_path, monkeypatch):
    """A picture, a streamed answer, another question, four bad files; nothing from elsewhere."""
    playwright = pytest.importorskip("playwright.sync_api")
    names = "chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"
    if not (browser := next(filter(None, map(shutil.which, names)), None)):
        pytest.skip("no Chromium here")
    files = {
        "red.png": png(),
        "not.png": b"no picture",
        "many.png": BIG,
        "large.png": bytes(120_000),
        "a.txt": b"text",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    go, real, pixels, asked = threading.Event(), jobs.model.generate, [], []

    def generate(ids, images, stream, **options):
        pixels.append(images)
        asked.append(len(ids[0]))
        tokens = []
        real(
            ids,
            images=images,
            stream=lambda s: (stream(s), tokens.append(s), len(tokens) > 5 and go.wait(60)),
            **options,
        )

    monkeypatch.setattr(jobs.model, "generate", generate)
    with playwright.sync_playwright() as p:
        window = p.chromium.launch(executable_path=browser, args=["--no-sandbox"]).new_page()
        elsewhere = []
        window.on(
            "request",
            lambda r: (
                elsewhere.append(r.url) if not r.url.startswith((page, "data:", "blob:")) else 0
            ),
        )
        window.goto(page)
        answers = window.locator("[data-testid=bot]")

        def ask(question, file=None):
            window.locator("textarea").fill(question)
            if file:
                window.set_input_files("input[type=file]", tmp_path / file)
                window.wait_for_timeout(700)
            window.keyboard.press("Enter") if not file else window.locator("textarea").press(
                "Enter"
            )

        def wait(true):
            until(lambda: window.wait_for_timeout(50) or true(), 40)

        ask("How many?", "red.png")
        wait(lambda: answers.count() == 1 and answers.inner_text().strip())
        first = answers.inner_text().strip()  # the model stands still at its sixth token
        generating = window.locator(".generating")
        assert generating.count() == 1
        go.set()
        whole = said(jobs, job(jobs, "hello"))  # behind the first in the queue
        assert whole
        wait(lambda: len(answers.inner_text().strip()) > len(first))
        # While an answer is coming the page takes no question.
        wait(lambda: generating.count() == 0)
        ask("And now?")
        wait(
            lambda: answers.count() == 2 and len(asked) == 3 and answers.nth(1).inner_text().strip()
        )
        assert torch.equal(pixels[0][0].pixels, jobs.picture(png()).pixels)
        assert torch.equal(pixels[0][0].pixels, pixels[2][0].pixels)
        assert asked[2] > asked[0]
        whole = answers.nth(1).inner_text
        wait(lambda: whole() == (window.wait_for_timeout(400), whole())[1])  # its stream has ended
        window.get_by_label("Clear").first.click()
        wait(lambda: answers.count() == 0)
        ask("And now?")
        wait(lambda: answers.count() == 1 and len(asked) == 4 and answers.inner_text().strip())
        assert pixels[3] == []  # the picture went with the conversation
        for name, told in {
            "not.png": "none of PNG",
            "many.png": "at most 10,000",
            "large.png": "exceed the maximum",
            "a.txt": "Invalid file type",
        }.items():
            window.goto(page)
            window.wait_for_selector("textarea")
            ask("What?", name)
            wait(lambda told=told: told in window.inner_text("body"))
        window.goto(page)
        window.wait_for_selector("textarea")
        ask("How many?", "red.png")  # alive
        wait(lambda: answers.count() == 1 and answers.inner_text().strip())
        assert not elsewhere


def test_without_gradio_the_page_says_what_to_install(jobs, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ValueError, match=r"gradio is not installed; fix: pip install '.\[demo\]'"):
        serve.web_page(jobs)
