"""Arguments and options that several commands share, so that one word means the same in all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trimtab.compiler.engine_options import MAX_THREADS

Model = Annotated[
    str, typer.Argument(help="Model: Hugging Face directory, GGUF file or ONNX file.", show_default=False)
]
BuildFolder = Annotated[
    Path, typer.Argument(help="Build directory, as `trimtab compile` writes it.", show_default=False)
]
Recipe = Annotated[Path | None, typer.Argument(help="Recipe: a YAML file.", show_default=False)]

CalibrationData = Annotated[
    Path,
    typer.Option("--data", help="Calibration data: .txt, .jsonl, .tsv (plain or .gz) or .npz.", show_default=False),
]
PeerData = Annotated[
    Path | None,
    typer.Option(help="Calibration data of the peer openvino-int8; the same that the build was calibrated on."),
]
RecipeChanges = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="PASS.OPTION=VALUE", help="Change to the recipe; may be repeated.", show_default=False
    ),
]
Dense = Annotated[
    Path | None,
    typer.Option(help="Dense ONNX file to compare with. Default: the model that the build was compiled from."),
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, max=MAX_THREADS, help="CPU threads of each engine. Default: the recipe's, else all cores."),
]
Samples = Annotated[
    int | None, typer.Option(min=1, help="Largest number of samples taken from the data. Default: all.")
]
Speed = Annotated[
    float | None,
    typer.Option(
        help="Speed from 0 (as exact as the build gets) to 1 (as fast as it gets). Default: the dials' defaults.",
        show_default=False,
    ),
]
Dial = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE", help="Value of one dial; may be repeated. It overrides the speed.", show_default=False
    ),
]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Read pickled weights. A pickle can run its author's code.")
]
TrustedHash = Annotated[
    str | None,
    typer.Option(
        help="Expected sha256 of the build's manifest, as `trimtab compile` prints it; another build is refused.",
        show_default=False,
    ),
]
Backend = Annotated[
    str, typer.Option(help="Triton backend: auto, onnxruntime, python (ONNX Runtime in Python) or tensorrt.")
]
MaxBatch = Annotated[
    int | None,
    typer.Option(min=1, help="Largest batch that Triton forms. Default: the largest batch of the workload."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]
