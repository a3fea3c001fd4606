"""Requests over HTTP that name a context, in front of a server that shows what it was asked."""

import asyncio
import json
import shutil

import pytest

from tests.tiny import tiny_model
from tests.words import tokenizer, words
from wildcat_kv import compress_context
from wildcat_kv.contexts.prompts import encode_follow_up
from wildcat_kv.integrations.vllm.contexts import ContextFolder
from wildcat_kv.integrations.vllm.export import export_context
from wildcat_kv.integrations.vllm.identity import ServedModel
from wildcat_kv.integrations.vllm.middleware import ContextMiddleware
from wildcat_kv.integrations.vllm.placeholders import read_placeholder

SETTINGS = {"ratio": 0.5, "sink": 4, "window": 4, "bin_rank": 4}
WORDS = tokenizer()
CHAT, TEXT, LISTING = "/v1/chat/completions", "/v1/completions", "/v1/contexts"
KEY = (b"authorization", b"Bearer key")


@pytest.fixture(scope="module")
def contexts(tmp_path_factory):
    root, model = tmp_path_factory.mktemp("contexts"), tiny_model("llama")
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    for name, seed in (("first", 0), ("second", 1), ("damaged", 2)):
        export_context(compress_context(model, WORDS, words(150, seed), **SETTINGS), root / name)
    next((root / "damaged").glob("*.safetensors")).write_bytes(b"nothing")
    return ContextFolder(root, ServedModel.of(str(folder)))


class Behind:
    """A server that wants a key, and answers with the body that it was asked with."""

    def __init__(self):
        self.asked = []
        self.ended_by = None

    async def __call__(self, scope, receive, send):
        status = 200 if KEY in scope["headers"] else 401
        message = await receive()
        body = message["body"]
        while message["more_body"]:
            message = await receive()
            body += message["body"]
        length = dict(scope["headers"]).get(b"content-length")
        assert length is None or int(length) == len(body)
        if scope["path"] == CHAT and status == 200:
            self.ended_by = (await receive())["type"]
        self.asked.append((scope["method"], scope["path"], body))
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": body})


def ask(contexts, path=CHAT, body=None, headers=(), method="POST", key=True, behind=None):
    """Status and body of an answer."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent, parts = [], [raw[: len(raw) // 2], raw[len(raw) // 2 :]]
    incoming = [{"type": "http.request", "body": part, "more_body": place == 0} for place, part in enumerate(parts)]

    async def receive():
        return incoming.pop(0) if incoming else {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    names = [(name.encode(), value.encode()) for name, value in headers]
    if method == "GET":
        incoming[:] = [{"type": "http.request", "body": b"", "more_body": False}]
    else:
        names.append((b"content-length", str(len(raw)).encode()))
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "root_path": "",
        "headers": [*names, *([KEY] if key else [])],
        "query_string": b"",
    }
    app = ContextMiddleware(behind or Behind(), contexts, WORDS)
    asyncio.run(app(scope, receive, send))
    content = b"".join(message.get("body", b"") for message in sent)
    return sent[0]["status"] if sent else None, content


def chat(*said, system=None, **fields):
    messages = [] if system is None else [{"role": "system", "content": system}]
    roles = ["user", "assistant"] * len(said)
    messages += [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]
    return {"model": "m", "messages": messages, **fields}


def named(name):
    return {"kv_transfer_params": {"context": name}}


def error(answer, status):
    assert answer[0] == status, answer
    found = json.loads(answer[1])["error"]
    assert found["code"] == status and found["message"].count("\n") == 0
    return found["message"]


@pytest.mark.parametrize("way", ["field", "header", "marker"])
def test_a_request_gets_the_ids_of_its_prompt(contexts, way):
    body = chat("w5 w6", **named("second")) if way == "field" else chat("w5 w6", temperature=0)
    headers = [("X-WildCat-Context", "second")] if way == "header" else []
    if way == "marker":
        body = chat("w5 w6", system=" wildcat_kv context: second ")
    status, content = ask(contexts, body=body, headers=headers)
    ids = json.loads(content)["kv_transfer_params"]["prompt_token_ids"]
    context = contexts.get("second")
    slots = context.header.slots
    assert status == 200 and read_placeholder(ids, 120) == (context.digest, slots)
    assert ids[slots:] == encode_follow_up(WORDS, "w5 w6")[0].tolist()
    assert json.loads(content)["messages"] == body["messages"]


def test_earlier_turns_follow_the_context(contexts):
    _, content = ask(contexts, body=chat("w5", "w6", "w7", **named("first")))
    ids = json.loads(content)["kv_transfer_params"]["prompt_token_ids"][contexts.get("first").header.slots :]
    assert WORDS.decode(ids) == "w5 <end> <assistant> w6 <end> <user> w7 <end> <assistant>"


def test_messages_of_parts_are_text(contexts):
    body = chat("", **named("first"))
    body["messages"][0]["content"] = [{"type": "text", "text": "w5"}, {"type": "text", "text": " w6"}]
    _, content = ask(contexts, body=body)
    assert content == ask(contexts, body={**chat("w5 w6", **named("first")), "messages": body["messages"]})[1]
    body["messages"][0]["content"] = [{"type": "image_url", "image_url": {"url": "x"}}]
    assert "must be text" in error(ask(contexts, body=body), 400)


def test_text_follows_a_context(contexts):
    _, content = ask(contexts, path=TEXT, body={"prompt": "w5 w6", **named("first")})
    context = contexts.get("first")
    assert json.loads(content)["prompt"][context.header.slots :] == [5, 6]
    assert "kv_transfer_params" not in json.loads(content)
    for prompt in ("", [5, 6], ["w5"], None):
        assert "must be one text" in error(ask(contexts, path=TEXT, body={"prompt": prompt, **named("first")}), 400)


@pytest.mark.parametrize(
    "body", [chat("w5"), chat("w5", system="Be brief."), [1], b"{", b"", chat("w5", kv_transfer_params={"other": 1})]
)
def test_other_requests_go_through_untouched(contexts, body):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    assert ask(contexts, body=body) == (200, raw)
    assert ask(contexts, path="/v1/embeddings", body=body) == (200, raw)


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("third", 404, "there is no such context"),
        ("damaged", 400, "is damaged"),
        ("../first", 400, "is no name"),
        ("a.b", 400, "is no name"),
        ("", 400, "is no name"),
        (7, 400, "must be the name"),
        (None, 400, "must be the name"),
    ],
)
def test_contexts_that_cannot_be_served_are_refused(contexts, name, status, message):
    behind = Behind()
    assert message in error(ask(contexts, body=chat("w5", **named(name)), behind=behind), status)
    assert all(path == "/v1/models" for _, path, _ in behind.asked)  # the engine was not touched


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (chat("w5", system="Be brief."), "a system message cannot be added"),
        (chat(" "), "is empty"),
        (chat("w5", "w6"), "without a question"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "of role 'tool'"),
        ({"messages": [{"role": "user", "content": "w5"}] * 2}, "and 'assistant' comes there"),
        ({"messages": []}, "must be a list"),
        ({}, "must be a list"),
        ({"messages": ["w5"]}, "must have a role"),
        (chat("w5", tools=[{}]), "tools cannot be given"),
        (chat("w5", truncate_prompt_tokens=5), "truncate_prompt_tokens cannot be given"),
        (chat("w5", continue_final_message=True), "continue_final_message cannot be given"),
    ],
)
def test_requests_that_do_not_fit_a_context_are_refused(contexts, body, message):
    assert message in error(ask(contexts, body={**body, **named("first")}), 400)


def test_different_names_are_refused(contexts):
    answer = ask(contexts, body=chat("w5", **named("first")), headers=[("X-WildCat-Context", "second")])
    assert "different contexts" in error(answer, 400)
    answer = ask(contexts, path="/v1/embeddings", body={}, headers=[("X-WildCat-Context", "first")])
    assert "takes no context" in error(answer, 400)
    answer = ask(contexts, path="/v1/responses", body=named("first"), headers=[("Content-Type", "application/json")])
    assert "takes no context" in error(answer, 400)


def test_contexts_are_listed(contexts):
    status, content = ask(contexts, LISTING, method="GET")
    entries = {entry["id"]: entry for entry in json.loads(content)["data"]}
    assert status == 200 and sorted(entries) == ["damaged", "first", "second"]
    assert entries["first"]["weighted"] and entries["first"]["slots"] % 32 == 0
    assert "is damaged" in entries["damaged"]["error"]


def test_a_new_context_needs_no_restart(contexts):
    assert ask(contexts, body=chat("w5", **named("newer")))[0] == 404
    newer = contexts.root / "newer"
    shutil.copytree(contexts.root / "first", newer)
    try:
        assert ask(contexts, body=chat("w5", **named("newer")))[0] == 200
    finally:
        shutil.rmtree(newer)


def test_without_the_key_nothing_is_told(contexts):
    """It stands before the server's own check, so it asks that first."""
    for name in ("first", "third", "damaged"):
        assert ask(contexts, body=chat("w5", **named(name)), key=False) == (401, b"")
    assert ask(contexts, LISTING, method="GET", key=False) == (401, b"")


def test_a_client_that_hangs_up_is_seen_by_the_server(contexts):
    behind = Behind()
    ask(contexts, body=chat("w5", **named("first")), behind=behind)
    assert behind.ended_by == "http.disconnect"


def test_a_client_that_hangs_up_while_it_asks_gets_nothing(contexts):
    sent = []

    async def receive():
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    behind = Behind()
    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": [], "query_string": b""}
    asyncio.run(ContextMiddleware(behind, contexts, WORDS)(scope, receive, send))
    assert sent == [] and behind.asked == []


def test_other_connections_go_through(contexts):
    seen = []

    async def app(scope, receive, send):
        seen.append(scope["type"])

    asyncio.run(ContextMiddleware(app, contexts, WORDS)({"type": "lifespan"}, None, None))
    assert seen == ["lifespan"]


class Failing:
    """A server whose first answers fail, as where the entries of a context cannot be loaded."""

    def __init__(self, meanwhile, *, stream, failures=1):
        self.meanwhile, self.stream, self.failures = meanwhile, stream, failures

    async def __call__(self, scope, receive, send):
        if scope["path"] == "/v1/models":
            await Behind()(scope, receive, send)
            return
        ids = json.loads((await receive())["body"])["kv_transfer_params"]["prompt_token_ids"]
        fails, self.failures = self.failures > 0, self.failures - 1
        if fails:
            self.meanwhile()
        parts = [b'data: {"role"}', b'data: {"error": 1}' if fails else b"data: " + bytes(ids[:1])]
        await send({"type": "http.response.start", "status": 200 if self.stream or not fails else 500, "headers": []})
        for place, part in enumerate(parts):
            await send({"type": "http.response.body", "body": part, "more_body": place == 0})


@pytest.mark.parametrize("stream", [True, False])
def test_a_context_that_changes_while_it_is_asked_is_asked_again(contexts, stream):
    folder = contexts.root / "changing"
    shutil.copytree(contexts.root / "first", folder)

    def change():
        shutil.rmtree(folder)
        shutil.copytree(contexts.root / "second", folder)

    try:
        status, content = ask(contexts, body=chat("w5", **named("changing")), behind=Failing(change, stream=stream))
        assert status == 200 and b"error" not in content
        restless = Failing(lambda: (folder / "context.json").write_text("{}"), stream=stream, failures=2)
        assert "is damaged" in error(ask(contexts, body=chat("w5", **named("changing")), behind=restless), 400)
        gone = Failing(lambda: shutil.rmtree(contexts.root / "second2"), stream=stream)
        shutil.copytree(contexts.root / "second", contexts.root / "second2")
        assert "no such context" in error(ask(contexts, body=chat("w5", **named("second2")), behind=gone), 404)
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("stream", [True, False])
def test_other_failures_are_the_servers_to_tell(contexts, stream):
    behind = Failing(lambda: None, stream=stream, failures=9)
    status, content = ask(contexts, body=chat("w5", **named("first")), behind=behind)
    assert status == (200 if stream else 500) and content.endswith(b'data: {"error": 1}')
