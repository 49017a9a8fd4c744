"""The server over real HTTP on this machine, with the extra "serve"."""

import base64
import io
import json
import re
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from pico import pico_eraser, pico_pipeline
from PIL import Image

from spm_hub.attachment.attachment import attach
from spm_hub.registry.registry import Registry

pytest.importorskip("fastapi", reason='needs pip install "spm-hub[serve]"')
pytest.importorskip("uvicorn", reason='needs pip install "spm-hub[serve]"')

from spm_hub.serving import engine, server
from spm_hub.serving.requests import Limits, Menu
from spm_hub.serving.service import Service

KEY = "correct-horse"
PROMPTS = ("snoopy on the beach", "a dog", "mickey mouse", "a church")


def adapter(pipe, name):
    return pico_eraser(pipe.unet, name, seed=sum(map(ord, name)))


class Running:
    """A server in a thread."""

    def __init__(self, registry, **options):
        pipe = pico_pipeline()
        adapters = [adapter(pipe, "snoopy"), adapter(pipe, "nudity")]
        menu = Menu("pico", Limits(side=16, pictures=3, steps=20, prompt=60, body=2000), 2, None, frozenset({"nudity"}))
        self.service = Service(pipe, attach(pipe, adapters), adapters, menu, registry=registry, **options)
        self._listening = server.listening("127.0.0.1", 0)
        listener = self._listening.__enter__()
        listener.listen(64)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.thread = threading.Thread(target=server.run, args=(self.service, listener), kwargs={"key": KEY})
        self.thread.start()

    def ask(self, method, path, body=None, key=KEY, kind="application/json"):
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, method=method)
        for name, value in (("Authorization", f"Bearer {key}"), ("Content-Type", kind)):
            request.add_header(name, value)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                status, text = answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read().decode()
        return status, json.loads(text) if text.startswith("{") else text

    def draw(self, **body):
        return self.ask("POST", "/v1/images/generations", body)

    def stop(self):
        self.service.draining = True
        self.thread.join(60)
        assert not self.thread.is_alive()


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    registry = Registry(tmp_path_factory.mktemp("registry"))
    registry.add(adapter(pico_pipeline(), "mickey"))
    running = Running(registry.root, together=4, patience=0.02)
    yield running
    running.stop()


def pixels(one):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(one["b64_json"])))).astype(int)


def reference(prompt, seed, names):
    pipe = pico_pipeline()
    with attach(pipe, [adapter(pipe, name) for name in names]):
        made = pipe(prompt, generator=torch.Generator().manual_seed(seed), num_inference_steps=2)
    return np.asarray(made.images[0]).astype(int)


def test_pictures_are_those_of_a_pipeline_with_these_erasers(running):
    status, made = running.draw(prompt="snoopy on the beach", n=2, seed=7, exact=True, model="pico", size="16x16")
    assert status == 200
    for index, one in enumerate(made["data"]):
        assert one["seed"] == 7 + index
        assert (pixels(one) == reference("snoopy on the beach", 7 + index, ["snoopy", "nudity"])).all()
    status, made = running.draw(prompt="snoopy on the beach", seed=7, exact=True, recover=["snoopy"])
    (one,) = made["data"]
    assert (pixels(one) == reference("snoopy on the beach", 7, ["nudity"])).all()
    assert [eraser["id"] for eraser in one["erasers"]] == ["nudity"]


def test_clients_at_once_get_their_own_pictures(running):
    asked = [
        {"prompt": prompt, "seed": seed, "erasers": names}
        for seed, prompt in enumerate(PROMPTS)
        for names in (["snoopy", "nudity"], ["nudity"])
    ]
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda body: running.draw(**body), asked))
    for body, (status, made) in zip(asked, answers, strict=True):
        assert status == 200, made
        wanted = reference(body["prompt"], body["seed"], body["erasers"])
        assert abs(pixels(made["data"][0]) - wanted).max() <= 1
    assert max(made["data"][0]["drawn_together"] for _, made in answers) > 1


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"prompt": " "}, 400, "prompt is empty"),
        ({"prompt": "x" * 61}, 400, "the length of prompt is 61, and this server allows 60"),
        ({"promt": "x"}, 400, "the field 'prompt' is missing"),
        ({"prompt": "x", "n": 4}, 400, "n is 4, and this server allows 3"),
        ({"prompt": "x", "n": True}, 400, "n is 'True'"),
        ({"prompt": "x", "steps": 21}, 400, "steps is 21"),
        ({"prompt": "x", "size": "24x16"}, 400, "a side of size is 24"),
        ({"prompt": "x", "size": "12x16"}, 400, "multiples of 8"),
        ({"prompt": "x", "seed": 2**64}, 400, "below 2\\^64"),
        ({"prompt": "x", "erasers": {"nudity": "a"}}, 400, "erasers.nudity is 'a'"),
        ({"prompt": "x", "response_format": "url"}, 400, "response_format is 'url'"),
        ({"prompt": "x", "model": "sdxl"}, 404, "no model 'sdxl'"),
        ({"prompt": "x", "erasers": ["nudity", "snopy"]}, 404, "no eraser 'snopy'"),
        ({"prompt": "x", "recover": ["Nudity"]}, 403, "nudity acts on every picture"),
        ({"prompt": "x", "erasers": []}, 403, "nudity acts on every picture"),
        ({"prompt": "x", "erasers": {"nudity": 0.0}}, 403, "nudity acts on every picture"),
        (b"nonsense", 400, "another form"),
        (b'{"prompt": "' + b"x" * 3000 + b'"}', 400, "the length of the body"),
    ],
)
def test_wrong_requests_are_refused_in_words(running, body, status, words):
    found, answer = running.ask("POST", "/v1/images/generations", body)
    assert found == status
    assert set(answer) == {"error"}
    assert re.search(words, answer["error"]["message"])


def test_keys_kinds_and_routes(running):
    for key in ("", "wrong", KEY + "x", KEY[:-1]):
        assert running.ask("GET", "/v1/models", key=key)[0] == 401
    assert running.ask("GET", "/health", key="")[0] == 200
    status, answer = running.ask("POST", "/v1/gates", {"prompt": "x"}, kind="text/plain")
    assert (status, "content type" in answer["error"]["message"]) == (400, True)
    assert running.ask("GET", "/v2")[0] == 404
    assert running.ask("PATCH", "/v1/models", {})[0] == 405
    assert running.ask("GET", "/v1/models")[1]["data"][0]["id"] == "pico"
    assert "/v1/images/generations" in running.ask("GET", "/openapi.json")[1]["paths"]


def test_erasers_come_from_the_registry_and_go(running):
    assert running.ask("POST", "/v1/erasers", {"name": "mickey"})[0] == 201
    assert running.ask("POST", "/v1/erasers", {"name": "mickey"})[0] == 400
    names = [one["id"] for one in running.ask("GET", "/v1/erasers")[1]["data"]]
    assert names == ["snoopy", "nudity", "mickey"]
    gates = running.ask("POST", "/v1/gates", {"prompt": ["mickey", "a dog"], "erasers": ["mickey"]})[1]["data"]
    pipe = pico_pipeline()
    with attach(pipe, [adapter(pipe, "mickey")]) as erasers:
        for one in gates:
            assert one["erasers"][0]["gamma"] == pytest.approx(erasers.gates(one["prompt"])["mickey"], abs=1e-6)
    assert running.ask("DELETE", "/v1/erasers/mickey")[0] == 200
    assert running.ask("DELETE", "/v1/erasers/mickey")[0] == 404
    assert running.ask("DELETE", "/v1/erasers/nudity")[0] == 403
    for path in ("../registry", "/etc/passwd", "adapters/mickey.safetensors", "someone/mickey"):
        assert running.ask("POST", "/v1/erasers", {"name": path})[0] == 404


def test_counts_add_up(running):
    before = counts(running)
    assert running.draw(prompt="a dog", n=3)[0] == 200
    assert running.draw(prompt="")[0] == 400
    after = counts(running)
    assert after["spmhub_batch_pictures_sum"] - before["spmhub_batch_pictures_sum"] == 3
    for status in (200, 400):
        name = f'spmhub_requests_total{{route="images",status="{status}"}}'
        assert after[name] - before.get(name, 0) == 1
    assert after['spmhub_batch_pictures_bucket{le="+Inf"}'] == after["spmhub_batch_pictures_count"]


def counts(running):
    lines = [line for line in running.ask("GET", "/metrics")[1].splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_a_draining_server_finishes_and_refuses(monkeypatch):
    held, draw = threading.Event(), engine.draw
    monkeypatch.setattr(engine, "draw", lambda *given: held.wait(60) and draw(*given))
    running = Running(None, together=1)
    with ThreadPoolExecutor(4) as clients:
        begun = [clients.submit(running.draw, prompt="a dog", seed=seed, n=2) for seed in range(4)]
        while running.service.engine.waiting < 7:  # one of the eight pictures is being drawn
            time.sleep(0.001)
        running.service.draining = True
        assert running.draw(prompt="a dog")[0] == 503
        status, health = running.ask("GET", "/health")
        assert (status, health["status"]) == (503, "draining")
        held.set()
        assert [one.result(60)[0] for one in begun] == [200] * 4
    running.stop()
    with pytest.raises(urllib.error.URLError):
        running.ask("GET", "/health")
