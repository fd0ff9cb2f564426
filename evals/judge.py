"""Asks a language model behind an OpenAI-compatible URL to judge answers, and remembers what it said.

A reply is appended to a JSONL file under a hash of everything that was asked, so that a killed run goes on where it
stopped, and another answer or another judge is asked about anew. The key is OPENAI_API_KEY.
"""

import hashlib
import http.client
import json
import os
import time
import urllib.error
import urllib.request

from config import UserError

TRIES, LONGEST = 8, 60  # requests for one reply, seconds between two of them


class Judge:
    def __init__(self, url, model, file, wait=1.0):
        """wait: seconds before the second try; each further one waits twice as long."""
        url = url.rstrip("/")
        if not url.startswith(("http://", "https://")):
            raise UserError(
                url, "not an http address", "--judge: such as https://api.openai.com/v1"
            )
        self.url = url if url.endswith("/chat/completions") else f"{url}/chat/completions"
        self.model, self.file, self.wait, self.known = model, file, wait, {}
        for line in file.read_text().splitlines() if file.exists() else []:
            try:
                row = json.loads(line)
                self.known[row["key"]] = row["reply"]
            except (ValueError, LookupError, TypeError):
                continue  # half a line of a killed run: asked again

    def __call__(self, messages, temperature, max_tokens):
        """The reply to [{"role", "content"}]. Raises UserError when the endpoint refuses or does not answer."""
        body = {
            "model": self.model,
            "messages": messages,
            "temperature": temperature,
            "max_tokens": max_tokens,
        }
        text = json.dumps(body)
        key = hashlib.sha256(text.encode()).hexdigest()
        if key not in self.known:
            self.known[key] = self.ask(text)
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with open(
                self.file, "a"
            ) as lines:  # a line break first: a killed run may have left half a line
                lines.write(
                    "\n" * (lines.tell() > 0) + json.dumps({"key": key, "reply": self.known[key]})
                )
        return self.known[key]

    def ask(self, text):
        request = urllib.request.Request(
            self.url, text.encode(), {"Content-Type": "application/json"}
        )
        if key := os.environ.get("OPENAI_API_KEY"):
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        for attempt in range(TRIES):
            if attempt:
                time.sleep(min(self.wait * 2 ** (attempt - 1), LONGEST))
            try:
                with urllib.request.urlopen(request, timeout=300) as response:
                    return json.load(response)["choices"][0]["message"]["content"] or ""
            except urllib.error.HTTPError as error:
                failure = f"HTTP {error.code}: {' '.join(error.read(200).decode(errors='replace').split())}"
                if error.code not in (408, 409, 429) and error.code < 500:
                    break
            except (
                OSError,
                http.client.HTTPException,
                ValueError,
                LookupError,
                TypeError,
            ) as error:
                failure = f"{type(error).__name__}: {error}"
        raise UserError(
            self.url,
            failure,
            "see --judge, --judge-model and OPENAI_API_KEY; then run the same again",
        )
