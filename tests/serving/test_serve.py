"""The server, asked over the loopback by OpenAI's own client."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")

from whet.data.template import render_prompt  # noqa: E402
from whet.errors import InputError  # noqa: E402
from whet.generate import Sampling, generate  # noqa: E402
from whet.serving.limits import Address, Limits  # noqa: E402
from whet.serving.serve import build_app, listen  # noqa: E402
from whet.trained import load_trained  # noqa: E402

LIMITS = Limits(body_bytes=4000, prompt_tokens=120, num_slots=6, num_waiting=8)
TURNS = [{"role": "user", "content": "turn red into a colour"}]


@pytest.fixture(scope="module")
def loaded(tiny_model):
    found = load_trained(str(tiny_model), ["model.dtype=float32"])
    # Random weights end a turn by chance; here answers are as long as they are asked to be.
    found.model.generation_config.eos_token_id = None
    found.tokenizer.eos_token, found.tokenizer.chat_template = None, TEMPLATE
    return found


TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)


@contextlib.contextmanager
def running(loaded, limits=LIMITS, api_key=None):
    import uvicorn

    address = Address("127.0.0.1", 0, api_key)
    app = build_app(loaded, "tiny", limits, address)
    place = listen(address)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [place]})
    thread.start()
    try:
        url = f"http://127.0.0.1:{place.getsockname()[1]}"
        while not server.started:
            time.sleep(0.01)
        yield url
    finally:
        server.should_exit = True
        thread.join()
        place.close()


@pytest.fixture(scope="module")
def url(loaded):
    with running(loaded) as found:
        yield found


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


def health(url):
    with urllib.request.urlopen(f"{url}/health") as answer:
        return json.load(answer)


def until(check, seconds=20):
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end
        time.sleep(0.01)


def expected(loaded, turns, **settings):
    (found,) = generate(
        loaded.model, loaded.tokenizer, [render_prompt(loaded.tokenizer, turns)], Sampling(**settings),
        logprobs=3,
    )  # fmt: skip
    return found


def test_the_model_is_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "whet"
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        client.models.retrieve("gpt-4")


def test_a_greedy_chat_is_what_generate_answers(client, loaded):
    found = client.chat.completions.create(
        model="tiny", messages=TURNS, temperature=0, max_tokens=12, logprobs=True, top_logprobs=3
    )
    own = expected(loaded, TURNS, max_new_tokens=12)
    choice = found.choices[0]
    assert choice.message.content == own.text and choice.message.role == "assistant"
    assert choice.finish_reason == "length"
    assert found.usage.completion_tokens == 12 == len(choice.logprobs.content)
    prompt = render_prompt(loaded.tokenizer, TURNS)
    assert found.usage.prompt_tokens == len(loaded.tokenizer(prompt)["input_ids"])
    for told, item in zip(choice.logprobs.content, own.logprobs, strict=True):
        assert told.token == item.token and bytes(told.bytes).decode() == item.token
        assert told.logprob == pytest.approx(item.logprob, abs=1e-4)
        assert [one.token for one in told.top_logprobs] == [name for name, _ in item.top]


def test_a_stream_is_the_same_piece_by_piece(client, loaded):
    stream = client.chat.completions.create(
        model="tiny", messages=TURNS, temperature=0, max_tokens=40, stream=True, logprobs=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    own = expected(loaded, TURNS, max_new_tokens=40)
    told = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert told[0].delta.role == "assistant" and told[-1].finish_reason == "length"
    assert "".join(choice.delta.content or "" for choice in told) == own.text
    assert sum(bool(choice.delta.content) for choice in told) > 5
    tokens = [item.token for choice in told if choice.logprobs for item in choice.logprobs.content]
    assert tokens == [item.token for item in own.logprobs]
    assert chunks[-1].usage.completion_tokens == 40 and len({chunk.id for chunk in chunks}) == 1


def test_a_completion_echoes_its_prompt_with_log_probabilities(client, loaded):
    found = client.completions.create(
        model="tiny", prompt="turn red into", temperature=0, max_tokens=5, logprobs=2, echo=True
    )
    (own,) = generate(
        loaded.model, loaded.tokenizer, ["turn red into"], Sampling(max_new_tokens=5), logprobs=2,
        echo=True,
    )  # fmt: skip
    choice = found.choices[0]
    assert choice.text == "turn red into" + own.text
    assert choice.logprobs.tokens == [item.token for item in own.logprobs]
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(
        [item.logprob for item in own.logprobs[1:]], abs=1e-4
    )
    places = zip(choice.logprobs.tokens[:3], choice.logprobs.text_offset, strict=False)
    assert all(choice.text.startswith(token, offset) for token, offset in places)
    assert choice.logprobs.top_logprobs[0] is None
    for told, item in zip(choice.logprobs.top_logprobs[1:], own.logprobs[1:], strict=True):
        assert told == pytest.approx(dict(item.top[::-1]), abs=1e-4)


def test_several_prompts_as_text_or_tokens_and_several_answers(client, loaded):
    texts = ["turn red", "four"]
    ids = [loaded.tokenizer(text)["input_ids"] for text in texts]
    settings = {"model": "tiny", "max_tokens": 6, "temperature": 1.0, "seed": 4, "n": 2}
    one = client.completions.create(prompt=texts, **settings)
    other = client.completions.create(prompt=ids, **settings)
    answers = [choice.text for choice in one.choices]
    assert answers == [choice.text for choice in other.choices]
    assert [choice.index for choice in one.choices] == [0, 1, 2, 3]
    assert answers[0] != answers[1] and answers[2] != answers[3]
    alone = client.completions.create(prompt=texts[1], **settings)
    assert [choice.text for choice in alone.choices] == answers[2:]
    assert one.usage.completion_tokens == 24


def test_seeds_repeat_and_without_one_answers_differ(client):
    def ask(**more):
        found = client.chat.completions.create(
            model="tiny", messages=TURNS, max_tokens=12, temperature=1, **more
        )
        return found.choices[0].message.content

    assert ask(seed=7) == ask(seed=7) != ask(seed=8)
    assert len({ask() for _ in range(4)}) > 1


def test_stop_texts_and_filters_reach_the_loop(client, loaded):
    text = expected(loaded, TURNS, max_new_tokens=30).text
    stop = text[9:12]
    found = client.chat.completions.create(
        model="tiny", messages=TURNS, temperature=0, max_tokens=30, stop=["never", stop]
    )
    assert found.choices[0].message.content == text[: text.index(stop)]
    assert found.choices[0].finish_reason == "stop"
    filters = {"top_k": 1, "repetition_penalty": 1.5, "min_p": 0.1}
    one = client.chat.completions.create(
        model="tiny", messages=TURNS, max_tokens=9, seed=1, extra_body=filters
    )
    own = expected(loaded, TURNS, max_new_tokens=9, repetition_penalty=1.5)
    assert one.choices[0].message.content == own.text


def test_content_in_parts_and_developers_are_understood(client):
    parts = [{"type": "text", "text": "say "}, {"type": "text", "text": "it"}]
    turns = [{"role": "developer", "content": parts}, {"role": "user", "content": "red"}]
    plain = [{"role": "system", "content": "say it"}, {"role": "user", "content": "red"}]
    answers = [
        client.chat.completions.create(model="tiny", messages=t, temperature=0, max_completion_tokens=8)
        for t in (turns, plain)
    ]  # fmt: skip
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content


@pytest.mark.parametrize(
    "wrong, match",
    [
        ({"temperature": -1}, "temperature: .*greater than or equal to 0"),
        ({"n": 7}, "at most 6"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5000}, "5000 more were asked for"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "red " * 200}]}, "this server takes 120"),
        ({"stop": [""]}, "stop"),
        ({"frequency_penalty": 0.5}, "'frequency_penalty' is not supported"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "'tools' is not supported"),
        ({"response_format": {"type": "json_object"}}, "'response_format' is not supported"),
        ({"extra_body": {"temprature": 1}}, "did you mean 'temperature'"),
        ({"top_logprobs": 99, "logprobs": True}, "top_logprobs"),
    ],
    ids=str,
)
def test_wrong_requests_are_refused_in_openais_shape(client, wrong, match):
    call = {"model": "tiny", "messages": TURNS, "max_tokens": 4, **wrong}
    with pytest.raises(openai.BadRequestError, match=match) as caught:
        client.chat.completions.create(**call)
    assert caught.value.body["type"] == "invalid_request_error"
    assert set(caught.value.body) == {"message", "type", "param", "code"}


def test_arguments_without_effect_are_let_through(client):
    found = client.chat.completions.create(
        model="tiny", messages=TURNS, max_tokens=2, user="me", metadata={"a": "b"}, store=False,
        frequency_penalty=0, presence_penalty=0, response_format={"type": "text"},
    )  # fmt: skip
    assert found.usage.completion_tokens == 2


def post(url, body, **headers):
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", body, {"Content-Type": "application/json", **headers}
    )
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        text = error.read()
        return error.code, json.loads(text) if text.startswith(b"{") else text


def test_bodies_are_limited_whether_their_length_is_told_or_not(url):
    long = json.dumps(
        {"model": "tiny", "messages": [{"role": "user", "content": "x" * 5000}]}
    ).encode()
    status, body = post(url, long)
    assert status == 413 and body["error"]["code"] == "body_too_large"
    status, body = post(url, iter([long[:3000], long[3000:]]))  # chunked
    assert status == 413 and "4000 bytes" in body["error"]["message"]


def test_what_is_not_json_or_not_called_so_is_refused(url):
    assert post(url, b"{broken")[0] == 400
    assert post(url, b"{}", **{"Content-Type": "text/plain"})[0] == 415
    status, body = post(url, b"{}")
    assert status == 400 and "messages" in body["error"]["message"]
    with pytest.raises(urllib.error.HTTPError, match="404") as caught:
        urllib.request.urlopen(f"{url}/v2/nothing")
    assert json.load(caught.value)["error"]["type"] == "not_found_error"


def test_a_page_with_a_name_of_its_own_is_refused(url):
    assert post(url, b"{}", Host="evil.example")[0] == 400
    request = urllib.request.Request(f"{url}/health", headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(request)


def test_without_the_key_nothing_is_answered(loaded):
    with running(loaded, api_key="geheim") as url:
        for key, ok in (("geheim", True), ("falsch", False), ("", False), ("geheim2", False)):
            with openai.OpenAI(base_url=f"{url}/v1", api_key=key or "x", max_retries=0) as asks:
                calls = [
                    lambda asks=asks: asks.models.list().data,
                    lambda asks=asks: asks.completions.create(
                        model="tiny", prompt="a", max_tokens=1
                    ),
                ]
                for call in calls:
                    if ok:
                        assert call()
                    else:
                        with pytest.raises(openai.AuthenticationError):
                            call()
        assert health(url)["status"] == "ok"


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.7", "::", "example.org"])
def test_other_machines_need_a_key(host):
    with pytest.raises(InputError, match="API key"):
        Address(host)
    assert not Address(host, api_key="k").is_local
    for local in ("127.0.0.1", "localhost", "::1", "127.3.2.1"):
        assert Address(local).is_local


def test_a_taken_port_is_told_before_a_model_is_loaded():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InputError, match="in use"):
            listen(Address("127.0.0.1", taken.getsockname()[1]))


async def ask_many(url, num, **settings):
    async with openai.AsyncOpenAI(
        base_url=f"{url}/v1",
        api_key="none",
        max_retries=0,
        timeout=300,  # a busy machine connects late
    ) as asks:

        async def one(number):
            try:
                found = await asks.completions.create(
                    model="tiny", prompt=f"turn {number}", temperature=0, **settings
                )
            except openai.RateLimitError as error:
                return error
            return found.choices[0].text

        return await asyncio.gather(*(one(number) for number in range(num)))


def test_two_hundred_at_once_are_all_answered_right(loaded):
    limits = Limits(num_slots=16, num_waiting=200)
    with running(loaded, limits) as url:
        found = asyncio.run(ask_many(url, 200, max_tokens=6))
        assert health(url) == {"status": "ok", "running": 0, "waiting": 0}
    prompts = [f"turn {number}" for number in range(200)]
    own = generate(
        loaded.model, loaded.tokenizer, prompts, Sampling(max_new_tokens=6), batch_size=16
    )
    assert found == [completion.text for completion in own]


def test_more_than_the_line_holds_are_told_to_come_again(loaded):
    with running(loaded, Limits(num_slots=2, num_waiting=3)) as url:
        found = asyncio.run(ask_many(url, 30, max_tokens=60))
        refused = [one for one in found if isinstance(one, openai.RateLimitError)]
        assert 0 < len(refused) <= 25 and all(
            isinstance(one, (str, openai.RateLimitError)) for one in found
        )
        assert refused[0].response.headers["retry-after"] == "1"
        assert refused[0].body["code"] == "queue_full"
        assert health(url)["running"] == 0


def test_a_client_that_leaves_frees_its_slot(loaded, monkeypatch):
    from whet.engine.decoder import Decoder

    step = Decoder.step

    def slow_step(self, tokens):
        time.sleep(0.1)  # 200 tokens take 20 seconds: no answer ends by itself while we look
        return step(self, tokens)

    monkeypatch.setattr(Decoder, "step", slow_step)
    with running(loaded, Limits(num_slots=1, num_waiting=4)) as url:
        ask = {"model": "tiny", "messages": TURNS, "max_tokens": 200, "temperature": 0}
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as asks:
            stream = asks.chat.completions.create(**ask, stream=True)
            next(iter(stream))
            assert health(url)["running"] == 1
            stream.close()
            until(lambda: health(url)["running"] == 0, 10)
        waits_for_whole, in_line = leave_a_request(url, ask), leave_a_request(url, ask)
        until(lambda: health(url) == {"status": "ok", "running": 1, "waiting": 1}, 10)
        waits_for_whole.close()
        in_line.close()
        until(lambda: health(url) == {"status": "ok", "running": 0, "waiting": 0}, 10)


def leave_a_request(url, ask):
    """Send a request over a connection of its own; return the connection, its answer unread."""
    connection = socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])))
    body = json.dumps(ask).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    connection.sendall(head.encode() + body)
    return connection


def test_a_model_that_fails_answers_500_and_goes_on(loaded, monkeypatch, caplog):
    from whet.engine.decoder import Decoder

    with running(loaded) as url:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as asks:
            call = {"model": "tiny", "prompt": "turn", "max_tokens": 8, "temperature": 0}
            before = asks.completions.create(**call).choices[0].text
            step = Decoder.step
            with monkeypatch.context() as broken:
                broken.setattr(Decoder, "step", lambda self, tokens: step(self, tokens[:0]))
                with pytest.raises(openai.InternalServerError, match="model failed"):
                    asks.completions.create(**call)
                stream = asks.completions.create(**call, stream=True)
                with pytest.raises(openai.APIError, match="model failed"):
                    list(stream)
            assert asks.completions.create(**call).choices[0].text == before
    assert "decoding failed" in caplog.text


def test_sigterm_lets_answers_end_and_takes_no_more(tiny_model):
    command = [
        sys.executable, "-m", "whet", "serve", str(tiny_model), "--port", "0", "--name", "t",
        "--drain", "30",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "http://" in line:
                break
        assert "http://127.0.0.1:" in lines[-1], lines
        url = lines[-1].split()[-1]
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as asks:
            call = {
                "model": "t",
                "prompt": "turn red",
                "temperature": 1.0,
                "seed": 1,
                "max_tokens": 150,
            }
            whole = asks.completions.create(**call).choices[0].text
            stream = iter(asks.completions.create(**call, stream=True))
            text = next(stream).choices[0].text
            process.send_signal(signal.SIGTERM)
            text += "".join(chunk.choices[0].text for chunk in stream)
            assert text == whole
        assert process.wait(20) == 0
        with pytest.raises(OSError):
            urllib.request.urlopen(url.removesuffix("/v1") + "/health")
