"""A load test of `spmhub serve` on loopback: many clients, erasers that come and go, and every picture compared.

    python benchmarks/serving.py                        # 1,000 requests of 8 clients; needs "spm-hub[serve]"
    python benchmarks/serving.py --requests 50

Each client sends its requests over one connection, one after the other: half of them exact, with erasers that the
request names, recovers, or leaves to the server. Meanwhile an operator attaches and recovers erasers over the same
interface. Afterwards a pipeline of this process, with `attach(pipe, [the erasers that the answer names])`, draws every
prompt alone, and each picture is compared with that, and with the pictures of all other requests.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from record import record

import spm_hub

ROOT = Path(__file__).parents[1]
STEPS = 2
CLIENTS = 8
LASTING = ("snoopy", "mickey")
"""Erasers that are attached all the time; requests name them."""
COMING = ("van-gogh", "spongebob")
"""Erasers that the operator attaches and recovers."""
SUBJECTS = ("snoopy", "mickey", "spongebob", "dog", "cat", "church", "parachute", "pikachu")
PLACES = ("", " on the beach", " by van gogh", " in the snow")
SEEDS = 2
SETS: tuple[dict[str, Any], ...] = (
    {}, {"erasers": []}, {"erasers": ["snoopy"]}, {"erasers": {"mickey": 0.5, "snoopy": 1.0}}, {"recover": ["snoopy"]}
)  # fmt: skip


def requests_of(number: int) -> list[dict[str, Any]]:
    """The bodies of all requests; prompts, seeds and erasers are shuffled by one seed."""
    order = random.Random(0)
    pictures = [
        (subject + place, seed) for subject in dict.fromkeys(SUBJECTS) for place in PLACES for seed in range(SEEDS)
    ]
    bodies = []
    for index in range(number):
        prompt, seed = order.choice(pictures)
        bodies.append({"prompt": prompt, "seed": seed, "exact": index % 2 == 0, **order.choice(SETS)})
    return bodies


class Client(threading.Thread):
    """Sends its share of the requests over one connection."""

    def __init__(self, port: int, bodies: list[tuple[int, dict[str, Any]]], answers: dict[int, dict[str, Any]]) -> None:
        super().__init__()
        self.port, self.bodies, self.answers = port, bodies, answers

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        for index, body in self.bodies:
            begun = time.monotonic()
            status, answer = ask(connection, "POST", "/v1/images/generations", body)
            self.answers[index] = {"status": status, "seconds": time.monotonic() - begun, "answer": answer}


def ask(connection: http.client.HTTPConnection, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    data = None if body is None else json.dumps(body)
    connection.request(method, path, data, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def operate(port: int, ended: threading.Event, seconds: list[float], refused: list[Any]) -> None:
    """Attach and recover erasers, one change after the other, until the clients have ended."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    attached: set[str] = set()
    order = random.Random(1)
    while not ended.wait(1.0):
        name = order.choice(COMING)
        begun = time.monotonic()
        if name in attached:
            status, answer = ask(connection, "DELETE", f"/v1/erasers/{name}")
            attached.discard(name)
        else:
            status, answer = ask(connection, "POST", "/v1/erasers", {"name": name})
            attached.add(name)
        seconds.append(time.monotonic() - begun)
        if status not in (200, 201):
            refused.append(answer)


def pixels(answer: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))).astype(np.int16)


class Reference:
    """One pipeline without a server, which draws each prompt alone with the erasers of an answer attached."""

    def __init__(self) -> None:
        self.pipe = spm_hub.load_pipeline("sketchbook", device="cpu")
        self.adapters = {name: spm_hub.load(ROOT / "adapters" / f"{name}.safetensors") for name in (*LASTING, *COMING)}
        self.drawn: dict[Any, np.ndarray] = {}

    def picture(self, body: dict[str, Any], erasers: list[dict[str, Any]]) -> np.ndarray:
        strengths = {one["id"]: one["strength"] for one in erasers}
        key = body["prompt"], body["seed"], tuple(sorted(strengths.items()))
        if key not in self.drawn:
            with spm_hub.attach(self.pipe, [self.adapters[name] for name in strengths], strength=strengths or None):
                made = self.pipe(
                    body["prompt"], generator=torch.Generator().manual_seed(body["seed"]), num_inference_steps=STEPS
                )
            self.drawn[key] = np.asarray(made.images[0]).astype(np.int16)
        return self.drawn[key]


def wanted_names(body: dict[str, Any], names: set[str]) -> bool:
    """Whether these are erasers that the request allows: those it names, or all that may be attached."""
    if "erasers" in body:
        return names == set(body["erasers"])
    left_out = set(body.get("recover", ()))
    return set(LASTING) - left_out <= names <= (set(LASTING) | set(COMING)) - left_out


def compare(bodies: list[dict[str, Any]], answers: dict[int, dict[str, Any]]) -> dict[str, Any]:
    reference = Reference()
    found: Counter[str] = Counter()
    most, differing, values = 0, 0, 0
    sets: Counter[str] = Counter()
    for index, answer in answers.items():
        body = bodies[index]
        if answer["status"] != 200:
            continue
        one = answer["answer"]["data"][0]
        names = {eraser["id"] for eraser in one["erasers"]}
        sets[" ".join(sorted(names)) or "none"] += 1
        found["wrong_erasers"] += not wanted_names(body, names)
        found["wrong_seed"] += one["seed"] != body["seed"]
        apart = np.abs(pixels(answer["answer"]) - reference.picture(body, one["erasers"]))
        kind = "exact" if body["exact"] else "batched"
        found[kind] += 1
        found[f"{kind}_identical"] += not apart.any()
        found["mixed"] += int(apart.max()) > 1
        if kind == "batched":
            most, differing, values = (
                max(most, int(apart.max())),
                differing + int((apart > 0).sum()),
                values + apart.size,
            )
            found["shared_a_batch"] += one["drawn_together"] > 1
    drawn = list(reference.drawn.values())
    pairs = Counter(
        "identical" if not (apart := np.abs(one - two).max()) else "one level" if apart == 1 else "more"
        for index, one in enumerate(drawn)
        for two in drawn[:index]
    )
    return {
        **found, "greatest_difference_in_levels": most,
        "share_of_values_that_differ": differing / values if values else 0,
        "references": len(drawn), "pairs_of_references_by_difference": dict(pairs), "sets_of_erasers": dict(sets),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    number = parser.parse_args().requests
    torch.set_num_threads(1)
    bodies = requests_of(number)
    command = [
        sys.executable, "-m", "spm_hub.cli", "serve", "--adapters", ",".join(LASTING), "--registry", str(ROOT),
        "--steps", str(STEPS), "--port", "0", "--quiet", "--device", "cpu",
    ]  # fmt: skip
    # Sums on two threads are rounded otherwise than on one.
    alike = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=alike) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline().rsplit(":", 1)[1])
        answers: dict[int, dict[str, Any]] = {}
        changes: list[float] = []
        refused: list[Any] = []
        clients = [Client(port, list(enumerate(bodies))[index::CLIENTS], answers) for index in range(CLIENTS)]
        ended = threading.Event()
        operator = threading.Thread(target=operate, args=(port, ended, changes, refused))
        watched = psutil.Process(process.pid)
        cpu, begun = sum(watched.cpu_times()[:2]), time.monotonic()
        for thread in (*clients, operator):
            thread.start()
        for client in clients:
            client.join()
        seconds, cpu = time.monotonic() - begun, sum(watched.cpu_times()[:2]) - cpu
        ended.set()
        operator.join()
        memory = watched.memory_info().rss / 2**20
        process.send_signal(signal.SIGTERM)
        code = process.wait(600)
    statuses = Counter(str(one["status"]) for one in answers.values())
    taken = sorted(one["seconds"] for one in answers.values() if one["status"] == 200)
    numbers = {
        "requests": number, "clients": CLIENTS, "steps": STEPS, "statuses": dict(statuses),
        "lost": number - len(answers), "seconds": round(seconds, 1), "cpu_seconds_of_the_server": round(cpu, 1),
        "cpu_seconds_a_picture": round(cpu / len(taken), 4),
        "latency_seconds": {
            "median": round(statistics.median(taken), 3), "95th percentile": round(taken[int(0.95 * len(taken))], 3),
        },
        "changes_of_erasers": len(changes), "changes_refused": len(refused),
        "median_seconds_of_a_change": round(statistics.median(changes), 3) if changes else None,
        "memory_mib": round(memory), "exit_code": code, "pictures": compare(bodies, answers),
    }  # fmt: skip
    record("serving" if number == 1000 else "serving-trial", numbers, seeds={"requests": 0, "operator": 1})
    print(json.dumps(numbers, indent=2))


if __name__ == "__main__":
    main()
