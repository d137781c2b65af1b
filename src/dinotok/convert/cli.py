"""`dinotok convert`: one sub-command for every family of released checkpoints."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..command_line import user_errors

if TYPE_CHECKING:
    from .checkpoint import ConversionReport

convert_app = typer.Typer(
    help="Turn released checkpoints of other code bases into folders for from_pretrained.", no_args_is_help=True
)

Checkpoint = Annotated[Path, typer.Argument(metavar="CKPT", help="The released file, .pt or .safetensors.")]
Folder = Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the model; made if it is missing.")]
Encoder = Annotated[
    str | None,
    typer.Option(help="Folder or repository of the frozen encoder, to be saved with it; by default it is only named."),
]
EncoderImageSize = Annotated[int, typer.Option(min=1, help="Pixels the encoder sees on each side.")]
AttentionHeads = Annotated[int, typer.Option(min=1, help="Heads of the token decoder, which no tensor shows.")]


@convert_app.command()
def vfmtok(
    checkpoint: Checkpoint,
    output: Folder,
    encoder: Encoder = None,
    image_size: Annotated[int, typer.Option(min=1, help="Pixels in and out, on each side.")] = 336,
    encoder_image_size: EncoderImageSize = 336,
    attention_heads: AttentionHeads = 8,
) -> None:
    """Convert vfmtok-tokenizer.pt (discrete) to a VQModelVFMTok."""
    with user_errors():
        from .vfmtok import convert_vfmtok

        report = convert_vfmtok(
            checkpoint,
            output,
            encoder=encoder,
            image_size=image_size,
            encoder_image_size=encoder_image_size,
            num_attention_heads=attention_heads,
        )
        _print(report, output)


@convert_app.command()
def vfmae(
    checkpoint: Checkpoint,
    output: Folder,
    encoder: Encoder = None,
    statistics: Annotated[
        Path | None, typer.Option(help="The authors' stats-500.pt: mean and deviation of the latents.")
    ] = None,
    encoder_image_size: EncoderImageSize = 224,
    attention_heads: AttentionHeads = 8,
) -> None:
    """Convert vfmae-tokenizer.pt (continuous) to an AutoencoderVFMTok."""
    with user_errors():
        from .vfmtok import convert_vfmae

        report = convert_vfmae(
            checkpoint,
            output,
            encoder=encoder,
            statistics=statistics,
            encoder_image_size=encoder_image_size,
            num_attention_heads=attention_heads,
        )
        _print(report, output)


@convert_app.command()
def dit_dh(
    checkpoint: Checkpoint,
    output: Folder,
    attention_heads: Annotated[
        int | None, typer.Option(min=1, help="Heads of the body, for a file without its rotary tables.")
    ] = None,
    head_attention_heads: Annotated[int | None, typer.Option(min=1, help="Heads of the wide head, likewise.")] = None,
) -> None:
    """Convert a denoiser of RAE or VFMAE (DiT-DH, LightningDiT) to a DiffusionTransformer2DModel."""
    with user_errors():
        from .dit_dh import convert_dit_dh

        converted = convert_dit_dh(
            checkpoint, num_attention_heads=attention_heads, head_num_attention_heads=head_attention_heads
        )
        _print(converted.save(output), output)


@convert_app.command()
def gpt(
    checkpoint: Checkpoint,
    output: Folder,
    attention_heads: Annotated[
        int | None, typer.Option(min=1, help="Heads, for a model of none of the published sizes.")
    ] = None,
) -> None:
    """Convert a GPT of VFMTok or LlamaGen to an AutoregressiveTransformer2DModel."""
    with user_errors():
        from .checkpoint import save_converted
        from .gpt import convert_gpt

        model, reader = convert_gpt(checkpoint, num_attention_heads=attention_heads)
        _print(save_converted(model, output, checkpoint, reader.used, reader.dropped), output)


@convert_app.command()
def rar(checkpoint: Checkpoint, output: Folder) -> None:
    """Convert a random-order transformer of VFMTok-RAR to a RandomAutoregressiveTransformer2DModel."""
    with user_errors():
        from .checkpoint import save_converted
        from .rar import convert_rar

        model, reader = convert_rar(checkpoint)
        _print(save_converted(model, output, checkpoint, reader.used, reader.dropped), output)


def _print(report: "ConversionReport", output: Path) -> None:
    typer.echo(f"{output}: {report.class_name} from {len(report.used)} tensors of {report.checkpoint}")
    reasons: dict[str, int] = {}
    for reason in report.dropped.values():
        reasons[reason] = reasons.get(reason, 0) + 1
    for reason, count in reasons.items():
        typer.echo(f"left out {count}: {reason}")
    typer.echo(f"Every tensor and where it went: {output / 'conversion.json'}")
