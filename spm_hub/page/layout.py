"""The page in Gradio: four tabs over one studio that all visitors share."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gradio as gr

from spm_hub.page import markup
from spm_hub.page.lessons import METHODS, Progress, School
from spm_hub.page.studio import Frame, Studio, checked_number, in_words

TITLE = "spm-hub: erasers for text-to-image models"
_FONTS = ("system-ui", "sans-serif")
_MONOSPACED = ("ui-monospace", "monospace")
_FIRST = "snoopy"
"""The eraser that is chosen at first, where there is one of this name."""
_MOST_SEED = 2**32 - 1
_MOST_STRENGTH = 3.0
_VISITORS = 16
"""Visitors that are answered at once; the pipeline itself draws in batches."""


class Page:
    """The page's components and what their events do; build it with `make`."""

    def __init__(self, studio: Studio, school: School, *, steps: int = 25, hub: bool = True) -> None:
        """Take the steps of a picture by default; hub: whether erasers on the Hub can be searched."""
        self._studio, self._school, self._steps, self._hub = studio, school, steps, hub

    def make(self) -> Any:
        """Return the page as `gradio.Blocks`."""
        with gr.Blocks(title=TITLE, analytics_enabled=False) as blocks:
            gr.Markdown("# spm-hub\nErase a concept from a model, see the difference, and take it back.")
            bases = list(self._studio.bases)
            base = gr.Dropdown(bases, value=bases[0], label="Base model", elem_id="base")
            with gr.Tab("Draw", id="draw"):
                chosen = self._draw_tab(base, blocks)
            with gr.Tab("Train", id="train"):
                trained = self._train_tab(base, chosen)
            with gr.Tab("Report", id="report"):
                reported = self._report_tab()
            with gr.Tab("Compare", id="compare"):
                compared = self._compare_tab(base)
            lists = [chosen, reported, *compared]
            blocks.load(self._refresh, lists, lists, show_progress="hidden")
            trained.then(self._refresh, lists, lists, show_progress="hidden")
        blocks.queue(default_concurrency_limit=_VISITORS)
        return blocks

    def _draw_tab(self, base: Any, blocks: Any) -> Any:
        names = self._studio.names()
        first = _FIRST if _FIRST in names else next(iter(names), _FIRST)
        strengths = gr.State({})
        chosen = gr.Dropdown(
            names, value=[first] if names else [], multiselect=True, label="Erasers", elem_id="erasers",
            info="Type to search among those of the registry." if names else "There is none yet: train one.",
        )  # fmt: skip
        if self._hub:
            self._hub_search(chosen)

        def controls(names: Sequence[str], values: Mapping[str, float]) -> None:
            for name in names:
                with gr.Row(key=f"row-{name}", equal_height=True):
                    strength = gr.Slider(
                        0, _MOST_STRENGTH, values.get(name, 1.0), step=0.05, label=f"Strength of {name}",
                        key=f"strength-{name}", elem_id=f"strength-{name}", scale=4, min_width=160,
                    )  # fmt: skip
                    recover = gr.Button(
                        f"Recover {name}", key=f"recover-{name}", elem_id=f"recover-{name}", min_width=90
                    )
                strength.release(_with(name), [strengths, strength], strengths, show_progress="hidden")
                strength.change(_with(name), [strengths, strength], strengths, show_progress="hidden")
                recover.click(_without(name), chosen, chosen, show_progress="hidden").then(
                    self._draw, inputs, outputs, show_progress="hidden"
                )

        gr.render(inputs=[chosen, strengths], triggers=[blocks.load, chosen.change], show_progress="hidden")(controls)
        prompt = gr.Textbox(label="Prompt", value=f"{first} on the beach", elem_id="prompt", max_lines=2)
        with gr.Row():
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=_MOST_SEED, elem_id="seed")
            steps = gr.Slider(1, self._studio.limits.steps, self._steps, step=1, label="Steps", elem_id="steps")
        with gr.Row():
            draw = gr.Button("Draw", variant="primary", elem_id="draw")
            stop = gr.Button("Stop", elem_id="stop-drawing")
        said = gr.HTML(markup.remark("Choose erasers, type a prompt, and press Draw or Enter."), elem_id="said")
        with gr.Row():
            without = _picture("Without", "without", 320)
            with_ = _picture("With the erasers", "with", 320)
        why = gr.HTML(elem_id="why")
        inputs = [base, chosen, strengths, prompt, seed, steps]
        outputs = [without, with_, said, why]
        event = gr.on([draw.click, prompt.submit], self._draw, inputs, outputs, show_progress="hidden")
        stop.click(lambda: markup.remark("stopped"), None, said, cancels=[event], show_progress="hidden")

        return chosen

    def _hub_search(self, chosen: Any) -> None:
        with gr.Accordion("Find erasers on the Hub", open=False):
            words = gr.Textbox(label="Words", placeholder="van gogh", elem_id="hub-words", max_lines=1)
            search = gr.Button("Search", elem_id="hub-search")
            found = gr.Dropdown([], label="Found", elem_id="hub-found", interactive=True)
            fetch = gr.Button("Get it", elem_id="hub-get")
            said = gr.HTML(elem_id="hub-said")
            gr.on([search.click, words.submit], self._search, words, [found, said], show_progress="minimal")
            fetch.click(self._fetch, [found, chosen], [chosen, said], show_progress="minimal")

    def _train_tab(self, base: Any, chosen: Any) -> Any:
        gr.Markdown("A new eraser is kept in the registry, and everybody who uses this page can choose it.")
        concept = gr.Textbox(label="Concept to erase", placeholder="church", elem_id="concept", max_lines=1)
        method = gr.Radio(list(METHODS), value=METHODS[0], label="Method", elem_id="method")
        steps = gr.Slider(10, 300, 100, step=10, label="Steps (spm)", elem_id="training-steps")
        with gr.Row():
            train = gr.Button("Train", variant="primary", elem_id="train")
            stop = gr.Button("Stop", elem_id="stop-training")
        said = gr.HTML(markup.remark("instant takes seconds; spm some minutes."), elem_id="trained")
        curve = gr.LinePlot(_frame(()), x="step", y="loss", color="part", label="Losses", height=220, elem_id="curve")
        pictures = gr.Gallery(label="The concept, as it goes", columns=4, height=260, elem_id="pictures", format="png")
        outputs = [said, curve, pictures, chosen]
        event = gr.on(
            [train.click, concept.submit], self._train, [base, concept, method, steps, chosen], outputs,
            show_progress="hidden",
        )  # fmt: skip
        stop.click(self._stop, None, said, show_progress="hidden")
        return event

    def _report_tab(self) -> Any:
        names = self._studio.names()
        which = gr.Dropdown(names, value=names[0] if names else None, label="Eraser", elem_id="reported")
        read = gr.Button("Read its report", variant="primary", elem_id="read")
        shown = gr.HTML(elem_id="report-text")
        gr.on([read.click, which.input], self._report, which, shown, show_progress="hidden")
        return which

    def _compare_tab(self, base: Any) -> list[Any]:
        names = self._studio.names()
        with gr.Row():
            pair = [
                gr.Dropdown(
                    names, value=names[index] if index < len(names) else None, label=f"Eraser {index + 1}",
                    elem_id=f"compared-{index + 1}",
                )
                for index in range(2)
            ]  # fmt: skip
        prompt = gr.Textbox(label="Prompt", value="a dog", elem_id="compared-prompt", max_lines=2)
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=_MOST_SEED, elem_id="compared-seed")
        draw = gr.Button("Compare", variant="primary", elem_id="compare")
        said = gr.HTML(elem_id="compared-said")
        with gr.Row():
            pictures = [
                _picture(label, f"compared-{key}", 280)
                for label, key in (("Without", "bare"), ("Eraser 1", "one"), ("Eraser 2", "two"))
            ]
        why = gr.HTML(elem_id="compared-why")
        gr.on(
            [draw.click, prompt.submit], self._compare, [base, *pair, prompt, seed], [*pictures, said, why],
            show_progress="hidden",
        )  # fmt: skip
        return pair

    def _draw(
        self, base: str, chosen: list[str], strengths: Mapping[str, float], prompt: str, seed: Any, steps: Any
    ) -> Iterator[tuple[Any, ...]]:
        """Draw without and with the chosen erasers, side by side."""
        keep = gr.skip()
        acting = {name: float(strengths.get(name, 1.0)) for name in chosen or []}
        try:
            number = checked_number("Seed", seed, 0, _MOST_SEED)
            count = checked_number("Steps", steps, 1, self._studio.limits.steps)
            yield keep, keep, markup.remark("waiting for its turn"), keep
            why = markup.gammas(self._studio.explain(base, prompt, list(acting)), acting)
            for frame in self._studio.draw(base, prompt, [{}, acting], seed=number, steps=count):
                yield *(keep if one is None else one for one in frame.pictures), markup.remark(_state(frame)), why
        except Exception as error:
            yield keep, keep, markup.remark(in_words(error), wrong=True), keep

    def _compare(
        self, base: str, one: str | None, two: str | None, prompt: str, seed: Any
    ) -> Iterator[tuple[Any, ...]]:
        """Draw without an eraser, with one, and with another."""
        keep = gr.skip()
        if not one or not two:
            yield keep, keep, keep, markup.remark("choose two erasers", wrong=True), keep
            return
        try:
            number = checked_number("Seed", seed, 0, _MOST_SEED)
            names = dict.fromkeys((one, two), 1.0)
            yield keep, keep, keep, markup.remark("waiting for its turn"), keep
            why = markup.gammas(self._studio.explain(base, prompt, list(names)), names)
            alike = (
                f"Their changes have the cosine {self._studio.similarity(one, two):.3f}: 1 is the same, 0 unrelated."
            )
            sets = [{}, {one: 1.0}, {two: 1.0}]
            for frame in self._studio.draw(base, prompt, sets, seed=number, steps=self._steps):
                shown = (keep if picture is None else picture for picture in frame.pictures)
                yield *shown, markup.remark(_state(frame)), f"{why}<p>{alike}</p>"
        except Exception as error:
            yield keep, keep, keep, markup.remark(in_words(error), wrong=True), keep

    def _train(
        self, base: str, concept: str, method: str, steps: Any, chosen: list[str], request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        """Train an eraser, and choose it once it is finished."""
        keep = gr.skip()
        drawn = -1
        try:
            for now in self._school.train(str(request.session_hash), base, concept, method, int(steps)):
                pictures = [*now.pictures] if len(now.pictures) != drawn else keep
                drawn = len(now.pictures)
                update = gr.update(choices=self._studio.names(), value=[*chosen, now.name]) if now.name else keep
                yield markup.remark(_lesson(now)), _frame(now.losses) if now.losses else keep, pictures, update
        except Exception as error:
            yield markup.remark(in_words(error), wrong=True), keep, keep, keep

    def _stop(self, request: gr.Request) -> str:
        stopped = self._school.stop(str(request.session_hash))
        return markup.remark("stopping after this step" if stopped else "no training of yours is going on")

    def _report(self, name: str | None) -> str:
        try:
            return markup.report(self._studio.manifest(name)) if name else markup.remark("choose an eraser", wrong=True)
        except Exception as error:
            return markup.remark(in_words(error), wrong=True)

    def _search(self, words: str) -> tuple[Any, str]:
        from spm_hub.hub.search import search

        try:
            found = search(words)
        except Exception as error:
            return gr.skip(), markup.remark(in_words(error), wrong=True)
        said = f"{len(found)} found" if found else f"nothing on the Hub matches {words!r}"
        choices = [(f"{one.repo}: {', '.join(one.erases) or 'unknown'}", one.repo) for one in found]
        return gr.update(choices=choices, value=choices[0][1] if choices else None), markup.remark(said)

    def _fetch(self, repo: str | None, chosen: list[str]) -> tuple[Any, str]:
        if not repo:
            return gr.skip(), markup.remark("search first, and choose one of those found", wrong=True)
        try:
            name = self._studio.fetch(repo)
        except Exception as error:
            return gr.skip(), markup.remark(in_words(error), wrong=True)
        return gr.update(choices=self._studio.names(), value=[*chosen, name]), markup.remark(f"{name} is here")

    def _refresh(self, *values: Any) -> list[Any]:
        """Return the present names for every list of erasers; others may have trained some meanwhile."""
        names = self._studio.names()
        return [gr.update(choices=names, value=_among(value, names)) for value in values]


def launch_options() -> dict[str, Any]:
    """Return how the page looks: fonts of the visitor's machine, nothing from other hosts."""
    theme = gr.themes.Soft(font=_FONTS, font_mono=_MONOSPACED)
    return {"theme": theme, "css": markup.STYLE, "ssr_mode": False, "footer_links": [], "show_error": True}


def free_port(host: str) -> int:
    """Return a port that nothing listens on."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _picture(label: str, name: str, height: int) -> Any:
    """Return the place of a picture; a small one is enlarged."""
    return gr.Image(
        label=label, interactive=False, elem_id=name, elem_classes="spm-picture", height=height, min_width=120,
        buttons=["download", "fullscreen"],
    )  # fmt: skip


def _among(value: Any, names: Sequence[str]) -> Any:
    if isinstance(value, list):
        return [name for name in value if name in names]
    return value if value in names else next(iter(names), None)


def _with(name: str) -> Any:
    """Return what notes a strength that a visitor has moved."""

    def note(strengths: Mapping[str, float], value: float) -> dict[str, float]:
        return {**strengths, name: value}

    return note


def _without(name: str) -> Any:
    """Return what takes an eraser out of those that a visitor has chosen."""

    def recover(chosen: Sequence[str]) -> list[str]:
        return [one for one in chosen if one != name]

    return recover


def _state(frame: Frame) -> str:
    if frame.drawn:
        return "drawn, from the same noise"
    return f"step {frame.step} of {frame.total}" if frame.step else "waiting for its turn"


def _lesson(now: Progress) -> str:
    if now.name:
        return f"{now.verdict}; it is chosen on the first tab"
    return now.verdict or (f"step {now.step} of {now.total}" if now.step else "loading the model")


def _frame(losses: Sequence[tuple[int, str, float]]) -> Any:
    """Return losses as the table that a plot takes."""
    from pandas import DataFrame

    return DataFrame(list(losses), columns=["step", "part", "loss"])
