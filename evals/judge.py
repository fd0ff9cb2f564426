"""A language model behind an OpenAI-compatible URL that judges answers, and what it said so far.

    ask = Judge("https://api.openai.com/v1", "gpt-4-0613", Path("out/eval/mmvet-judge.jsonl"))
    reply = ask([{"role": "user", "content": "..."}], temperature=0.0, max_tokens=3)

A reply is appended to a JSONL file under a hash of everything that was asked. So a killed run goes
on where it stopped, and another answer or another judge is asked about anew. The environment
variable OPENAI_API_KEY is the key.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from checkpoints.files import parse_json, writing
from checkpoints.json_lines import parse_row, read_lines
from config import UserError

TRIES = 8  # requests for one reply
LONGEST_WAIT = 60  # seconds between two of them
TIMEOUT = 300  # seconds for one request
LONGEST_REPLY = 2**24  # bytes that are read of one

# Statuses below 500 that may be another next time: timeout, conflict, too many requests.
TRY_AGAIN = (408, 409, 429)


class Judge:
    """Something to call with messages, which returns the reply and asks no question twice."""

    def __init__(self, url: str, model: str, file: Path, wait: float = 1.0):
        """file: where the replies are kept.

        wait: seconds before the second try; each further one waits twice as long.
        """
        url = url.rstrip("/")
        fix = "--judge: such as https://api.openai.com/v1"
        if not url.startswith(("http://", "https://")):
            raise UserError(url, "not an http address", fix)
        if not url.endswith("/chat/completions"):
            url = f"{url}/chat/completions"

        # The library refuses others only when it is asked to connect, and then again and again.
        try:
            is_address = url.isascii() and url.isprintable() and " " not in url
            is_address = is_address and urllib.parse.urlsplit(url).port != 0
        except ValueError:
            is_address = False
        if not is_address:
            raise UserError(url, "not an http address", fix)

        self.url = url
        self.model = model
        self.file = file
        self.wait = wait
        self.known = read_replies(file)

    def __call__(self, messages: list[dict], temperature: float, max_tokens: int) -> str:
        """Return the reply to [{"role", "content"}].

        Raise UserError if the endpoint refuses, or does not answer.
        """
        body = {
            "model": self.model,
            "messages": messages,
            "temperature": temperature,
            "max_tokens": max_tokens,
        }
        # The same question to the same judge has the same key, whatever the run.
        text = json.dumps(body)
        key = hashlib.sha256(text.encode()).hexdigest()
        if key not in self.known:
            self.known[key] = self.ask(text)
            self.remember(key)
        return self.known[key]

    def remember(self, key: str):
        """Append the reply to the file."""
        line = json.dumps({"key": key, "reply": self.known[key]})
        with writing(self.file):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with open(self.file, "a") as lines:
                # The line break goes first: a killed run may have left half a line.
                if lines.tell() > 0:
                    line = "\n" + line
                lines.write(line)

    def ask(self, text: str) -> str:
        """Return the reply to a request, asked for up to TRIES times."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url, text.encode(), headers)
        api_key = os.environ.get("OPENAI_API_KEY", "").strip()
        if api_key:
            # A message of the library would quote the key.
            if not (api_key.isascii() and api_key.isprintable()):
                what = "holds what no key has: a line break, or letters that are not ASCII"
                raise UserError("OPENAI_API_KEY", what, "set it to the key alone")
            # Not sent on to where the endpoint may redirect.
            request.add_unredirected_header("Authorization", f"Bearer {api_key}")

        # A refusal ends this at once; an endpoint that is busy or away gets time.
        for attempt in range(TRIES):
            if attempt:
                time.sleep(min(self.wait * 2 ** (attempt - 1), LONGEST_WAIT))
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                    return reply_in(response.read(LONGEST_REPLY))
            except urllib.error.HTTPError as error:
                said = begin_of(error)
                failure = f"HTTP {error.code}: {said}"
                if error.code < 500 and error.code not in TRY_AGAIN:
                    break
            except (
                OSError,
                http.client.HTTPException,
                ValueError,
                LookupError,
                TypeError,
            ) as error:
                # No connection, half an answer, or one that is not as OpenAI's.
                failure = f"{type(error).__name__}: {error}"

        fix = "see --judge, --judge-model and OPENAI_API_KEY; then run the same again"
        raise UserError(self.url, failure, fix)


def reply_in(body: bytes) -> str:
    """Return the reply in what an endpoint sends. Raise ValueError, LookupError or TypeError."""
    reply = parse_json(body)["choices"][0]["message"]["content"]
    if reply is None:
        return ""
    if not isinstance(reply, str):
        raise TypeError("the reply is no text")
    return reply.encode(errors="replace").decode()  # half a pair of surrogates cannot be written


def begin_of(error: urllib.error.HTTPError) -> str:
    """Return the beginning of what an endpoint says to a refusal, on one line."""
    try:
        return " ".join(error.read(200).decode(errors="replace").split())
    except (OSError, http.client.HTTPException):
        return "and nothing else"


def read_replies(file: Path) -> dict[str, str]:
    """Return {key: reply} of a file that may be missing, and say how many of its lines are none.

    Those stay in the file, and what they may have been is asked again. Raise UserError if the file
    cannot be read.
    """
    known = {}
    damaged = 0
    for line, row in read_lines(file, parse_reply):
        if row is not None:
            known[row["key"]] = row["reply"]
        elif line != b"\n":
            damaged += 1
    if damaged:
        print(f"{file.name}: {damaged} damaged lines are not used; they stay in the file")
    return known


def parse_reply(line: bytes) -> dict | None:
    """Return the row of a line; None if it is no reply."""
    return parse_row(line, ("key", "reply"))
