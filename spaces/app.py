"""The demo: pictures through tokenizers and back, mixed tokens, pictures of classes.

    python app.py [--host 127.0.0.1] [--port 7860] [--allow-folders]

Nothing is fetched when the page loads; models of the package need no network at all.
"""

import argparse
import html
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import gradio as gr
from generating import MAX_PICTURES, MAX_STEPS, OPTIONS, generate, offer_of
from library import Library, bundled_generators, bundled_tokenizers, missing_generators
from PIL import Image
from tokenizing import FIRST, SECOND, SOURCES, mix, reconstruct, table
from uploads import FORMATS, MAX_BYTES, Upload, read_upload

from dinotok.command_line import one_line
from dinotok.quickstart import photograph

EXAMPLES = {
    "cat": "chelsea.jpg",
    "coffee": "coffee.jpg",
    "rocket": "rocket.jpg",
    "astronaut": "astronaut.jpg",
    "eye": "retina.jpg",
    "galaxies": "hubble_deep_field.jpg",
}
PAIRS = (("cat", "coffee"), ("rocket", "astronaut"), ("eye", "galaxies"))
SIDES = (256, 384, 512)
MODELS = "models"  # events of this name wait for each other: one model runs at a time
TAKEN = f"{', '.join(FORMATS)}, up to {MAX_BYTES // 2**20} MB"
QUEUE_LENGTH = 32
CACHE_SECONDS = (600, 3600)  # how often files of visitors are looked through, and how old they may get
SYSTEM_FONTS = ("ui-sans-serif", "system-ui", "sans-serif")
SYSTEM_MONO = ("ui-monospace", "Consolas", "monospace")

INTRODUCTION = """# dinotok
Image tokenizers on frozen vision foundation models, and generators on their latents. The models listed come with the
package: small ones, trained for an hour on two CPU cores, that show what the code does, not what the papers' models
reach. Pictures are deleted within about an hour.
"""
# Focus has to be seen, galleries and captions whole, and tables without the empty head that Markdown needs.
CSS = """
:focus-visible { outline: 3px solid var(--color-accent) !important; outline-offset: 2px; }
.whole .grid-wrap { min-height: 0 !important; max-height: none !important; height: auto !important; }
.whole .grid-wrap { overflow: visible !important; }
.whole, .whole .gallery-container { height: auto !important; }
.whole .caption-label { max-width: 100%; font-size: var(--text-xs); }
#mixture img { width: 100%; object-fit: contain; }
.facts thead { display: none; }
.facts td { overflow-wrap: anywhere; }
.facts td:first-child { min-width: 6em; width: 1%; }
@media (max-width: 640px) { .gradio-container { padding: 8px !important; } }
"""
MOVE_DIVIDER = "(position) => ({ __type__: 'update', slider_position: position })"


class Demo:
    """The page and what its buttons do.

    Args:
        library: Loads the models.
    """

    def __init__(self, library: Library):
        self.library = library

    # ------------------------------------------------------------------------------------------------- what buttons do

    def reconstruct(
        self,
        path: str | None,
        listed: str,
        typed: str,
        side: int,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[Any, ...]:
        """A picture through a tokenizer: both for the slider, a table, and maps."""
        with messages():
            upload = _read("a picture", path, side)
            progress(0.1, desc="Loading the tokenizer")
            model = self.library.tokenizer(_chosen(listed, typed))
            progress(0.5, desc="Encoding and decoding")
            result = reconstruct(model, upload.picture)
        facts = {**result.facts, "Your file": _file_text(upload), **_notes(upload)}
        slider = gr.ImageSlider(value=(result.original, result.reconstruction), slider_position=50)
        return slider, 50, table(facts), result.maps

    def mix(
        self,
        first: str | None,
        second: str | None,
        listed: str,
        typed: str,
        semantic: str,
        texture: str,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[Any, ...]:
        """Semantics of one picture with the texture of another."""
        with messages():
            pictures = [_read(name, path, SIDES[0]).picture for name, path in ((FIRST, first), (SECOND, second))]
            progress(0.1, desc="Loading the tokenizer")
            model = self.library.tokenizer(_chosen(listed, typed))
            progress(0.5, desc="Encoding, mixing and decoding")
            mixture = mix(model, *pictures, semantic=semantic, texture=texture)
        return mixture.result, mixture.pictures, table(mixture.facts)

    def offer(self, listed: str | None, typed: str, shown: str) -> tuple[Any, ...]:
        """What a generator lets one choose: fill the class list, show the options that it has, once for each choice."""
        with messages():
            name = _chosen(listed, typed)
            if name == shown:
                return (gr.skip(),) * (2 + len(OPTIONS))
            offer = offer_of(self.library.find_generator(name))
        classes = gr.Dropdown(choices=offer.classes, value=offer.classes[0][1])
        values = [{"value": offer.options[option]} if option in offer.options else {} for option in OPTIONS]
        controls = [gr.Slider(visible=bool(value), **value) for value in values]
        return name, classes, *controls

    def generate(
        self,
        listed: str | None,
        typed: str,
        class_id: int | None,
        num_images: int,
        seed: int,
        steps: int,
        guidance: float,
        temperature: float,
        top_k: int,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[list[Image.Image], str]:
        """Pictures of a class, with progress by step."""
        given = dict(zip(OPTIONS, (steps, guidance, temperature, top_k), strict=True))
        with messages():
            progress(0, desc="Loading the generator")
            name = _chosen(listed, typed)
            offer = offer_of(self.library.find_generator(name))
            pipeline = self.library.pipeline(name)
            if class_id is None or seed is None:
                raise ValueError("Choose a class and a seed first.")
            options = {option: given[option] for option in offer.options}

            def show(done: int, total: int) -> None:
                progress((done, total), desc="Drawing", unit="steps")

            pictures = generate(pipeline, class_id, num_images, seed, options, show)
        label = dict((index, label) for label, index in offer.classes).get(class_id, f"class {class_id}")
        captioned = [(picture, f"{label}, seed {seed + place}") for place, picture in enumerate(pictures)]
        settings = ", ".join(f"{option} {value:g}" for option, value in options.items())
        return captioned, f"{name}: {settings}"

    # ------------------------------------------------------------------------------------------------------- the page

    def page(self) -> gr.Blocks:
        """Build the page."""
        with gr.Blocks(title="dinotok", analytics_enabled=False, delete_cache=CACHE_SECONDS) as page:
            gr.Markdown(INTRODUCTION)
            with gr.Tab("Reconstruct"):
                self._reconstruct_tab()
            with gr.Tab("Edit tokens"):
                self._mix_tab()
            with gr.Tab("Generate"):
                self._generate_tab(page)
        return page.queue(max_size=QUEUE_LENGTH, default_concurrency_limit=1)

    def _reconstruct_tab(self) -> None:
        with gr.Row():
            with gr.Column(min_width=300):
                picture = _upload("Picture", "picture")
                _examples([(name,) for name in EXAMPLES], [picture], "Or one of these photographs")
                listed, typed = _tokenizer_choice("reconstruct")
                side = gr.Radio(SIDES, value=SIDES[1], label="Long side, in pixels")
                button = gr.Button("Reconstruct", variant="primary", elem_id="reconstruct")
            with gr.Column(min_width=300):
                slider = gr.ImageSlider(
                    label="Original on the left, reconstruction on the right",
                    format="png",
                    interactive=False,
                    elem_id="comparison",
                )
                divider = gr.Slider(0, 100, 50, step=1, label="Divider (or drag it in the picture)", elem_id="divider")
                facts = gr.Markdown(elem_id="facts", elem_classes="facts")
                maps = _gallery("Latents and codes as colours", 2, "maps")
        divider.input(None, divider, slider, js=MOVE_DIVIDER, show_progress="hidden")
        button.click(
            self.reconstruct, [picture, listed, typed, side], [slider, divider, facts, maps],
            concurrency_id=MODELS, concurrency_limit=1, api_name="reconstruct", scroll_to_output=True,
        )  # fmt: skip

    def _mix_tab(self) -> None:
        gr.Markdown(
            "Each position has a semantic code and a texture code. Decode the semantic codes of one picture with the "
            "texture codes of another, or leave one of them out: it is then at its mean."
        )
        with gr.Row():
            with gr.Column(min_width=300):
                first, second = _upload("Picture A", "first"), _upload("Picture B", "second")
                _examples(PAIRS, [first, second], "Or two of these photographs")
            with gr.Column(min_width=300):
                semantic = gr.Radio(SOURCES, value=FIRST, label="Semantics of", elem_id="semantic")
                texture = gr.Radio(SOURCES, value=SECOND, label="Texture of", elem_id="texture")
                listed, typed = _tokenizer_choice("mix")
                button = gr.Button("Mix", variant="primary", elem_id="mix")
                result = gr.Image(
                    label="Result",
                    format="png",
                    interactive=False,
                    buttons=["download", "fullscreen"],
                    elem_id="mixture",
                    alt_text="The mixture",
                )
                facts = gr.Markdown(elem_id="mix-facts", elem_classes="facts")
                pictures = _gallery("Beside both", 3, "mix-pictures")
        button.click(
            self.mix, [first, second, listed, typed, semantic, texture], [result, pictures, facts],
            concurrency_id=MODELS, concurrency_limit=1, api_name="mix", scroll_to_output=True,
        )  # fmt: skip

    def _generate_tab(self, page: gr.Blocks) -> None:
        names = bundled_generators()
        missing = missing_generators()
        if missing:
            gr.Markdown(f"Not part of this version of the package: {', '.join(missing)}.", elem_id="missing")
        with gr.Row():
            with gr.Column(min_width=300):
                listed = gr.Radio(names, value=names[0] if names else None, label="Generator", elem_id="generator")
                typed = _hub_field("generator")
                classes = gr.Dropdown([], label="Class", elem_id="class")
                number = gr.Slider(1, MAX_PICTURES, MAX_PICTURES, step=1, label="Pictures", elem_id="number")
                seed = gr.Number(0, label="Seed of the first", precision=0, minimum=0, maximum=2**53 - MAX_PICTURES)
                controls = [
                    gr.Slider(1, MAX_STEPS, 25, step=1, label="Steps", elem_id="steps"),
                    gr.Slider(1, 10, 1, step=0.1, label="Guidance (1 is none)", elem_id="guidance"),
                    gr.Slider(0, 2, 1, step=0.05, label="Temperature (0 takes the likeliest)", elem_id="temperature"),
                    gr.Slider(0, 2048, 0, step=1, label="Draw from so many codes (0 is all)", elem_id="codes"),
                ]
                button = gr.Button("Generate", variant="primary", elem_id="generate")
            with gr.Column(min_width=300):
                drawn = _gallery("Pictures", 2, "drawn")
                settings = gr.Markdown(elem_id="settings")
        shown = gr.State("")
        choice, offered = [listed, typed], [shown, classes, *controls]
        for event in (listed.input, typed.submit, typed.blur, *([page.load] if names else [])):
            event(self.offer, [*choice, shown], offered, api_visibility="private", show_progress="hidden")
        button.click(
            self.generate, [*choice, classes, number, seed, *controls], [drawn, settings],
            concurrency_id=MODELS, concurrency_limit=1, api_name="generate", scroll_to_output=True,
        )  # fmt: skip


@contextmanager
def messages() -> Iterator[None]:
    """Show what a visitor can mend as a message; all else is "Error" to visitors, and a trace in the log only."""
    try:
        yield
    except (ValueError, OSError, MemoryError, ImportError) as error:
        # The text may repeat what a visitor typed, and gradio renders HTML.
        text = html.escape(one_line(error), quote=False)
        raise gr.Error(text, duration=20, title="That did not work", print_exception=False) from error


def _upload(label: str, elem_id: str) -> gr.Image:
    """A place to drop a picture, which hands on the path of the file.

    gradio would open the file with every decoder there is, before our limits, and end in a trace if it cannot.
    """
    image = gr.Image(
        label=label,
        placeholder=f"Drop a picture here, or press to choose one\n{TAKEN}",
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard"],
        height=280,
        elem_id=elem_id,
        alt_text=label,
    )
    image.preprocess = lambda payload: None if payload is None else payload.path
    return image


def _examples(rows: Sequence[Sequence[str]], images: list[gr.Image], label: str) -> None:
    """Buttons with names, which a screen reader can say; those with thumbnails have none."""
    paths = [[str(photograph(EXAMPLES[name])) for name in row] for row in rows]
    gr.Examples(paths, images, label=label, example_labels=[" and ".join(row) for row in rows])


def _gallery(label: str, columns: int, elem_id: str) -> gr.Gallery:
    """Pictures beside each other, whole, and without the losses of gradio's usual WebP."""
    return gr.Gallery(
        label=label,
        columns=columns,
        format="png",
        object_fit="contain",
        height="auto",
        interactive=False,
        elem_id=elem_id,
        elem_classes="whole",
    )


def _tokenizer_choice(page: str) -> tuple[gr.Radio, gr.Textbox]:
    names = bundled_tokenizers()
    discrete_first = sorted(names, key=lambda name: not name.endswith("-vq"))
    value = discrete_first[0] if names else None
    return gr.Radio(names, value=value, label="Tokenizer", elem_id=f"{page}-tokenizer"), _hub_field(page)


def _hub_field(page: str) -> gr.Textbox:
    return gr.Textbox(
        label="Or any repository of the Hub", placeholder="owner/name", max_length=200, elem_id=f"{page}-repository"
    )


def _chosen(listed: str | None, typed: str | None) -> str:
    """What was typed comes before what is ticked."""
    name = (typed or "").strip() or listed
    if not name:
        raise ValueError("Choose a model, or type the name of a repository.")
    return name


def _read(name: str, path: str | None, side: int) -> Upload:
    if path is None:
        raise ValueError(f"There is no {name.removeprefix('a ')} yet: drop one, or take one of the examples.")
    return read_upload(path, side)


def _file_text(upload: Upload) -> str:
    width, height = upload.size
    return f"{upload.num_bytes:,} bytes, {width} x {height} pixels"


def _notes(upload: Upload) -> dict[str, str]:
    return {"Note": " ".join(upload.notes)} if upload.notes else {}


def launch(library: Library, **options: Any) -> gr.Blocks:
    """Start the server.

    Args:
        library: Loads the models.
        **options: As in gradio's `launch`: `server_name`, `server_port`, `prevent_thread_lock`, ...

    Returns:
        The page, to be closed.
    """
    page = Demo(library).page()
    page.launch(
        theme=gr.themes.Default(font=SYSTEM_FONTS, font_mono=SYSTEM_MONO),
        css=CSS,
        max_file_size=MAX_BYTES,
        footer_links=["api"],
        share=False,
        ssr_mode=False,
        enable_monitoring=False,
        **options,
    )
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", help="by default 127.0.0.1, on the Hub what it sets")
    parser.add_argument("--port", type=int)
    parser.add_argument("--allow-folders", action="store_true", help="models may be folders of this machine")
    arguments = parser.parse_args()
    launch(Library(arguments.allow_folders), server_name=arguments.host, server_port=arguments.port)


if __name__ == "__main__":
    main()
