"""`dinotok convert`: one sub-command for every family of released checkpoints."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from .vfmtok import ConversionReport

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
    from ..cli import user_errors

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
    from ..cli import user_errors

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


def _print(report: "ConversionReport", output: Path) -> None:
    typer.echo(f"{output}: {report.class_name} from {len(report.used)} tensors of {report.checkpoint}")
    reasons: dict[str, int] = {}
    for reason in report.dropped.values():
        reasons[reason] = reasons.get(reason, 0) + 1
    for reason, count in reasons.items():
        typer.echo(f"left out {count}: {reason}")
    typer.echo(f"Every tensor and where it went: {output / 'conversion.json'}")
