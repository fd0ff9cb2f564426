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
import urllib.request
from pathlib import Path

from config import UserError

TRIES = 8  # requests for one reply
LONGEST_WAIT = 60  # seconds between two of them
TIMEOUT = 300  # seconds for one request

# Statuses below 500 that may be another next time: timeout, conflict, too many requests.
TRY_AGAIN = (408, 409, 429)


class Judge:
    """Something to call with messages, which returns the reply and asks no question twice."""

    def __init__(self, url: str, model: str, file: Path, wait: float = 1.0):
        """file: where the replies are kept.

        wait: seconds before the second try; each further one waits twice as long.
        """
        url = url.rstrip("/")
        if not url.startswith(("http://", "https://")):
            fix = "--judge: such as https://api.openai.com/v1"
            raise UserError(url, "not an http address", fix)
        if not url.endswith("/chat/completions"):
            url = f"{url}/chat/completions"

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
        self.file.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"key": key, "reply": self.known[key]})
        with open(self.file, "a") as lines:
            # The line break goes first: a killed run may have left half a line.
            if lines.tell() > 0:
                line = "\n" + line
            lines.write(line)

    def ask(self, text: str) -> str:
        """Return the reply to a request, asked for up to TRIES times."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url, text.encode(), headers)
        api_key = os.environ.get("OPENAI_API_KEY")
        if api_key:
            # Not sent on to where the endpoint may redirect.
            request.add_unredirected_header("Authorization", f"Bearer {api_key}")

        # A refusal ends this at once; an endpoint that is busy or away gets time.
        for attempt in range(TRIES):
            if attempt:
                time.sleep(min(self.wait * 2 ** (attempt - 1), LONGEST_WAIT))
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                    reply = json.load(response)["choices"][0]["message"]["content"]
                    return reply or ""
            except urllib.error.HTTPError as error:
                said = " ".join(error.read(200).decode(errors="replace").split())
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


def read_replies(file: Path) -> dict[str, str]:
    """Return {key: reply} of a file that may be missing."""
    if not file.exists():
        return {}
    known = {}
    for line in file.read_text().splitlines():
        try:
            row = json.loads(line)
            known[row["key"]] = row["reply"]
        except (ValueError, LookupError, TypeError):
            continue  # half a line of a killed run: asked again
    return known
