"""The demo: pictures through tokenizers and back, mixed tokens, pictures of classes.

    python app.py [--host 127.0.0.1] [--port 7860] [--allow-folders]

Nothing is fetched when the page loads; models of the package need no network at all.
"""

import argparse
from typing import Any

import gradio as gr
from controls import (
    CSS,
    EXAMPLES,
    PAIRS,
    example_buttons,
    gallery,
    hub_field,
    messages,
    theme,
    tokenizer_choice,
    upload_field,
)
from generating import MAX_PICTURES, MAX_STEPS, OPTIONS, generate, offer_of
from library import Library, bundled_generators, missing_generators
from PIL import Image
from tokenizing import FIRST, SECOND, SOURCES, mix, reconstruct, table
from uploads import MAX_BYTES, Upload, read_upload

SIDES = (256, 384, 512)
MODELS = "models"  # events of this name wait for each other: one model runs at a time
QUEUE_LENGTH = 32
CACHE_SECONDS = (600, 3600)  # how often files of visitors are looked through, and how old they may get
INTRODUCTION = """# dinotok
Image tokenizers on frozen vision foundation models, and generators on their latents. The models listed come with the
package: small ones, trained for an hour on two CPU cores, that show what the code does, not what the papers' models
reach. Pictures are deleted within about an hour.
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
        """What a generator lets one choose: its classes, and the options that it has; once for each choice."""
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
                picture = upload_field("Picture", "picture")
                example_buttons([(name,) for name in EXAMPLES], [picture], "Or one of these photographs")
                listed, typed = tokenizer_choice("reconstruct")
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
                maps = gallery("Latents and codes as colours", 2, "maps")
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
                first, second = upload_field("Picture A", "first"), upload_field("Picture B", "second")
                example_buttons(PAIRS, [first, second], "Or two of these photographs")
            with gr.Column(min_width=300):
                semantic = gr.Radio(SOURCES, value=FIRST, label="Semantics of", elem_id="semantic")
                texture = gr.Radio(SOURCES, value=SECOND, label="Texture of", elem_id="texture")
                listed, typed = tokenizer_choice("mix")
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
                pictures = gallery("Beside both", 3, "mix-pictures")
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
                typed = hub_field("generator")
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
                drawn = gallery("Pictures", 2, "drawn")
                settings = gr.Markdown(elem_id="settings")
        shown = gr.State("")
        choice, offered = [listed, typed], [shown, classes, *controls]
        for event in (listed.input, typed.submit, typed.blur, *([page.load] if names else [])):
            event(self.offer, [*choice, shown], offered, api_visibility="private", show_progress="hidden")
        button.click(
            self.generate, [*choice, classes, number, seed, *controls], [drawn, settings],
            concurrency_id=MODELS, concurrency_limit=1, api_name="generate", scroll_to_output=True,
        )  # fmt: skip


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
        theme=theme(),
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
