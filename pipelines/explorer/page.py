"""The page of the explorer, by gradio: controls, and for each tab a function of `views` whose pictures it shows."""

import functools
import html
import io
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from pipelines.console import UserError
from pipelines.explorer.views import TILES, Plane, Strip, Views, hidden_part
from pipelines.pages.scores import uri
from pipelines.runs.pictures import tiled
from pipelines.runs.run import names_of_runs
from pipelines.two_stage import TwoStage, sampling
from stage2_prior.sampling import Sampling

ANY = "any"
HELD_OUT = "the number of a held-out image"
PLANE_PIXELS = 720
EDITOR_PIXELS = 336  # to which a picture is enlarged, at most, to paint over it
LARGEST = 64  # images drawn at a click
CSS = """
.strip { display: flex; flex-wrap: wrap; gap: 3px; margin: 2px 0 4px; }
.strip img { width: 55px; max-width: 100%; image-rendering: pixelated; background: #8888; }
.heading { font-weight: 600; margin: 10px 0 0; } .note { opacity: .75; margin: 0; overflow-wrap: anywhere; }
.sentence { border-left: 4px solid #c60; padding: 4px 0 4px 12px; }
.legend span { display: inline-block; margin-right: 12px; }
"""
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # none is downloaded


def strips_html(strips: Sequence[Strip]) -> str:
    """Each strip's heading, pictures and note."""
    parts = []
    for strip in strips:
        parts.append(f'<p class="heading">{html.escape(strip.heading)}</p>')
        if strip.images is not None:
            pictures = "".join(
                f'<img src="{uri(image)}" alt="{html.escape(strip.heading)}, number {number}">'
                for number, image in enumerate(strip.images)
            )
            parts.append(f'<div class="strip">{pictures}</div>')
        if strip.note:
            parts.append(f'<p class="note">{html.escape(strip.note)}</p>')
    return "".join(parts)


def sentence(error: UserError) -> str:
    return f'<p class="sentence">{html.escape(str(error))}</p>'


def shown(function: Callable[..., list[Strip]]) -> Callable[..., str]:
    """What a function of the explorer returns, as HTML; what the user can mend is a sentence in its place."""

    @functools.wraps(function)
    def handler(*inputs: Any) -> str:
        try:
            return strips_html(function(*inputs))
        except UserError as error:
            return sentence(error)

    return handler


def whole(value: float | None, name: str, least: int = 0) -> int:
    """A number field's value. Raises UserError where it is empty or no whole number from `least` up."""
    if value is None or value != int(value) or not least <= value < 2**62:
        raise UserError(f"{name} is a whole number from {least} up")
    return int(value)


def picture(views: Views, number: float | None, file: str | None) -> Tensor:
    """An uploaded picture where there is one, else a held-out one by its number, uint8 C H W."""
    return views.model.read(file) if file else views.held_out(whole(number, HELD_OUT))


def plane_picture(views: Views, plane: Plane, points: bool) -> Image.Image:
    """The decoded plane, and the points on it in the colours of their labels; without margins, as clicks are read off it."""
    figure = Figure(figsize=(PLANE_PIXELS / 100,) * 2, dpi=100)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.axis("off")
    (low_x, low_y), (high_x, high_y) = plane.low.tolist(), plane.high.tolist()
    with Image.open(io.BytesIO(tiled(plane.images, TILES))) as sheet:
        axis.imshow(sheet.convert("RGB"), extent=(low_x, high_x, low_y, high_y), aspect="auto", interpolation="nearest")
    if points and len(plane.points):
        x, y = plane.points.T
        if plane.labels is None:
            colours: dict[str, Any] = {"c": "tab:orange"}
        else:  # as in the legend, where each label of the run has its colour
            colours = {"c": plane.labels, "cmap": "tab10", "vmin": 0, "vmax": max(1, len(views.data.label_names) - 1)}
        axis.scatter(x, y, s=12, linewidths=0, alpha=0.8, **colours)
    axis.set(xlim=(low_x, high_x), ylim=(low_y, high_y))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer)


def legend(views: Views, plane: Plane) -> str:
    """The colours of the labels."""
    if plane.labels is None:
        return ""
    from matplotlib import colormaps, colors

    names = views.data.label_names
    colour = {name: colors.to_hex(colormaps["tab10"](number / max(1, len(names) - 1))) for number, name in enumerate(names)}
    return '<p class="legend">' + "".join(
        f'<span><b style="color: {code}">●</b> {html.escape(name)}</span>' for name, code in colour.items()
    ) + "</p>"  # fmt: skip


def condition_asked(views: Views, label: str, caption: str) -> tuple[str | None, str | None]:
    """The label and the caption that are asked for, of which only that counts which the prior of this run takes: the box of the
    other may still hold what another run was asked for."""
    takes = views.run.conditioned_on
    return label if takes == "label" and label != ANY else None, (caption or None) if takes == "caption" else None


def how_asked(temperature: float, guidance: float, autoguidance: float) -> Sampling:
    return sampling(temperature, None, 1.0, guidance, autoguidance)


def upload_of(label: str) -> gr.Image:
    """A field for a picture from a file, which is handed on as it is: what reads it says what is wrong with it."""
    image = gr.Image(type="filepath", label=label, sources=["upload"], height=150, min_width=140)
    image.preprocess = lambda payload: None if payload is None else payload.path  # type: ignore[method-assign]
    return image


class Page:
    """The controls and what they do. device: as the commands name it."""

    def __init__(self, first: str, device: str):
        self.first, self.device = first, device
        self.opened = functools.lru_cache(maxsize=3)(self.open)

    @property
    def names(self) -> list[str]:
        """The names of the runs that there are now, with that of the run shown first."""
        names = names_of_runs()
        return names if self.first in names else [self.first, *names]

    def open(self, name: str) -> Views:
        """A run, and its data on their way, so that what first needs them does not wait."""
        views = Views(TwoStage.open(name, self.device))
        _ = views.loading
        return views

    def views(self, name: str | None) -> Views:
        if not name:
            raise UserError("choose a run above")
        return self.opened(name)

    def settings(self, name: str | None) -> list[Any]:
        """The settings of a run that was chosen: labels, caption, temperature, guidance, autoguidance."""
        try:
            views = self.views(name)
        except UserError:  # which drawing says
            return [gr.update(visible=False)] * 2 + [gr.update()] * 3
        context, how = views.run.conditioned_on, Sampling(**views.model.tuned)
        return [
            gr.update(choices=[ANY, *views.model.labels], value=ANY, visible=context == "label"),
            # There is no guidance without a caption; and that of another run says nothing here.
            gr.update(value=next(iter(views.model.captions), "") if how.guidance else "", visible=context == "caption"),
            gr.update(value=how.temperature, interactive=views.run.learned),
            gr.update(value=how.guidance, interactive=views.guided),
            gr.update(value=how.autoguidance, interactive=views.autoguided),
        ]

    def draw(self, name: str, seed: float, count: int, *asked: Any) -> list[Strip]:
        """asked: the label and the caption, temperature, guidance, autoguidance."""
        views = self.views(name)
        return views.draw(count, whole(seed, "the seed"), how_asked(*asked[2:]), *condition_asked(views, *asked[:2]))

    def nearest(self, name: str, seed: float, count: int, *asked: Any) -> list[Strip]:
        """asked: as in `draw`."""
        views = self.views(name)
        return views.nearest(count, whole(seed, "the seed"), how_asked(*asked[2:]), *condition_asked(views, *asked[:2]))

    def plane(self, name: str, points: bool) -> list[Any]:
        """The picture, and beside it the legend or why there is none."""
        try:
            views = self.views(name)
            plane = views.plane
            return [gr.update(value=plane_picture(views, plane, points), visible=True), legend(views, plane)]
        except UserError as error:
            return [gr.update(value=None, visible=False), sentence(error)]

    def under(self, name: str, event: gr.SelectData) -> str:
        x, y = ((place + 0.5) / PLANE_PIXELS for place in event.index)
        return shown(lambda: self.views(name).under(x, y))()

    def last(self, name: str) -> Any:
        """The number of the last held-out image, where a walk from the first goes; no other where there are none."""
        try:
            return len(self.views(name).loading.result().test) - 1
        except UserError:
            return gr.update()

    def walk(self, name: str, start: float, upload: str | None, end: float, other: str | None, steps: int) -> list[Strip]:
        views = self.views(name)
        views.check_line()  # before the images are asked for, which may not be there
        return views.walk(picture(views, start, upload), picture(views, end, other), steps)

    def score(self, name: str, number: float, upload: str | None) -> list[Strip]:
        views = self.views(name)
        return views.score(picture(views, number, upload))

    def load(self, name: str, number: float) -> list[Any]:
        """A held-out image, enlarged, for the editor."""
        try:
            image = self.views(name).held_out(whole(number, HELD_OUT))
        except UserError as error:
            return [gr.update(), sentence(error)]
        with Image.open(io.BytesIO(tiled(image[None], 1))) as small:
            times = max(1, EDITOR_PIXELS // max(small.size))
            large = small.resize((small.width * times, small.height * times), Image.Resampling.NEAREST)
        return [gr.update(value={"background": large, "layers": [], "composite": None}), ""]

    def complete(
        self, name: str, seed: float, drawing: dict[str, Any] | None, count: int, particles: int, *asked: Any
    ) -> list[Strip]:
        """asked: the label and the caption."""
        if not drawing or not drawing["background"]:
            raise UserError("there is no picture to complete: load a held-out image, or drop a file")
        views = self.views(name)
        picture, hidden = hidden_part(views.model, drawing["background"], drawing["layers"])
        return views.complete(picture, hidden, count, particles, whole(seed, "the seed"), *condition_asked(views, *asked))

    def serve(self, host: str, port: int, wait: bool = True) -> gr.Blocks:
        """Serve the page until it is interrupted, or until it is closed where there is no waiting."""
        blocks = self.blocks()
        blocks.launch(
            server_name=host,
            server_port=port,
            quiet=True,
            prevent_thread_lock=not wait,
            ssr_mode=False,
            theme=THEME,
            css=CSS,
            footer_links=[],
        )
        return blocks

    def blocks(self) -> gr.Blocks:
        """The page."""
        with gr.Blocks(title="Two-stage latent priors", analytics_enabled=False) as blocks:
            gr.Markdown("### One decoder, several priors")
            with gr.Row():
                run = gr.Dropdown(self.names, value=self.first, label="Run", min_width=140)
                label = gr.Dropdown([ANY], value=ANY, label="Label", visible=False, min_width=140)
                caption = gr.Textbox(label="Caption", visible=False, min_width=140)
                seed = gr.Number(0, label="Seed", precision=0, min_width=90)
            with gr.Accordion("Sampling settings of the learned prior", open=False), gr.Row():
                temperature = gr.Slider(0, 1.5, 1, step=0.05, label="Temperature", min_width=140)
                guidance = gr.Slider(0, 4, 0, step=0.25, label="Guidance", min_width=140)
                autoguidance = gr.Slider(0, 4, 0, step=0.25, label="Autoguidance", min_width=140)
            # A run that was trained since the page was opened is listed, too.
            run.focus(lambda: gr.update(choices=self.names), outputs=run, show_progress="hidden", api_visibility="private")
            asked = [label, caption, temperature, guidance, autoguidance]
            with gr.Tab("Draw"):
                count = gr.Slider(1, LARGEST, 16, step=1, label="Images under each prior")
                button = gr.Button("Draw", variant="primary")
                drawn = gr.HTML()
                draw: dict[str, Any] = {"fn": shown(self.draw), "inputs": [run, seed, count, *asked], "outputs": drawn}
                one_at_a_time(button.click, **draw)
            with gr.Tab("Plane"):
                gr.Markdown("Click on the plane of a two-dimensional latent to decode the point.")
                points = gr.Checkbox(True, label="Training images' latents")
                with gr.Row():
                    plane = gr.Image(
                        type="pil", format="png", interactive=False, visible=False, show_label=False, buttons=[], min_width=300
                    )
                    with gr.Column(min_width=200):
                        under, colours = gr.HTML(), gr.HTML()
                show_plane: dict[str, Any] = {"fn": self.plane, "inputs": [run, points], "outputs": [plane, colours]}
                one_at_a_time(points.change, **show_plane)
                one_at_a_time(plane.select, fn=self.under, inputs=run, outputs=under)
            with gr.Tab("Walk"):
                gr.Markdown("A straight line between the latents of two images: held-out ones by their numbers, or files.")
                ends: list[gr.Component] = []
                with gr.Row():
                    for name in ("From", "To"):
                        with gr.Column(min_width=140):
                            ends.append(gr.Number(0, label=f"{name}: held-out image", precision=0))
                            ends.append(upload_of(f"{name}: or a file"))
                steps = gr.Slider(3, 32, 12, step=1, label="Steps")
                button = gr.Button("Walk", variant="primary")
                one_at_a_time(button.click, fn=shown(self.walk), inputs=[run, *ends, steps], outputs=gr.HTML())
            with gr.Tab("Complete"):
                gr.Markdown("Load a held-out image, or drop a file. Then paint over the part that is to be drawn anew.")
                with gr.Row(equal_height=True):
                    number = gr.Number(0, label="Held-out image", precision=0, min_width=90)
                    load = gr.Button("Load", min_width=90)
                editor = gr.ImageEditor(
                    type="filepath",
                    format="png",
                    sources=["upload"],
                    transforms=[],
                    layers=False,
                    show_label=False,
                    canvas_size=(EDITOR_PIXELS, EDITOR_PIXELS),
                    brush=gr.Brush(default_size=24, colors=["#e03030"], default_color="#e03030", color_mode="fixed"),
                )
                with gr.Row():
                    few = gr.Slider(1, 16, 8, step=1, label="Completions", min_width=140)
                    among = gr.Slider(4, 256, 16, step=4, label="Particles that each is chosen among", min_width=140)
                button = gr.Button("Draw the painted part", variant="primary")
                completed = gr.HTML()
                one_at_a_time(load.click, fn=self.load, inputs=[run, number], outputs=[editor, completed])
                complete: dict[str, Any] = {"inputs": [run, seed, editor, few, among, label, caption], "outputs": completed}
                one_at_a_time(button.click, fn=shown(self.complete), **complete)
            with gr.Tab("Nearest"):
                gr.Markdown(
                    "Samples of the learned prior, and the training images that are nearest to them. The first search may take a"
                    " minute: it trains a classifier where the run has none yet."
                )
                some = gr.Slider(1, 16, 8, step=1, label="Samples")
                button = gr.Button("Find", variant="primary")
                one_at_a_time(button.click, fn=shown(self.nearest), inputs=[run, seed, some, *asked], outputs=gr.HTML())
            with gr.Tab("Score"):
                gr.Markdown("How unusual a picture is under both stages, and where: a held-out image by its number, or a file.")
                with gr.Row():
                    number = gr.Number(0, label="Held-out image", precision=0, min_width=140)
                    upload = upload_of("Or a file")
                button = gr.Button("Score", variant="primary")
                one_at_a_time(button.click, fn=shown(self.score), inputs=[run, number, upload], outputs=gr.HTML())
            for begin in (blocks.load, run.change):
                chosen = one_at_a_time(begin, fn=self.settings, inputs=run, outputs=asked)
                first = one_at_a_time(one_at_a_time(chosen.then, **draw).then, **show_plane)
                one_at_a_time(first.then, fn=self.last, inputs=run, outputs=ends[2])
        return blocks


def one_at_a_time(event: Callable[..., Any], **handler: Any) -> Any:
    """Attach a handler to an event; of all handlers one runs at a time, since they share networks and their threads."""
    return event(**handler, concurrency_id="model", concurrency_limit=1, api_visibility="private")
