"""Answers that a language model judges, against a local endpoint; and the adapter for lmms-eval."""

import contextlib
import hashlib
import io
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from PIL import Image

import evaluate
from config import UserError
from evals import llava_bench, mmvet
from evals.judge import Judge
from inference.answer import answer
from inputs.templates import encode
from inputs.tiling import MODES, PADDED
from model import Output
from packing import IGNORE
from tests.tools.benchmark_files import CASES, FILES, evaluated, mmvet_files, png, tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


@contextlib.contextmanager
def endpoint(reply):
    """Run a local OpenAI-compatible server and yield (url, requests).

    `reply(number, body)` returns a text or an HTTP status.
    """
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):  # noqa: N802
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((self.path, self.headers.get("Authorization"), body))
            said = reply(len(requests), body)
            text = json.dumps({"choices": [{"message": {"role": "assistant", "content": said}}]})
            self.send_response(said if isinstance(said, int) else 200)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        server.server_close()


def test_a_judge_is_asked_again_and_remembers(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    asked = [{"role": "user", "content": "hi"}]
    with endpoint(lambda n, body: {1: 429, 2: 503}.get(n, f"reply {n}")) as (url, requests):
        judge = Judge(url, "m", tmp_path / "j.jsonl", wait=0.01)
        assert judge(asked, 0.5, 7) == "reply 3" == judge(asked, 0.5, 7) and len(requests) == 3
        assert requests[2] == (
            "/v1/chat/completions",
            "Bearer secret",
            {"model": "m", "messages": asked, "temperature": 0.5, "max_tokens": 7},
        )
        assert judge(asked, 0.0, 7) == "reply 4"
        with open(tmp_path / "j.jsonl", "a") as lines:
            lines.write('\n{"key": "x", "re')  # killed while writing
        again = Judge(url + "/chat/completions", "m", tmp_path / "j.jsonl", wait=0.01)
        assert again(asked, 0.0, 7) == "reply 4" and len(requests) == 4
        assert (
            again(asked, 1.0, 7) == "reply 5"
            and Judge(url, "m", tmp_path / "j.jsonl")(asked, 1.0, 7) == "reply 5"
        )
        assert Judge(url, "other", tmp_path / "j.jsonl")(asked, 1.0, 7) == "reply 6"


@pytest.mark.parametrize("status, tries", [(401, 1), (400, 1), (500, 8)])
def test_a_judge_that_refuses_is_a_mistake_of_the_user(status, tries, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with endpoint(lambda n, body: status) as (url, requests):
        with pytest.raises(UserError, match=f"HTTP {status}: .*; fix: see --judge") as failure:
            Judge(url, "m", tmp_path / "j.jsonl", wait=0.001)([], 0, 1)
        assert len(requests) == tries and "secret" not in str(failure.value)
    with pytest.raises(UserError, match=r"/v1/chat/completions: URLError: .+; fix: "):
        Judge(url, "m", tmp_path / "j.jsonl", wait=0.001)([], 0, 1)
    with pytest.raises(UserError, match="file:///etc: not an http address"):
        Judge("file:///etc", "m", tmp_path / "j.jsonl")


BODY = '{"choices": [{"message": {"content": "x"}}]}'


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"null",
        b"[" * 50_000,
        b'{"choices": []}',
        b'{"choices": [{"message": 3}]}',
        b'{"choices": [{"message": {"content": ["x"]}}]}',
        b"\xff" + BODY.encode(),
        BODY.replace('"x"', "9" * 5000).encode(),
    ],
)
def test_a_reply_that_is_none_is_asked_for_again(sent, tmp_path, monkeypatch):
    bodies = [sent, BODY.encode()]
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: io.BytesIO(bodies.pop(0)))
    asked = [{"role": "user", "content": "hi"}]
    assert Judge("http://127.0.0.1:9", "m", tmp_path / "j.jsonl", wait=0.001)(asked, 0, 1) == "x"
    assert not bodies


@pytest.mark.parametrize("url", ["http://[::1", "http://a b", "http://a:x", "http://\u00e9/\n"])
def test_addresses_that_are_none_are_refused_at_once(url, tmp_path):
    with pytest.raises(UserError, match="not an http address; fix: --judge"):
        Judge(url, "m", tmp_path / "j.jsonl")


def test_a_key_that_is_none_is_not_quoted(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\nx")
    with pytest.raises(UserError, match="OPENAI_API_KEY: holds what no key has") as failure:
        Judge("http://127.0.0.1:9", "m", tmp_path / "j.jsonl")([], 0, 1)
    assert "secret" not in str(failure.value)


@pytest.mark.parametrize("review", ["nan 5\nx", "inf 1\n", "5 -inf", "1e999 2"])
def test_scores_of_a_review_are_finite(review):
    assert llava_bench.parse(review) == [-1, -1]


def test_the_official_prompts():
    """They are those of mm-vet_evaluator.py and of LLaVA's rule.json, to the letter."""
    digest = [
        hashlib.sha256(text.encode()).hexdigest()[:16] for text in (mmvet.PROMPT, llava_bench.RULE)
    ]
    assert digest == ["d1b3e0a5b4e72c88", "2ce22b562d600886"]
    example = {"context": "C", "prompt": "Q", "label": "L"}
    assert llava_bench.content(example, "A") == (
        "[Context]\nC\n\n[Question]\nQ\n\n[Assistant 1]\nL\n\n[End of Assistant 1]\n\n"
        f"[Assistant 2]\nA\n\n[End of Assistant 2]\n\n[System]\n{llava_bench.RULE}\n\n"
    )


def test_mmvet_asks_again_for_a_number():
    example, asked = {"question": "Q", "label": "a<AND>b<OR>c"}, []

    def judge(replies):
        replies = iter(replies)
        return lambda messages, temperature, tokens: (
            asked.append((messages, temperature, tokens)) or next(replies)
        )

    assert mmvet.grade(example, "P", judge(["0.7 because"])) == 0.7
    question = f"{mmvet.PROMPT}\nQ | a <AND> b <OR> c | P | "
    assert asked == [([{"role": "user", "content": question}], 0.0, 3)]
    assert mmvet.grade(example, "P", judge(["Well", "2.0", "-1", "1.0"])) == 1
    again = question + "\nPredict the correctness of the answer (digit): "
    assert [(m[0]["content"], t) for m, t, _ in asked[1:]] == [
        (question, 0.0),
        (again, 0.0),
        (again, 0.5),
        (again, 1.0),
    ]
    assert mmvet.grade(example, "P", judge(["nan"] * 4 + ["x", "1.0"])) == 0 and len(asked) == 10


@pytest.mark.parametrize(
    "task, llava", [case for case in CASES if case.values[0] in ("mmvet", "llava_bench")]
)
def test_a_judged_run_killed_and_resumed(task, llava, tmp_path, model, monkeypatch, capsys):
    FILES[task][0](tmp_path, llava)
    replies = {"mmvet": ["0.5", "1.0"], "llava_bench": ["8 6\nwell", "10 5\nso"]}[task]
    ask, calls = Judge.ask, []

    def killed(self, text):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(text)
        return ask(self, text)

    with endpoint(lambda n, body: replies[n - 1]) as (url, requests):
        options = ["--judge", url, "--judge-model", "referee"]
        monkeypatch.setattr(Judge, "ask", killed)
        with pytest.raises(KeyboardInterrupt):
            evaluated(model, task, tmp_path, tmp_path / "out", *options)
        monkeypatch.setattr(Judge, "ask", ask)
        evaluated(model, task, tmp_path, tmp_path / "out", *options)
        evaluated(model, task, tmp_path, tmp_path / "out", *options)
        assert len(requests) == 2 and {body["model"] for _, _, body in requests} == {"referee"}
    scores = json.loads((tmp_path / "out/a.json").read_text())["scores"]
    if task == "mmvet":
        assert {name: (s["score"], s["n"]) for name, s in scores.items()} == {
            "all": (75, 2),
            "math": (50, 1),
            "ocr": (75, 2),
        }
    else:
        assert {name: s["score"] for name, s in scores.items()} == {
            "all": 61.1,
            "conv": 75,
            "detail": 50,
        }
        review = json.loads((tmp_path / "out/a-reviews.jsonl").read_text().splitlines()[1])
        assert review == {
            "id": 2,
            "question_id": 1,
            "category": "llava_bench_detail",
            "content": "10 5\nso",
            "tuple": [10, 5],
        }
        assert "[Context]\na\nb\n\n[Question]" in requests[1][2]["messages"][1]["content"]
        assert requests[1][2]["temperature"] == 0.2 and requests[1][2]["max_tokens"] == 1024
    assert "published: " in capsys.readouterr().out


def test_a_judge_needs_the_ground_truth(tmp_path, model):
    mmvet_files(tmp_path, True)
    (tmp_path / "mm-vet/mm-vet.json").unlink()
    evaluated(model, "mmvet", tmp_path, tmp_path / "out")
    with pytest.raises(
        UserError, match=r"llava-mm-vet.jsonl:0: no ground truth for it; fix: put mm-vet.json"
    ):
        evaluated(model, "mmvet", tmp_path, tmp_path / "out", "--judge", "http://127.0.0.1:9/v1")


# ---------------------------------------------------------------------------------------- lmms-eval


@pytest.fixture
def adapter(monkeypatch):
    """evals/lmms_eval.py on the real lmms-eval, or on a stub of the class that it is built on."""
    if not find_spec("lmms_eval"):
        base = type("lmms", (), {"__init__": lambda self: setattr(self, "task_dict", {})})
        for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        sys.modules["lmms_eval.api.model"].lmms = base
    monkeypatch.delitem(sys.modules, "evals.lmms_eval", raising=False)
    import evals.lmms_eval

    yield evals.lmms_eval
    sys.modules.pop("evals.lmms_eval", None)


def test_lmms_eval_gets_the_answers_that_evaluate_gets(adapter, model):
    lm = adapter.Barellava(pretrained=str(model), batch_size="2", device="cpu")
    docs = [{"pictures": [Image.open(io.BytesIO(png(i)))] * n} for i, n in enumerate((1, 0, 2, 1))]
    lm.task_dict = {"t": {"test": docs}}
    contexts = ["What?", "Say <b>.", "These <image> and <image>?", "Is it so, or not?"]
    args = [
        (
            c,
            {
                "max_new_tokens": 3 + i % 2,
                "until": ["\n\n", ""],
                "do_sample": False,
                "temperature": 0,
            },
            lambda doc: doc["pictures"],
            i,
            "t",
            "test",
        )
        for i, c in enumerate(contexts)
    ]
    answers = lm.generate_until([SimpleNamespace(args=a) for a in args])
    for i, (context, doc) in enumerate(zip(contexts, docs, strict=True)):
        seen = [[lm.llava.views.picture(p) for p in doc["pictures"]]]
        (alone,) = answer(lm.llava, lm.tokenizer, [context], seen, max_new_tokens=3 + i % 2)
        assert answers[i] == alone.split("\n\n")[0].strip()
    (stopped,) = lm.generate_until(
        [SimpleNamespace(args=(args[3][0], args[3][1] | {"until": answers[3][1]}, *args[3][2:]))]
    )
    assert answers[3] and stopped == answers[3][:1].strip()

    # Where several pictures are seen otherwise than one, they are counted.
    options = vars(lm.llava.views) | {"grids": ((1, 2), (2, 1))}
    lm.llava.views = MODES["anyres_max"](**options)
    shapes = [[item.shape for item in lm.items(args[i])] for i in range(3)]
    assert shapes[0][0].views == 3 and shapes[1:] == [[], [PADDED, PADDED]]

    for shown, why in (
        (b"x", "it shows a bytes; fix: take a task of pictures"),
        ("none.mp4", "none.mp4: no such file"),
    ):
        with pytest.raises(UserError, match=f"lmms-eval:t: {why}"):
            lm.generate_until(
                [SimpleNamespace(args=("x", {}, lambda doc, s=shown: [s], 0, "t", "test"))]
            )


def test_lmms_eval_gets_likelihoods(adapter, model):
    lm = adapter.Barellava(pretrained=str(model), device="cpu")
    lm.task_dict = {"t": {"test": [{"pictures": [Image.new("RGB", (9, 9))], "answer": "no"}]}}
    to_visual = lambda doc: doc["pictures"]  # noqa: E731
    where = to_visual, 0, "t", "test"
    args = [("Is it?", "yes", *where), ("Is it?", lambda doc: doc["answer"], *where), ("", "yes")]
    results = lm.loglikelihood([SimpleNamespace(args=a) for a in args])
    for (loss, greedy), (text, target, seen) in zip(
        results,
        [("<image>\nIs it?", "yes", 1), ("<image>\nIs it?", "no", 1), ("", "yes", 0)],
        strict=True,
    ):
        turns = [{"from": "human", "value": text}, {"from": "gpt", "value": target}]
        ids, labels = encode(turns, lm.tokenizer, "plain")
        wide, wanted = [], []
        for token, label in zip(ids, labels, strict=True):
            wide += [token] if token != -200 else [0] * lm.llava.image_tokens
            wanted += [label] if token != -200 else [IGNORE] * lm.llava.image_tokens
        pixels = (
            torch.stack([lm.llava.vision_tower.processor(Image.new("RGB", (9, 9)), "square")])
            if seen
            else None
        )
        with torch.no_grad():
            p = lm.llava(torch.tensor([ids]), pixels).logits[0].log_softmax(-1)
        each = [
            (-p[i - 1, t].item(), p[i - 1].argmax().item() == t)
            for i, t in enumerate(wanted)
            if t != IGNORE
        ]
        assert len(each) == len(target) + 2 and loss == pytest.approx(
            sum(x for x, _ in each) / len(each), rel=1e-5
        )
        assert greedy == all(right for _, right in each)
    assert not any(greedy for _, greedy in results)


@pytest.mark.parametrize("wrong, greedy", [(None, True), (-1, False), (-2, False), (-6, True)])
def test_lmms_eval_is_told_whether_the_target_is_the_greedy_answer(
    adapter, model, monkeypatch, wrong, greedy
):
    """The prompt's last token is at -6 of ` yes</s>`: what is said before does not count."""
    lm = adapter.Barellava(pretrained=str(model), device="cpu")

    def forward(ids, images, labels):
        said = ids.roll(-1)
        if wrong:
            said[0, wrong - 1] += 1
        return Output(
            torch.nn.functional.one_hot(said, lm.tokenizer.vocab_size + 1).float(),
            torch.tensor(0.5),
        )

    monkeypatch.setattr(lm.llava, "forward", forward)
    assert lm.loglikelihood([SimpleNamespace(args=("Is it?", "yes"))]) == [(0.5, greedy)]


def test_without_lmms_eval_the_adapter_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    monkeypatch.setitem(sys.modules, "lmms_eval.api", None)
    monkeypatch.setitem(sys.modules, "lmms_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "evals.lmms_eval", raising=False)
    import evals.lmms_eval as adapter

    with pytest.raises(
        UserError, match="lmms-eval: it is not installed; fix: pip install lmms-eval"
    ):
        adapter.main([])
    sys.modules.pop("evals.lmms_eval")


@pytest.mark.parametrize(
    "name, ranks, expected",
    [("cuda:1", 1, "cuda:1"), (None, 1, "cuda:3"), ("cuda", 8, "cuda:3"), ("cuda:0", 8, "cuda:3")],
)
def test_the_adapter_sets_the_gpu_that_is_named(adapter, monkeypatch, name, ranks, expected):
    """Alone it takes --device; of several ranks each has a GPU of its own."""
    done = []

    class Stopped(Exception):
        pass

    def load(folder, dtype, device):
        done.append(("load", str(device), dtype))
        raise Stopped

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: done.append(("set", str(device))))
    monkeypatch.setattr(adapter.LLaVA, "from_pretrained", load)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    with pytest.raises(Stopped):
        adapter.Barellava(pretrained="/", batch_size="1", device=name)
    assert done == [("set", expected), ("load", expected, torch.bfloat16)]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": "auto"}, "--model_args:batch_size: 'auto' is not a whole number"),
        ({"batch_size": 0}, "--model_args:batch_size: 0 is not a whole number"),
        ({"dtype": "float"}, "--model_args:dtype: 'float' is not one of"),
        ({"device": "cuda:x"}, "--device: 'cuda:x' is none; fix: cuda, cuda:1 or cpu"),
    ],
)
def test_options_of_the_adapter_that_cannot_be(adapter, monkeypatch, options, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match=message):
        adapter.Barellava(pretrained="/", **options)


@pytest.mark.parametrize(
    "asked, key",
    [
        ({"max_new_tokens": "x"}, "max_new_tokens"),
        ({"max_new_tokens": 2**40}, "max_new_tokens"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 3}, "top_p"),
        ({"num_beams": -1}, "num_beams"),
    ],
)
def test_options_of_a_task_that_cannot_be(adapter, asked, key):
    with pytest.raises(UserError, match=f"lmms-eval:generation_kwargs.{key}: .* is not"):
        adapter.generate_options(asked)
    assert adapter.generate_options({"max_new_tokens": 0, "top_p": None})["max_new_tokens"] == 128


@pytest.mark.parametrize("error", [UserError("a", "b", "c"), RuntimeError("boom\nx"), None])
def test_a_run_of_lmms_eval_that_fails_ends_with_an_error(adapter, monkeypatch, error):
    """lmms-eval 0.7.3 catches what its evaluation raises, prints it and returns."""
    tool = ModuleType("lmms_eval.__main__")

    def evaluate_single(args=None):
        if error:
            raise error

    def evaluate():
        with contextlib.suppress(Exception):
            tool.cli_evaluate_single()

    tool.cli_evaluate_single = evaluate_single
    tool.cli_evaluate = evaluate
    manifests = ModuleType("lmms_eval.models.registry_v2")
    manifests.ModelManifest = lambda *arguments, **options: None
    models = ModuleType("lmms_eval.models")
    models.MODEL_REGISTRY_V2 = SimpleNamespace(register_manifest=lambda *_, **__: None)
    package = ModuleType("lmms_eval")
    package.__main__ = tool
    for name, module in (
        ("lmms_eval", package),
        ("lmms_eval.__main__", tool),
        ("lmms_eval.models", models),
        ("lmms_eval.models.registry_v2", manifests),
    ):
        monkeypatch.setitem(sys.modules, name, module)

    if error is None:
        adapter.main([])
        return
    expected = "^a: b; fix: c$" if isinstance(error, UserError) else "failed: RuntimeError: boom"
    with pytest.raises(UserError, match=expected):
        adapter.main([])


def test_a_judge_for_a_task_without_one_is_refused(tmp_path):
    """An option that would do nothing is a mistake, said before anything is loaded."""
    words = [
        "--model",
        str(tmp_path),
        "--task",
        "pope",
        "--data",
        str(tmp_path),
        "--judge",
        "http://x",
    ]
    with pytest.raises(UserError, match="--judge: nothing judges pope; fix: leave it out"):
        evaluate.main(words)
