"""vLLM's server over HTTP: the same answers, and 4xx for the rest, whatever else goes on."""

import concurrent.futures
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest

from tests.vllm_engine.conftest import ANSWER, FACT_QUESTION, QUESTIONS

_START = 240.0
_COMMAND = "from wildcat_kv.cli import main; main()"


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def server(exports, tmp_path_factory):
    """Address of a server, with a key."""
    port, log = free_port(), tmp_path_factory.mktemp("log") / "server.log"
    options = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "4096", "--served-model-name", "smol"]
    options += ["--host", "127.0.0.1", "--port", str(port), "--api-key", "key"]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", _COMMAND, "serve", exports.model, "--contexts", str(exports.root), *options],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + _START
        while time.monotonic() < until and process.poll() is None:
            try:
                if httpx.get(f"{address}/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(1)
        else:
            pytest.fail(log.read_text()[-4000:])
        yield address
        assert process.poll() is None, log.read_text()[-4000:]
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server}/v1", api_key="key", max_retries=0, timeout=300)


def ask(client, context, question, **options):
    return client.chat.completions.create(
        model="smol",
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=ANSWER,
        extra_body={"kv_transfer_params": {"context": context}},
        **options,
    )


@pytest.mark.parametrize("method", ["wildcat", "query_wildcat", "keydiff"])
def test_answers_stream_and_are_those_of_the_compressed_context(client, exports, method):
    def answer(question):
        stream = ask(client, method, question, stream=True, stream_options={"include_usage": True})
        pieces, usage = [], None
        for chunk in stream:
            pieces += [choice.delta.content for choice in chunk.choices if choice.delta.content]
            usage = chunk.usage or usage
        return pieces, usage

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(answer, QUESTIONS))
    for (pieces, usage), expected in zip(found, exports.references[method], strict=True):
        assert "".join(pieces) == expected.text
        assert len(pieces) > 1 and usage.completion_tokens == len(expected.tokens)
        assert usage.prompt_tokens > 500


def test_log_probabilities(client, exports):
    found = ask(client, "wildcat", QUESTIONS[0], logprobs=True).choices[0].logprobs.content
    expected = exports.references["wildcat"][0].logprobs
    assert all(abs(one.logprob - other) < 1e-3 for one, other in zip(found, expected, strict=False))


def test_other_ways_to_name_a_context(client, server, exports):
    expected = exports.references["wildcat"][0].text
    asked = {"role": "user", "content": QUESTIONS[0]}
    options = {"model": "smol", "temperature": 0, "max_tokens": ANSWER}
    by_header = client.chat.completions.create(
        messages=[asked], extra_headers={"X-WildCat-Context": "wildcat"}, **options
    )
    marker = {"role": "system", "content": "wildcat_kv context: wildcat"}
    by_message = client.chat.completions.create(messages=[marker, asked], **options)
    for found in (by_header, by_message):
        assert found.choices[0].message.content == expected
    listing = httpx.get(f"{server}/v1/contexts", headers={"Authorization": "Bearer key"}).json()["data"]
    assert {entry["id"] for entry in listing} >= set(exports.references) | set(exports.facts)
    assert httpx.get(f"{server}/v1/contexts").status_code == 401
    text = client.completions.create(
        model="smol", prompt="The author", max_tokens=4, extra_headers={"X-WildCat-Context": "wildcat"}
    )
    assert text.usage.prompt_tokens > 500


def test_a_hundred_requests_eight_at_once(client, server, exports):
    """Some name contexts that are missing, damaged, of another model or that change; some hang up."""
    root = exports.root
    shutil.copytree(root / "wildcat", root / "damaged")
    next((root / "damaged").glob("*.safetensors")).write_bytes(b"nothing")
    shutil.copytree(root / "wildcat", root / "stranger")
    header = json.loads((root / "stranger" / "context.json").read_text())
    header["model"]["hidden_size"] += 1
    (root / "stranger" / "context.json").write_text(json.dumps(header))
    names, done = list(exports.facts), threading.Event()

    def restless():
        """Replace one context by another, over and over."""
        turn = 0
        while not done.wait(0.5):
            turn += 1
            shutil.copytree(root / names[turn % 2], root / ".next")
            shutil.rmtree(root / "restless", ignore_errors=True)
            (root / ".next").rename(root / "restless")

    def one(number):
        kind = number % 10
        if kind < 4:
            name = names[number % len(names)]
            return kind, ask(client, name, FACT_QUESTION).choices[0].message.content == exports.facts[name]
        if kind == 4:
            return kind, ask(client, "restless", FACT_QUESTION).choices[0].message.content in exports.facts.values()
        if kind == 5:
            with ask(client, names[number % len(names)], "Tell a long story.", stream=True) as stream:
                next(iter(stream))
            return kind, True
        bad = {6: "nowhere", 7: "damaged", 8: "stranger", 9: "../wildcat"}[kind]
        return kind, bool(ask(client, bad, FACT_QUESTION))

    def tried(number):
        try:
            return one(number)
        except openai.APIStatusError as error:
            assert error.body["message"] and "\n" not in error.body["message"]
            return number % 10, error.status_code

    changing = threading.Thread(target=restless)
    changing.start()
    try:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            found = list(pool.map(tried, range(100)))
    finally:
        done.set()
        changing.join()
        for name in ("damaged", "stranger", "restless"):
            shutil.rmtree(root / name, ignore_errors=True)
    by_kind = {kind: {result for number, result in found if number == kind} for kind in range(10)}
    assert all(by_kind[kind] == {True} for kind in (0, 1, 2, 3, 5)), by_kind
    assert by_kind[4] <= {True, 400, 404, 409} and True in by_kind[4], by_kind
    assert [by_kind[kind] for kind in (6, 7, 8, 9)] == [{404}, {400}, {400}, {400}], by_kind
    assert ask(client, "wildcat", QUESTIONS[0]).choices[0].message.content == exports.references["wildcat"][0].text
