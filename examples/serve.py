"""Serve pictures from one pipeline to several threads, and change its erasers while it serves.

python examples/serve.py            # in the repository, which has the erasers
"""

import queue
import threading
from concurrent.futures import Future

import spm_hub

pipe = spm_hub.load_pipeline("sketchbook")
pipe.set_progress_bar_config(disable=True)
erasers = spm_hub.attach(pipe, [])  # once, before any thread draws: later changes then wait for the picture in progress
requests: queue.Queue[tuple[str, Future] | None] = queue.Queue()


def work() -> None:
    while (request := requests.get()) is not None:
        prompt, answer = request
        answer.set_result((pipe(prompt).images[0], erasers.gates(prompt)))


def ask(prompt: str) -> Future:
    requests.put((prompt, answer := Future()))
    return answer


workers = [threading.Thread(target=work) for _ in range(3)]
for worker in workers:
    worker.start()
answers = [ask(prompt) for prompt in ("snoopy", "a dog")]
erasers.add(spm_hub.load("snoopy"))  # a moderator erases snoopy, while pictures are drawn
answers += [ask(prompt) for prompt in ("snoopy", "a cat")]
print([gates for _, gates in (answer.result() for answer in answers)])
erasers.recover("snoopy")  # and allows him again
for _ in workers:
    requests.put(None)
